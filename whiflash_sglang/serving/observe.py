"""What rounds did and what they cost, counted as they happen: in total since the server started, and by request.

`Totals.snapshot()` is what `GET /server_info` shows under `internal_states[0].whiflash`, and what the replay reads;
`Totals.request(slot)` is what a request's `meta_info["whiflash"]` shows. `Metrics` puts the totals beside SGLang's own
Prometheus metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from whiflash_sglang.core.health import Health
from whiflash_sglang.core.hints import Asked
from whiflash_sglang.core.plans import drafter_by_row
from whiflash_sglang.core.spans import CONTEXT_KINDS, SPANS, Markers, SpanReader
from whiflash_sglang.core.types import CatchUp, HostRows, RoundResult
from whiflash_sglang.routing.costs import RoundCosts
from whiflash_sglang.routing.exploration import PriorShare
from whiflash_sglang.routing.priors import Priors
from whiflash_sglang.serving.ledger import NOBODY, Ledger, Signals, Trace

STEPS = (
    "prefill",
    "prefill_drafters",
    "route",
    "catch_up",
    "draft",
    "verify",
    "commit",
    "read",
    "spans",
    "round",
    "between",
)
"""`commit` keeps the features of the window for all drafters.

`read` is the round's one copy to the host, and a prefill's. On a device that runs asynchronously it is where the host
waits: the time of all steps before stands there, and what stands at these is launch time.

`spans` follows the texts and counts by span. Half of it stands within `round`, which ends before the counting.

`between` is from the end of a round to the beginning of the next, where no prefill came between: our counting, and
SGLang's own work on results, requests and the next batch. A device has nothing to do meanwhile.
"""

FIELDS = 9
ROUNDS, DRAFTED, ACCEPTED, SWITCHES, INGESTED, INGESTIONS, MISSED, CATCH_UPS, CATCH_UP_S = range(FIELDS)


class NotDrafted:
    """The share of rows that could have been drafted for and were not, over about the last `ROWS`.

    A router that weighs costs leaves drafts out where they do not pay. It is worth a warning where that is nearly
    always so: the drafters do not know the text, or the costs are wrong.
    """

    ROWS, MUCH, EVERY_S = 1024, 0.9, 600.0

    def __init__(self) -> None:
        self.share = 0.0
        self.rows = 0
        self.next_warning = 0.0

    def count(self, num_rows: int, num_drafted: int) -> None:
        """A round in which `num_rows` rows could have been drafted for."""
        if num_rows:
            self.rows += num_rows
            weight = min(1.0, num_rows / min(self.ROWS, self.rows))
            self.share += weight * (1 - num_drafted / num_rows - self.share)

    def is_due(self) -> bool:
        """Whether a warning is, which is then counted as given."""
        if self.share < self.MUCH or self.rows < self.ROWS or time.monotonic() < self.next_warning:
            return False
        self.next_warning = time.monotonic() + self.EVERY_S
        return True

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the last {self.ROWS} rows were not drafted for: drafts of this text are not accepted "
            "often enough to pay for their time. GET /whiflash/stats shows acceptance by span, and what rounds are "
            "expected to cost (round_ms)"
        )


Table = list[list[float]]
"""[names][FIELDS]."""


class Totals:
    """Counters of each running request and of all that have been, and the time spent in each step of a round.

    Everything is on the host and in plain Python: for some tens of rows this is quicker than tensors.
    """

    def __init__(
        self,
        drafter_names: tuple[str, ...],
        num_slots: int,
        reader: SpanReader | None = None,
        priors: Priors | None = None,
    ):
        self.names = (*drafter_names, NOBODY)
        self.ledger = Ledger(SpanReader(Markers(), {}) if reader is None else reader, priors)
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.steps = 0
        self.round_ended: float | None = None  # when the last step did, if it was a round
        self.health = Health()  # of the round's drafters
        self.pool: dict[str, int] = {}  # KV tokens; each stands in the target's pool and in that of every drafter
        self.costs: RoundCosts | None = None  # of a router that weighs them
        self.prior_share: PriorShare | None = None  # of a router with priors
        self.not_drafted = NotDrafted()
        self.sums = self._blank()  # of all requests that have been
        self.running = [self._blank() for _ in range(num_slots)]  # by request slot, of its newest request
        self.longest = [0] * num_slots  # backlog that a drafter found waiting
        self.longest_ever = 0
        self.last_choice: list[str | None] = [None] * num_slots

    def start(self, slots: Sequence[int]) -> None:
        """A request begins in each of these slots, or goes on with its prompt: it has had no round."""
        self.round_ended = None
        for slot in slots:
            self.running[slot] = self._blank()
            self.last_choice[slot] = None
            self.longest[slot] = 0

    def count(self, rows: HostRows, result: RoundResult, signals: Signals) -> None:
        """Add one batch's round."""
        with self.timed("spans"):
            self.ledger.count(rows, result, signals)
        chosen = drafter_by_row(result.plan)
        for row, slot in enumerate(rows.slots):
            name, last = chosen.get(row, NOBODY), self.last_choice[slot]
            accepted = len(result.committed[row]) - 1
            self._add(slot, name, ROUNDS, (1, result.num_drafts[row], accepted, last not in (None, name)))
            self.last_choice[slot] = name
        self.not_drafted.count(len(rows.may_draft()), len(chosen))
        self.steps += 1
        self.count_catch_ups(result.catch_ups)

    def count_catch_ups(self, catch_ups: Mapping[str, CatchUp]) -> None:
        """Add passes that brought drafters up to date; a pass's time is shared by the tokens of its requests."""
        for name, (slots, lens, missed, seconds) in catch_ups.items():
            each = seconds / sum(lens)
            for slot, length, late in zip(slots, lens, missed, strict=True):
                self._add(slot, name, INGESTED, (length, 1, late, late > 0, late * each))
                self.longest[slot] = max(self.longest[slot], length)
            self.longest_ever = max(self.longest_ever, *lens)

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
        """Add the wall time of the block to `round`, and what has passed since the round before to `between`."""
        if self.round_ended is not None:
            self.seconds["between"] += time.perf_counter() - self.round_ended
        with self.timed("round"):
            yield
        self.round_ended = time.perf_counter()

    def snapshot(self) -> dict[str, Any]:
        """Totals as plain data: counts of rows, `seconds` by step, `steps` = rounds of whole batches."""
        return {
            **self._figures(self.sums, self.longest_ever),
            "steps": self.steps,
            "seconds": {step: round(seconds, 6) for step, seconds in self.seconds.items()},
            "failed_by_drafter": dict(self.health.failures),
            "switched_off": dict.fromkeys(self.health.tried_at, 1),
            "kv_pool": self.pool,
            "round_ms": {} if self.costs is None else self.costs.snapshot(),
            "round_costs": {} if self.costs is None else self.costs.health(),
            "not_drafted_share": round(self.not_drafted.share, 4),
            "prior_share": {} if self.prior_share is None else self.prior_share.snapshot(),
            **self.ledger.snapshot(),
        }

    def request(self, slot: int) -> dict[str, Any]:
        """The figures of the request in `slot` since its prefill, as plain data."""
        return self._figures(self.running[slot], self.longest[slot])

    def _blank(self) -> Table:
        return [[0] * FIELDS for _ in self.names]

    def _add(self, slot: int, name: str, first: int, figures: Sequence[float]) -> None:
        """Add `figures` to the fields from `first` on, of the request in `slot` and of all."""
        drafter = self.names.index(name)
        for table in (self.sums, self.running[slot]):
            counts = table[drafter]
            for field, figure in enumerate(figures, start=first):
                counts[field] += figure

    def _figures(self, table: Table, longest: int) -> dict[str, Any]:
        """Plain data of `table`.

        A drafter that goes on ingests the last round's tokens. `catch_up` counts only what an idle one had missed
        before, a pass for each request. `backlog_mean` is of what a drafter found waiting, either way.
        """

        def by_drafter(field: int) -> dict[str, int]:
            return {name: int(row[field]) for name, row in zip(self.names, table, strict=True) if row[field]}

        sums = [sum(column) for column in zip(*table, strict=True)]
        return {
            "rounds": int(sums[ROUNDS]),
            "rounds_by_drafter": by_drafter(ROUNDS),
            "drafted": int(sums[DRAFTED]),
            "drafted_by_drafter": by_drafter(DRAFTED),
            "accepted_drafts": int(sums[ACCEPTED]),
            "accepted_by_drafter": by_drafter(ACCEPTED),
            "switches": int(sums[SWITCHES]),
            "ingested_by_drafter": by_drafter(INGESTED),
            "catch_up": {
                "passes": int(sums[CATCH_UPS]),
                "tokens": int(sums[MISSED]),
                "ms": round(1000 * sums[CATCH_UP_S], 3),
            },
            "backlog_max": longest,
            "backlog_mean": round(sums[INGESTED] / sums[INGESTIONS], 3) if sums[INGESTIONS] else 0.0,
        }


class RequestFigures:
    """A request's figures as SGLang's per-token `customized_info`: nothing until it has ended, then one element.

    SGLang slices this by the tokens that it is about to send, the last time when the request has ended.
    """

    def __init__(self, totals: Totals, request: Any, asked: Asked):
        self.totals = totals
        self.request = request
        self.asked = asked
        self.trace = Trace() if asked.hints.trace else None

    def begin(self, sampled: int | None) -> None:
        """The request is prefilled, with a chunk of its prompt (nothing is `sampled`) or the last of it; after a
        retraction once more."""
        ledger, request = self.totals.ledger, self.request
        self.slot = int(request.req_pool_idx)
        self.record = ledger.record(*self.asked, request.origin_input_ids, request.output_ids, sampled, self.trace)
        ledger.begin(self.slot, self.record)

    def __getitem__(self, tokens: slice) -> list[dict[str, Any]]:
        # The slot has been given back by then, but its figures stand until its next request's prefill.
        if not self.request.finished():
            return []
        names = self.totals.names[:-1]
        # Every drafter keeps its own K and V for each of the request's KV slots.
        slots = {"draft_kv_slots": dict.fromkeys(names, int(self.request.kv_committed_len))}
        return [self.totals.request(self.slot) | slots | self.record.figures()]


class Metrics:
    """The totals as Prometheus metrics `whiflash_*`, which `/metrics` shows beside SGLang's own."""

    INTERVAL_S = 1.0

    def __init__(self, totals: Totals, labels: Mapping[str, str]):
        # Imported late: SGLang has to set the folder for metrics of several processes first.
        from prometheus_client import Counter, Gauge

        self.totals = totals
        self.labels = dict(labels)
        self.shown: dict[tuple[str, str], float] = {}
        self.next_update = 0.0
        names = [*labels]
        counters = {
            "rounds": ("Decode rounds of requests.", "drafter"),
            "drafted_tokens": ("Draft tokens proposed.", "drafter"),
            "accepted_tokens": ("Draft tokens accepted.", "drafter"),
            "ingested_tokens": ("Tokens ingested by a drafter while decoding.", "drafter"),
            "failed_drafts": ("Rounds of a request whose drafts held NaN or infinities.", "drafter"),
            "catch_up_tokens": ("Those of them that it had missed while it was idle.", None),
            "catch_up_passes": ("Times that a drafter caught up with a request.", None),
            "catch_up_seconds": ("Wall time of catching up.", None),
            "switches": ("Rounds of a request with another drafter than the one before.", None),
            "step_seconds": ("Wall time by step of a round; prefill steps too.", "step"),
            "span_rounds": ("Decode rounds of requests by the span in which they began.", "span"),
            "span_tokens": ("Tokens committed by these rounds.", "span"),
            "context_rounds": ("Decode rounds of requests by what their prompts ended with.", "context_kind"),
            "context_tokens": ("Tokens committed by these rounds.", "context_kind"),
        }
        self.counters = {
            key: Counter(f"whiflash_{key}", text, [*names, *([label] if label else [])])
            for key, (text, label) in counters.items()
        }
        self.longest = Gauge("whiflash_backlog_max_tokens", "Longest backlog that a drafter found waiting.", names)
        self.pool = Gauge(
            "whiflash_kv_pool_tokens", "KV tokens of the pool, and lost to draft pools.", [*names, "kind"]
        )
        self.not_drafted = Gauge(
            "whiflash_not_drafted_share", "Share of the last rows that went without drafts as these did not pay.", names
        )
        self.wrong = Gauge(
            "whiflash_round_costs_wrong", "Times that a round took twice or half of what the start had measured.", names
        )
        self.off = Gauge(
            "whiflash_drafter_switched_off",
            "1: produced NaN for several requests and is not used.",
            [*names, "drafter"],
        )
        # Every series is there from the start: a rate over one that comes with its first count lacks that count.
        known = {"drafter": totals.names, "step": STEPS, "span": SPANS, "context_kind": CONTEXT_KINDS, None: [None]}
        for key, (_, label) in counters.items():
            for value in known[label]:
                self.counters[key].labels(*labels.values(), *([value] if value else []))
        self.write(totals.snapshot())

    def update(self, at_once: bool = False) -> None:
        """Bring the metrics up to the totals: at most once in a while, and `at_once` where no round may follow."""
        now = time.monotonic()
        if now < self.next_update and not at_once:
            return
        self.next_update = now + self.INTERVAL_S
        self.write(self.totals.snapshot())

    def write(self, figures: Mapping[str, Any]) -> None:
        by_label = {
            "rounds": figures["rounds_by_drafter"],
            "drafted_tokens": figures["drafted_by_drafter"],
            "accepted_tokens": figures["accepted_by_drafter"],
            "ingested_tokens": figures["ingested_by_drafter"],
            "failed_drafts": figures["failed_by_drafter"],
            "catch_up_tokens": {"": figures["catch_up"]["tokens"]},
            "catch_up_passes": {"": figures["catch_up"]["passes"]},
            "catch_up_seconds": {"": figures["catch_up"]["ms"] / 1000},
            "switches": {"": figures["switches"]},
            "step_seconds": figures["seconds"],
            "span_rounds": {span: count["rounds"] for span, count in figures["by_span"].items()},
            "span_tokens": {span: count["tokens"] for span, count in figures["by_span"].items()},
            "context_rounds": {kind: count["rounds"] for kind, count in figures["by_context"].items()},
            "context_tokens": {kind: count["tokens"] for kind, count in figures["by_context"].items()},
        }
        for key, values in by_label.items():
            for label, value in values.items():
                own = [label] if label else []
                counter = self.counters[key].labels(*self.labels.values(), *own)
                counter.inc(value - self.shown.get((key, label), 0))
                self.shown[key, label] = value
        self.longest.labels(*self.labels.values()).set(figures["backlog_max"])
        for kind, tokens in figures["kv_pool"].items():
            self.pool.labels(*self.labels.values(), kind).set(tokens)
        self.not_drafted.labels(*self.labels.values()).set(figures["not_drafted_share"])
        self.wrong.labels(*self.labels.values()).set(figures["round_costs"].get("wrong", 0))
        for name in self.totals.names[:-1]:
            self.off.labels(*self.labels.values(), name).set(figures["switched_off"].get(name, 0))
