"""Times rounds at startup, before any requests, to fill the cost table (`costs.py`).

Rounds run on dummy rows, whose KV slots are free and hold arbitrary values. The time of a round does not depend on the
values. The rounds leave no state: the slots stay free, and a request begins with a prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from whiflash_sglang.core.round import DecodeRound, Router
from whiflash_sglang.core.types import HostRows, Plan, Rows
from whiflash_sglang.routing.costs import NONE

TYPICAL_ROUND = 4  # tokens of the previous round, which the drafter has to ingest


class Everyone(Router):
    """The same drafter for all rows, or none."""

    def __init__(self, name: str):
        self.name = name

    def route(self, rows: HostRows) -> Plan:
        return [None if self.name == NONE else self.name] * len(rows.slots)


class RoundProbe:
    """Runs timed rounds of a DecodeRound.

    `make_rows(num_rows, context)` prepares the target for a round of such rows and returns them. `synchronize` waits
    for the device.
    """

    def __init__(
        self,
        decode_round: DecodeRound,
        make_rows: Callable[[int, int], Rows],
        synchronize: Callable[[], None],
    ):
        self.round = decode_round
        self.make_rows = make_rows
        self.synchronize = synchronize
        self.draft_s = 0.0

    @contextmanager
    def attached(self) -> Iterator[RoundProbe]:
        """Replace the round's router and clock by the probe's within the context."""
        router, timed = self.round.router, self.round.timed
        self.round.timed = self.timed
        try:
            yield self
        finally:
            self.round.router, self.round.timed = router, timed

    def run(self, name: str, num_rows: int, context: int) -> tuple[float, float]:
        """Run a round with all rows given to drafter `name`, or none. Returns seconds of drafting and of the round."""
        rows = self.make_rows(num_rows, context)
        for drafter in self.round.drafters:
            self.round.backlog.settle(drafter, rows.host.slots, [context - TYPICAL_ROUND] * num_rows)
        self.round.router = Everyone(name)
        self.draft_s = 0.0
        self.synchronize()
        began = time.perf_counter()
        self.round.run(rows)
        self.synchronize()
        return self.draft_s, time.perf_counter() - began

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Time the drafting, which the table keeps apart. Other steps are not timed."""
        if step != "draft":
            yield
            return
        self.synchronize()
        began = time.perf_counter()
        yield
        self.synchronize()
        self.draft_s += time.perf_counter() - began
