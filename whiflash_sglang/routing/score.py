"""What a score promises: one number for each request, newer each round, that a policy decides by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class Score(ABC):
    """Computed where the target's logits are, behind its forward, and kept on the host, where it is decided by."""

    in_tokens: bool  # whether it is what `e3` is expected to accept more, so that a prior can be added to it

    def __init__(self, num_slots: int):
        self.values = [0.0] * num_slots  # the newest signal of each request, by request slot

    @abstractmethod
    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """As `round.Router.observe`; [rows, 1]."""

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        """As `round.Router.keep`; [rows][1]."""
        for slot, (value,) in zip(slots, signals, strict=True):
            self.values[slot] = value

    def read(self, slots: Sequence[int]) -> list[float]:
        """The scores [rows] of the requests in `slots` [rows]; the higher, the better `e3` is expected to be."""
        return [self.values[slot] for slot in slots]

    @abstractmethod
    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        """What these requests' next choice is made by, for people to see (`ledger.Explains`): `entropy` in nats, and
        `score`, what `e3` is expected to accept more, in tokens; [rows] each."""
