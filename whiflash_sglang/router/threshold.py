"""The plain policies of the paper: `e3` drafts where the score is above a threshold, else `df`."""

from __future__ import annotations

import torch

from whiflash_sglang.round import Router
from whiflash_sglang.router.score import Score, priors
from whiflash_sglang.router.split import split
from whiflash_sglang.types import Plan, Rows


class ThresholdRouter(Router):
    names = ("df", "e3")

    def __init__(self, score: Score, threshold: float):
        self.score = score
        self.threshold = threshold

    def route(self, rows: Rows) -> Plan:
        score = self.score.read(rows.slots)
        if self.score.in_tokens and (prior := priors(rows)) is not None:
            score = score + torch.tensor(prior, device=score.device)
        return split(rows, self.names, score > self.threshold)

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        self.score.observe(slots, logits, hidden, at)

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.score.signals(slots)
