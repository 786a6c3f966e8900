"""Time rounds before there are any requests: what fills the cost table (`costs.py`) at start.

A round runs on rows that stand for nothing: KV slots that no request holds yet, whatever is in them. What it costs does
not depend on the values. Afterwards nothing is left of it: slots are free, and a request begins with a prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from whiflash_sglang.core.round import DecodeRound, Router
from whiflash_sglang.core.types import HostRows, Plan, Rows
from whiflash_sglang.routing.costs import NONE

TYPICAL_ROUND = 4  # tokens of the round before, which a drafter that goes on has to ingest


class Everyone(Router):
    """All rows to one drafter, or to none."""

    def __init__(self, name: str):
        self.name = name

    def route(self, rows: HostRows) -> Plan:
        return [None if self.name == NONE else self.name] * len(rows.slots)


class RoundProbe:
    """`make_rows(num_rows, context)` prepares the target for a round of such rows and returns them.

    `synchronize` waits until the device has done what it was given.
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
        """While this lasts the round's router and clock are the probe's."""
        router, timed = self.round.router, self.round.timed
        self.round.timed = self.timed
        try:
            yield self
        finally:
            self.round.router, self.round.timed = router, timed

    def run(self, name: str, num_rows: int, context: int) -> tuple[float, float]:
        """Seconds of the drafts, and of the whole round, with all rows given to drafter `name`, or to none."""
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
        """A clock for the one step that the table keeps apart."""
        if step != "draft":
            yield
            return
        self.synchronize()
        began = time.perf_counter()
        yield
        self.synchronize()
        self.draft_s += time.perf_counter() - began
