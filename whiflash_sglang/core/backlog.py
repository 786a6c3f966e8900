"""Positions that each drafter has not ingested yet: Lazy Catch-up (WhiFlash, arXiv 2606.07710).

A drafter that is not chosen does no work. The target's features of committed positions are kept in one ring buffer that
all drafters read. Position p of the request in slot s is in row s * capacity + p % capacity. A drafter has ingested a
request's positions below `ingested`. The rest, up to the committed length, is its backlog:

    position     0 .. 36   37 38 39 40 | 41 42 43      capacity 16: 37 is in column 5, 43 in column 11
                 ingested  backlog     | the next verify window

Features are stored as the target returns them. Applying each drafter's `fc` right away would take less memory, but
one matrix product per drafter and round. For an idle drafter, that product would be most of its cost.

The ring is written in whole windows, so shapes do not depend on accept counts. Entries beyond the committed positions
are overwritten before they are read. A round may begin with a backlog of at most capacity - width: see `overdue`. The
last committed position's feature stays readable after it is ingested, since EAGLE-3's chain starts from it.

Lengths are plain integers on the host. A batch has tens of requests, for which a loop is as fast as a tensor operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from whiflash_sglang.core.transfer import columns, to_device
from whiflash_sglang.core.types import Entries


class Backlog:
    """Features that the drafters `names` have not ingested, by request slot.

    `kv_table` [slots, context] maps a request's positions to KV slots while the request runs. `capacity` is the maximum
    backlog in tokens per request, and at least the verify width. Features have shape [feature_size] and type `dtype`.
    """

    def __init__(
        self, names: Iterable[str], feature_size: int, dtype: torch.dtype, kv_table: torch.Tensor, capacity: int
    ):
        num_slots, self.context = kv_table.shape
        self.device = kv_table.device
        self.kv_slots = kv_table.view(-1)  # [slots * context]
        self.capacity = capacity
        self.ingested = {name: [0] * num_slots for name in names}
        self.previous = [0] * num_slots  # positions committed when the last round began
        num_rows = num_slots * capacity
        self.next_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self.features = torch.zeros(num_rows, feature_size, dtype=dtype, device=self.device)

    def begin(self, slots: Sequence[int], lens: Sequence[int], last: torch.Tensor) -> None:
        """Mark positions 0 .. lens - 1 of `slots` as ingested by every drafter, after a prefill.

        `last` [requests, feature]: the features of each request's last position.
        """
        for name in self.ingested:
            self.settle(name, slots, lens)
        self.begin_round(slots, lens)
        rows = [slot * self.capacity + (end - 1) % self.capacity for slot, end in zip(slots, lens, strict=True)]
        self.features.index_copy_(0, to_device(rows, self.device), last)

    def rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The ring rows of `positions` of the requests in `slots`, broadcast."""
        return slots * self.capacity + positions % self.capacity

    def push(
        self, slots: torch.Tensor, prefix_lens: torch.Tensor, next_tokens: torch.Tensor, features: torch.Tensor
    ) -> None:
        """Store the windows that start at `prefix_lens` [rows].

        `features` [rows, width, feature]: of each position. `next_tokens` [rows, width] int64: the token after it.
        """
        positions = prefix_lens[:, None] + columns(next_tokens.shape[1], self.device)
        rows = self.rows(slots[:, None], positions).view(-1)
        self.next_tokens.index_copy_(0, rows, next_tokens.reshape(-1))
        self.features.index_copy_(0, rows, features.flatten(0, 1))

    def last(self, slots: torch.Tensor, prefix_lens: torch.Tensor) -> torch.Tensor:
        """The feature of each row's last committed position; [rows, feature]."""
        return self.features.index_select(0, self.rows(slots, prefix_lens - 1))

    def length(self, name: str, slot: int, committed: int) -> int:
        """The drafter's backlog, in tokens, for a request with `committed` positions."""
        return committed - self.ingested[name][slot]

    def missed(self, name: str, slot: int) -> int:
        """The part of the backlog, in tokens, that existed when the last round began."""
        return max(0, self.previous[slot] - self.ingested[name][slot])

    def begin_round(self, slots: Sequence[int], committed: Sequence[int]) -> None:
        """Record the `committed` positions [requests] at the beginning of a round, for `missed`."""
        for slot, length in zip(slots, committed, strict=True):
            self.previous[slot] = length

    def overdue(self, name: str, slots: Sequence[int], committed: Sequence[int], width: int) -> list[int]:
        """Row numbers of requests whose backlog could exceed the capacity with one more window of `width` tokens."""
        ingested, room = self.ingested[name], self.capacity - width
        return [row for row, end in enumerate(committed) if end - ingested[slots[row]] > room]

    def take(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> Entries | None:
        """Return the drafter's backlog, flat over the requests, and mark it as ingested; None if it is empty."""
        ingested = self.ingested[name]
        rows: list[int] = []
        positions: list[int] = []
        kv_rows: list[int] = []
        for slot, end in zip(slots, committed, strict=True):
            waiting = range(ingested[slot], end)
            positions += waiting
            rows += [slot * self.capacity + position % self.capacity for position in waiting]
            kv_rows += range(slot * self.context + ingested[slot], slot * self.context + end)
            ingested[slot] = end
        if not positions:
            return None
        index = to_device((rows, positions, kv_rows), self.device)  # one copy to the device
        return Entries(
            features=self.features.index_select(0, index[0]),
            next_tokens=self.next_tokens.index_select(0, index[0]),
            positions=index[1],
            kv_slots=self.kv_slots.index_select(0, index[2]).to(torch.int64),
        )

    def settle(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> None:
        """Mark all `committed` positions as ingested."""
        for slot, end in zip(slots, committed, strict=True):
            self.ingested[name][slot] = end
