"""What each drafter has not ingested yet: the ledger of Lazy Catch-up (WhiFlash, arXiv 2606.07710).

A drafter that is not chosen does no work. Every committed position's feature, reduced by the drafter's own `fc`, waits
in a ring: position p of the request in slot s stands in row s * capacity + p % capacity. A drafter has ingested a
request's positions up to `ingested`, and the rest, up to the committed length, is its backlog:

    position     0 .. 36   37 38 39 40 | 41 42 43      capacity 16: 37 stands in column 5, 43 in column 11
                 ingested  backlog     | the next verify window

The ring is written by whole windows, so that shapes do not depend on accept counts; what lies behind the committed
positions is written anew before it counts. A round may begin with a backlog of at most capacity - width, which is what
`overdue` is for. The last committed position's feature stays readable also when it has been ingested, as EAGLE-3's
chain starts from it.

Lengths are plain numbers on the host: a batch has tens of requests, and a tensor operation costs as much as a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from whiflash_sglang.core.transfer import to_device
from whiflash_sglang.core.types import Entries


class Backlog:
    """Features in waiting, by drafter and request slot.

    `kv_table` [slots, context] maps a request's positions to KV slots, as long as the request lives. `capacity` is the
    bound of the backlog, in tokens of a request, and at least the verify width. `features` says how many numbers of
    which type a drafter keeps for a position.
    """

    def __init__(self, features: Mapping[str, tuple[int, torch.dtype]], kv_table: torch.Tensor, capacity: int):
        num_slots, self.context = kv_table.shape
        self.device = kv_table.device
        self.kv_slots = kv_table.view(-1)  # [slots * context]
        self.capacity = capacity
        self.ingested = {name: [0] * num_slots for name in features}
        self.previous = [0] * num_slots  # positions that had been committed when the last round began
        num_rows = num_slots * capacity
        self.next_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self.features = {
            name: torch.zeros(num_rows, hidden, dtype=dtype, device=self.device)
            for name, (hidden, dtype) in features.items()
        }

    def begin(self, name: str, slots: Sequence[int], lens: Sequence[int], last: torch.Tensor) -> None:
        """The drafter has ingested positions 0 .. lens - 1 of `slots`; `last` [requests, hidden]: the newest ones'."""
        self.settle(name, slots, lens)
        self.begin_round(slots, lens)
        rows = [slot * self.capacity + (end - 1) % self.capacity for slot, end in zip(slots, lens, strict=True)]
        self.features[name].index_copy_(0, to_device(rows, self.device), last)

    def rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where `positions` of the requests in `slots` stand in the rings."""
        return slots * self.capacity + positions % self.capacity

    def push(self, slots: torch.Tensor, prefix_lens: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        """Keep the tokens [rows, width] behind each position of the windows at `prefix_lens`.

        Returns where the windows stand in the rings, flat, for `store`.
        """
        window = torch.arange(next_tokens.shape[1], device=slots.device)
        rows = self.rows(slots[:, None], prefix_lens[:, None] + window).view(-1)
        self.next_tokens.index_copy_(0, rows, next_tokens.reshape(-1))
        return rows

    def store(self, name: str, rows: torch.Tensor, features: torch.Tensor) -> None:
        """Keep a drafter's `features` [n, hidden] at `rows` [n] of its ring."""
        self.features[name].index_copy_(0, rows, features)

    def last(self, name: str, slots: torch.Tensor, prefix_lens: torch.Tensor) -> torch.Tensor:
        """The features [rows, hidden] of each row's last committed position."""
        return self.features[name].index_select(0, self.rows(slots, prefix_lens - 1))

    def length(self, name: str, slot: int, committed: int) -> int:
        """Tokens waiting for the drafter, of a request with `committed` positions."""
        return committed - self.ingested[name][slot]

    def missed(self, name: str, slot: int) -> int:
        """Those of the waiting tokens that were waiting already when the last round began."""
        return max(0, self.previous[slot] - self.ingested[name][slot])

    def begin_round(self, slots: Sequence[int], committed: Sequence[int]) -> None:
        """A round begins for requests of `committed` positions: what waits from now on was missed by its drafter."""
        for slot, length in zip(slots, committed, strict=True):
            self.previous[slot] = length

    def overdue(self, name: str, slot: int, committed: int, width: int) -> bool:
        """Whether a request's backlog could outgrow the bound with one more window."""
        return self.length(name, slot, committed) > self.capacity - width

    def take(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> Entries | None:
        """What waits for the drafter, flat over the requests, and counted as ingested from now on; None: nothing."""
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
            features=self.features[name].index_select(0, index[0]),
            next_tokens=self.next_tokens.index_select(0, index[0]),
            positions=index[1],
            kv_slots=self.kv_slots.index_select(0, index[2]).to(torch.int64),
        )

    def settle(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> None:
        """Count everything up to `committed` as ingested."""
        for slot, end in zip(slots, committed, strict=True):
            self.ingested[name][slot] = end
