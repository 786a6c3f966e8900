"""Records of running requests, and counts and timings in total since startup.

    totals.begin(slot, record)              after a request's prefill
    rows = totals.with_states(rows)         before a round
    totals.count(rows, result, signals)     after a round
    totals.end(slot)                        when the request has ended, or its slot is reused

`Totals.snapshot()` is shown by `GET /server_info` under `internal_states[0].whiflash` and read by the replay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from whiflash_sglang.core.health import Health
from whiflash_sglang.core.hints import OFF, Asked
from whiflash_sglang.core.spans import Markers, SpanReader
from whiflash_sglang.core.types import CatchUp, HostRows, RoundResult
from whiflash_sglang.routing.costs import RoundCosts
from whiflash_sglang.routing.exploration import PriorShare
from whiflash_sglang.routing.priors import Priors
from whiflash_sglang.serving.not_drafted import NotDrafted
from whiflash_sglang.serving.record import CONTEXT_KIND, SPAN, WHOLE_KEY, Counts, Key, Record, figures, nested, summed
from whiflash_sglang.serving.trace import Explains, Signals, Trace

STEPS = (
    *("prefill", "prefill_drafters"),
    *("route", "catch_up", "draft", "verify", "commit", "read", "spans"),
    *("round", "between"),
)
"""`commit` stores the features of the window for all drafters.

`read` is the single copy to the host per round or prefill. On an asynchronous device the host waits there, so `read`
contains the compute time of the steps before it, and those contain launch time only.

`spans` tracks spans and counts. Half of it is part of `round`, which ends before the counting.

`between` is the time from one round to the next without a prefill in between: our counting, and SGLang's work on
results, requests and the next batch. The device is idle during it.
"""


class Totals:
    """The records of running requests, the counts of ended ones, and the time spent in each step of a round."""

    def __init__(self, drafter_names: tuple[str, ...], reader: SpanReader | None = None, priors: Priors | None = None):
        self.drafter_names = drafter_names
        self.reader = SpanReader(Markers(), {}) if reader is None else reader
        self.priors = priors  # of the router's score
        self.records: dict[int, Record] = {}  # by request slot
        self.ended: dict[Key, Counts] = {}  # of ended requests
        self.backlog_max = 0  # at a catch-up, in tokens
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.steps = 0
        self.round_ended: float | None = None  # time.perf_counter(), if the last step was a round
        self.health = Health()  # of the round's drafters
        self.pool: dict[str, int] = {}  # KV tokens; each has an entry in the pools of the target and every drafter
        self.costs: RoundCosts | None = None  # of a cost-aware router
        self.prior_share: PriorShare | None = None  # of a router with priors
        self.not_drafted = NotDrafted()

    def begin(self, slot: int, record: Record) -> None:
        """Store the record of a request that was prefilled in `slot`."""
        self.round_ended = None
        self.end(slot)
        self.records[slot] = record

    def end(self, slot: int) -> None:
        """Move the counts of the slot's request to those of ended requests."""
        if slot in self.records:
            self.ended = summed([*self.ended.items(), *self.records.pop(slot).counts.items()], *WHOLE_KEY)

    def with_states(self, rows: HostRows) -> HostRows:
        """Return the rows with their states. Requests with the hint `route=off` are not draftable."""
        states = [self.records[slot].state for slot in rows.slots]
        draftable = rows.draftable
        if any(state.route == OFF for state in states):
            may_draft = set(rows.may_draft())
            draftable = [state.route != OFF and row in may_draft for row, state in enumerate(states)]
        return rows._replace(states=states, draftable=draftable)

    def signals(self, rows: HostRows, router: object) -> Signals:
        """The router's inputs; empty if no request of the batch is traced."""
        traced = any(self.records[slot].trace is not None for slot in rows.slots)
        return router.signals(rows.slots) if traced and isinstance(router, Explains) else {}

    def count(self, rows: HostRows, result: RoundResult, signals: Signals) -> None:
        """Add one batch's round."""
        with self.timed("spans"):
            for row, slot in enumerate(rows.slots):
                record = self.records[slot]
                for step, tokens in enumerate(result.rounds(row)):
                    if record.trace is not None:
                        record.trace.add(result, row, tokens, record.state, {} if step else signals)
                    record.count(result.plan[row], result.num_drafts[row], tokens)
        self.not_drafted.count(result.steps * len(rows.may_draft()), sum(name is not None for name in result.plan))
        self.steps += result.steps
        self.count_catch_ups(result.catch_ups)

    def count_catch_ups(self, catch_ups: Mapping[str, CatchUp]) -> None:
        """Add catch-up passes. A pass's time is divided among its requests by tokens."""
        for name, (slots, lens, missed, seconds) in catch_ups.items():
            each = seconds / sum(lens)
            for slot, length, late in zip(slots, lens, missed, strict=True):
                self.records[slot].count_catch_up(name, length, late, late * each)
            self.backlog_max = max(self.backlog_max, *lens)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the wall time of the block to `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start

    @contextmanager
    def timed_round(self) -> Iterator[None]:
        """Add the wall time of the block to `round`, and the time since the previous round to `between`."""
        if self.round_ended is not None:
            self.seconds["between"] += time.perf_counter() - self.round_ended
        with self.timed("round"):
            yield
        self.round_ended = time.perf_counter()

    def snapshot(self) -> dict[str, Any]:
        """Totals as plain data. `rounds` count rows, `steps` count batches, `seconds` are by step."""
        parts = (self.ended, *(record.counts for record in self.records.values()))
        counts = summed((item for part in parts for item in part.items()), *WHOLE_KEY).items()
        return {
            **figures(counts, self.backlog_max),
            "by_context": nested(counts, CONTEXT_KIND),
            "by_context_span": nested(counts, CONTEXT_KIND, SPAN),
            "steps": self.steps,
            "seconds": {step: round(seconds, 6) for step, seconds in self.seconds.items()},
            "failed_by_drafter": dict(self.health.failures),
            "switched_off": dict.fromkeys(self.health.tried_at, 1),
            "kv_pool": self.pool,
            "round_ms": {} if self.costs is None else self.costs.snapshot(),
            "round_costs": {} if self.costs is None else self.costs.health(),
            "not_drafted_share": round(self.not_drafted.share, 4),
            "prior_share": {} if self.prior_share is None else self.prior_share.snapshot(),
        }


class RequestFigures:
    """A request's figures as SGLang's per-token `customized_info`: empty until it has ended, then one element.

    SGLang slices this by the tokens it is about to send, last after the request has ended.
    """

    def __init__(self, totals: Totals, request: Any, asked: Asked):
        self.totals = totals
        self.request = request
        self.asked = asked
        self.trace = Trace() if asked.hints.trace else None

    def begin(self, sampled: int | None) -> None:
        """Start a record after a prefill, also after each chunk and after a retraction. `sampled`: as in `Record`."""
        totals, request = self.totals, self.request
        text = request.origin_input_ids, request.output_ids, sampled
        self.record = Record(totals.reader, totals.priors, self.asked, *text, self.trace)
        totals.begin(int(request.req_pool_idx), self.record)

    def __getitem__(self, tokens: slice) -> list[dict[str, Any]]:
        if not self.request.finished():
            return []
        # Every drafter keeps its own K and V for each of the request's KV slots.
        slots = dict.fromkeys(self.totals.drafter_names, int(self.request.kv_committed_len))
        return [{**self.record.figures(), "draft_kv_slots": slots}]
