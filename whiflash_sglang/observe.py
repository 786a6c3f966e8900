"""What rounds did and what they cost, counted as they happen; totals since the server started.

`Totals.snapshot()` is what `GET /server_info` shows under `internal_states[0].whiflash`, and what the replay reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from whiflash_sglang.types import RoundResult, Rows


class Totals:
    """Counters over all requests, and the time spent in model forwards and in rounds as a whole."""

    def __init__(self, drafter_names: tuple[str, ...], num_slots: int):
        self.names = (*drafter_names, "none")  # "none": a row that was not drafted for
        self.rounds = dict.fromkeys(self.names, 0)
        self.drafted = dict.fromkeys(self.names, 0)
        self.accepted_drafts = dict.fromkeys(self.names, 0)
        self.switches = 0
        self.steps = 0
        self.seconds = {"draft": 0.0, "verify": 0.0, "ingest": 0.0, "prefill": 0.0, "round": 0.0}
        self.last_choice = torch.full((num_slots,), -1, dtype=torch.int64)  # by request slot, index into names

    def start(self, slots: torch.Tensor) -> None:
        """A request begins in each of these slots: its first choice is no switch."""
        self.last_choice[slots.cpu()] = -1

    def count(self, rows: Rows, result: RoundResult) -> None:
        """Add one batch's round."""
        slots = rows.slots.cpu()
        drafted, accepted = result.num_drafts.cpu(), result.accepted.num_committed.cpu() - 1
        choice = torch.full_like(slots, len(self.names) - 1)
        for name, index in result.plan.items():
            choice[index.cpu()] = self.names.index(name)
        for i, name in enumerate(self.names):
            chosen = choice == i
            self.rounds[name] += int(chosen.sum())
            self.drafted[name] += int(drafted[chosen].sum())
            self.accepted_drafts[name] += int(accepted[chosen].sum())
        last = self.last_choice[slots]
        self.switches += int(((last >= 0) & (last != choice)).sum())
        self.last_choice[slots] = choice
        self.steps += 1

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of the block to `part`. On a device that runs asynchronously this is launch time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def snapshot(self) -> dict[str, object]:
        """Totals as plain data: counts of rows, `seconds` by part, `steps` = rounds of whole batches."""
        return {
            "rounds": sum(self.rounds.values()),
            "rounds_by_drafter": {name: n for name, n in self.rounds.items() if n},
            "drafted_by_drafter": {name: n for name, n in self.drafted.items() if n},
            "accepted_by_drafter": {name: n for name, n in self.accepted_drafts.items() if n},
            "accepted_drafts": sum(self.accepted_drafts.values()),
            "drafted": sum(self.drafted.values()),
            "switches": self.switches,
            "steps": self.steps,
            "seconds": {part: round(seconds, 6) for part, seconds in self.seconds.items()},
        }
