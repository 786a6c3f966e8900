"""`entropy`: WhiFlash's first policy (arXiv 2606.07710).

H is the entropy, in nats, of the target's distribution at the last verified position, the one that the anchor was
chosen from. H > threshold: the text is open, the autoregressive drafter `e3` drafts; else the block drafter `df`.
"""

from __future__ import annotations

import torch

from whiflash_sglang.router.split import split
from whiflash_sglang.types import Plan, Rows


class EntropyRouter:
    names = ("df", "e3")

    def __init__(self, threshold: float, num_slots: int):
        self.threshold = threshold
        self.entropy = torch.zeros(num_slots)  # by request slot, nats

    def route(self, rows: Rows) -> Plan:
        return split(rows, self.names, self.entropy.index_select(0, rows.slots) > self.threshold)

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the next choice for these request slots is made by; see `ledger.Explains`."""
        return {"entropy": self.entropy.index_select(0, slots)}

    def observe(self, slots: torch.Tensor, logits: torch.Tensor) -> None:
        self.entropy = self.entropy.to(logits.device)
        self.entropy.index_copy_(0, slots, entropy(logits))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) over the last dimension; float32 [...]."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=-1)  # entr(0) = 0: a masked token adds nothing
    return total
