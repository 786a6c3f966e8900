"""The policies of the WhiFlash paper (arXiv 2606.07710): `e3` if the score is above a threshold, else `df`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan
from whiflash_sglang.routing.exploration import PriorShare, added, asked_priors, learned_priors
from whiflash_sglang.routing.score import Score


class ThresholdRouter(Router):
    """Compares each row's score with `threshold`, in the score's unit. Priors are added to scores in tokens."""

    def __init__(self, score: Score, threshold: float):
        self.score = score
        self.threshold = threshold
        self.share = PriorShare()

    def route(self, rows: HostRows) -> Plan:
        scores = self.score.read(rows.slots)
        if not self.score.in_tokens:
            return self.plan(rows, scores)
        asked, learned = asked_priors(rows), learned_priors(rows)
        plan = self.plan(rows, scores, asked, learned)
        if learned is not None:
            self.share.look(rows, plan, lambda: self.plan(rows, scores, asked))
        return plan

    def plan(self, rows: HostRows, scores: list[float], *priors: list[float] | None) -> Plan:
        """The plan, with `priors` [rows] each added to `scores` [rows]."""
        for prior in priors:
            scores = added(scores, prior)
        return where_allowed(rows, ["e3" if score > self.threshold else "df" for score in scores])

    def margin(self, rows: HostRows) -> float:
        """As `exploration.ScoredRouter.margin`."""
        return self.threshold

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.score.observe(logits, hidden, at)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.score.keep(slots, signals)

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return self.score.signals(slots)
