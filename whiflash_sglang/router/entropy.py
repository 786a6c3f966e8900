"""`entropy`: WhiFlash's first policy (arXiv 2606.07710).

H is the entropy, in nats, of the target's distribution at the last verified position, the one that the anchor was
chosen from. High H: the text is open, and the autoregressive drafter `e3` is the better one; low H: the block drafter
`df` is. By how many tokens is what calibration finds out (`calibration.py`), as a step function of H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class EntropyScore:
    """H of each request, in nats."""

    in_tokens = False

    def __init__(self, num_slots: int):
        self.values = torch.zeros(num_slots)

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        self.values = self.values.to(logits.device)
        self.values.index_copy_(0, slots, entropy(logits.flatten(0, -2).index_select(0, at)))

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        return self.values.index_select(0, slots)

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"entropy": EntropyScore.read(self, slots)}


class EntropyGain(EntropyScore):
    """What `e3` is expected to gain over `df` at each request's H, in tokens of acceptance length.

    `gains` [k + 1] are those below, between and above the ascending `edges` [k], in nats.
    """

    in_tokens = True

    def __init__(self, num_slots: int, edges: Sequence[float], gains: Sequence[float]):
        super().__init__(num_slots)
        self.edges = torch.tensor(edges, dtype=torch.float32)
        self.gains = torch.tensor(gains, dtype=torch.float32)

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        super().observe(slots, logits, hidden, at)
        self.edges, self.gains = self.edges.to(logits.device), self.gains.to(logits.device)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        return self.gains.index_select(0, torch.bucketize(super().read(slots), self.edges, right=True))

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**super().signals(slots), "score": self.read(slots)}


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) over the last dimension; float32 [...]."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=-1)  # entr(0) = 0: a masked token adds nothing
    return total
