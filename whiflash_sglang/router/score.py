"""What a score promises: one number for each request, newer each round, that a policy decides by."""

from __future__ import annotations

from typing import Protocol

import torch


class Score(Protocol):
    """Keeps a number for every request slot, computed where the target's logits are, without a host synchronisation."""

    in_tokens: bool  # whether it is what `e3` is expected to accept more, so that a prior can be added to it

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        """As `round.Router.observe`."""
        ...

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """The scores [rows] of the requests in `slots` [rows]; the higher, the better `e3` is expected to be."""
        ...

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """What these requests' next choice is made by, for people to see (`ledger.Explains`): `entropy` in nats, and
        `score`, what `e3` is expected to accept more, in tokens; [rows] each."""
        ...
