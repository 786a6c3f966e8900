"""The interface of scores: one number per request, updated every round, that a policy decides by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class Score(ABC):
    """Computed on the device after the target's forward, and kept on the host by request slot."""

    in_tokens: bool  # whether it is the expected gain of `e3` in tokens, to which priors can be added

    def __init__(self, num_slots: int):
        self.values = [0.0] * num_slots  # latest signal by request slot

    @abstractmethod
    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """As `round.Router.observe`, with result [rows, 1]."""

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        """As `round.Router.keep`, with `signals` [rows][1]."""
        for slot, (value,) in zip(slots, signals, strict=True):
            self.values[slot] = value

    def read(self, slots: Sequence[int]) -> list[float]:
        """The scores [rows] of the requests in `slots` [rows]. Higher means better for `e3`."""
        return [self.values[slot] for slot in slots]

    @abstractmethod
    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        """The inputs of these requests' next decision, [rows] each, for display (`trace.Explains`).

        `entropy` in nats; `score`, the expected gain of `e3` over `df`, in tokens.
        """
