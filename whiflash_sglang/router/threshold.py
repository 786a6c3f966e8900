"""The plain policies of the paper: `e3` drafts where the score is above a threshold, else `df`."""

from __future__ import annotations

import torch

from whiflash_sglang.round import Router
from whiflash_sglang.router.prior import PriorShare, asked_priors, learned_priors
from whiflash_sglang.router.score import Score
from whiflash_sglang.router.split import split
from whiflash_sglang.types import Plan, Rows


class ThresholdRouter(Router):
    names = ("df", "e3")

    def __init__(self, score: Score, threshold: float):
        self.score = score
        self.threshold = threshold
        self.share = PriorShare()

    def route(self, rows: Rows) -> Plan:
        scores = self.score.read(rows.slots)
        if not self.score.in_tokens:
            return split(rows, self.names, scores > self.threshold)
        asked, learned = asked_priors(rows), learned_priors(rows)
        plan = self.plan(rows, scores, asked, learned)
        if learned is not None:
            self.share.look(rows, plan, lambda: self.plan(rows, scores, asked))
        return plan

    def plan(self, rows: Rows, scores: torch.Tensor, *priors: list[float] | None) -> Plan:
        """Who drafts, with `priors` [rows] added to the scores [rows]."""
        for prior in priors:
            scores = scores if prior is None else scores + torch.tensor(prior, device=scores.device)
        return split(rows, self.names, scores > self.threshold)

    def margin(self, rows: Rows) -> float:
        return self.threshold

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        self.score.observe(slots, logits, hidden, at)

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.score.signals(slots)
