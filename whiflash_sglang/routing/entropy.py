"""Router `entropy`: the entropy policy of WhiFlash (arXiv 2606.07710).

H is the entropy, in nats, of the target's distribution at the last verified position, from which the anchor was chosen.
At high H, the autoregressive drafter `e3` is better. At low H, the block drafter `df` is. The calibration
(`calibration.py`) has the gain in tokens as a step function of H.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from whiflash_sglang.routing.score import Score


class EntropyScore(Score):
    """H of each request, in nats."""

    in_tokens = False

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return entropy(logits.flatten(0, -2).index_select(0, at))[:, None]

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return {"entropy": EntropyScore.read(self, slots)}


class EntropyGain(EntropyScore):
    """Expected gain of `e3` over `df` at each request's H, in tokens of acceptance length.

    `gains` [k + 1] are the gains below, between and above the ascending `edges` [k], in nats.
    """

    in_tokens = True

    def __init__(self, num_slots: int, edges: Sequence[float], gains: Sequence[float]):
        super().__init__(num_slots)
        self.edges: list[float] = torch.tensor(edges, dtype=torch.float32).tolist()  # the precision of H
        self.gains = tuple(gains)

    def read(self, slots: Sequence[int]) -> list[float]:
        return [self.gains[bisect_right(self.edges, value)] for value in super().read(slots)]

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return {**super().signals(slots), "score": self.read(slots)}


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits); `logits` [..., vocab], result [...] float32."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=-1)  # entr(0) = 0: masked tokens add nothing
    return total
