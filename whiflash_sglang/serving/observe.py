"""Counters and timings of rounds, in total since startup and per request.

`Totals.snapshot()` is shown by `GET /server_info` under `internal_states[0].whiflash` and read by the replay.
`Totals.request(slot)` is a request's `meta_info["whiflash"]`. `Metrics` exports the totals to Prometheus, next to
SGLang's own metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from whiflash_sglang.core.health import Health
from whiflash_sglang.core.hints import Asked
from whiflash_sglang.core.spans import CONTEXT_KINDS, SPANS, Markers, SpanReader
from whiflash_sglang.core.types import CatchUp, HostRows, RoundResult
from whiflash_sglang.routing.costs import RoundCosts
from whiflash_sglang.routing.exploration import PriorShare
from whiflash_sglang.routing.priors import Priors
from whiflash_sglang.serving.ledger import NOBODY, Ledger, Signals, Trace

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

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
"""`commit` stores the features of the window for all drafters.

`read` is the single copy to the host per round or prefill. On an asynchronous device the host waits there, so `read`
contains the compute time of the steps before it, and those contain launch time only.

`spans` tracks spans and counts. Half of it is part of `round`, which ends before the counting.

`between` is the time from one round to the next without a prefill in between: our counting, and SGLang's work on
results, requests and the next batch. The device is idle during it.
"""


@dataclass
class DrafterCounts:
    """What one drafter did, for a request or in total. `ingested` and `missed` are tokens, as `CatchUp` has them."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    switches: int = 0
    ingested: int = 0
    ingestions: int = 0
    missed: int = 0
    catch_ups: int = 0
    catch_up_s: float = 0.0

    def count_rounds(self, rounds: int, drafted: int, accepted: int, switched: bool) -> None:
        """Add a request's round, or several without drafts (`RoundResult.steps`)."""
        self.rounds += rounds
        self.drafted += drafted
        self.accepted += accepted
        self.switches += switched

    def count_catch_up(self, ingested: int, missed: int, seconds: float) -> None:
        """Add a request's share of a pass, possibly of no tokens. `seconds`: those of its missed tokens."""
        self.ingested += ingested
        self.ingestions += 1
        self.missed += missed
        self.catch_ups += missed > 0
        self.catch_up_s += seconds


class NotDrafted:
    """The share of draftable rows that went without drafts, over about the last `ROWS` rows.

    A cost-aware router skips drafting where it does not pay off. If that is nearly always, a warning is due: the
    drafters do not fit the text, or the costs are wrong.
    """

    ROWS, MUCH, EVERY_S = 1024, 0.9, 600.0

    def __init__(self) -> None:
        self.share = 0.0
        self.rows = 0
        self.next_warning = 0.0

    def count(self, num_rows: int, num_drafted: int) -> None:
        """Count a round with `num_rows` draftable rows."""
        if num_rows:
            self.rows += num_rows
            weight = min(1.0, num_rows / min(self.ROWS, self.rows))
            self.share += weight * (1 - num_drafted / num_rows - self.share)

    def is_due(self) -> bool:
        """Whether to warn now. True at most once per `EVERY_S` seconds."""
        if self.share < self.MUCH or self.rows < self.ROWS or time.monotonic() < self.next_warning:
            return False
        self.next_warning = time.monotonic() + self.EVERY_S
        return True

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the last {self.ROWS} rows were not drafted for: too few drafts of this text are "
            "accepted to pay for their time. See GET /whiflash/stats for acceptance by span and expected round costs "
            "(round_ms)"
        )


Counts = dict[str, DrafterCounts]
"""By drafter, and for rounds without one."""


class Totals:
    """Counters per running request and in total, and the time spent in each step of a round.

    Plain Python on the host, which is faster than tensors for a few dozen rows.
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
        self.round_ended: float | None = None  # time.perf_counter(), if the last step was a round
        self.health = Health()  # of the round's drafters
        self.pool: dict[str, int] = {}  # KV tokens; each has an entry in the pools of the target and every drafter
        self.costs: RoundCosts | None = None  # of a cost-aware router
        self.prior_share: PriorShare | None = None  # of a router with priors
        self.not_drafted = NotDrafted()
        self.sums = self._blank()  # over all requests
        self.running = [self._blank() for _ in range(num_slots)]  # by request slot, of its latest request
        self.longest = [0] * num_slots  # longest backlog at a catch-up, in tokens
        self.longest_ever = 0
        self.last_choice: list[str | None] = [None] * num_slots

    def start(self, slots: Sequence[int]) -> None:
        """Reset the slots of newly prefilled requests."""
        self.round_ended = None
        for slot in slots:
            self.running[slot] = self._blank()
            self.last_choice[slot] = None
            self.longest[slot] = 0

    def count(self, rows: HostRows, result: RoundResult, signals: Signals) -> None:
        """Add one batch's round."""
        with self.timed("spans"):
            self.ledger.count(rows, result, signals)
        for row, slot in enumerate(rows.slots):
            name, last = result.plan[row] or NOBODY, self.last_choice[slot]
            accepted = len(result.committed[row]) - result.steps
            for counts in (self.sums, self.running[slot]):
                counts[name].count_rounds(result.steps, result.num_drafts[row], accepted, last not in (None, name))
            self.last_choice[slot] = name
        num_drafted = sum(name is not None for name in result.plan)
        self.not_drafted.count(result.steps * len(rows.may_draft()), num_drafted)
        self.steps += result.steps
        self.count_catch_ups(result.catch_ups)

    def count_catch_ups(self, catch_ups: Mapping[str, CatchUp]) -> None:
        """Add catch-up passes. A pass's time is divided among its requests by tokens."""
        for name, (slots, lens, missed, seconds) in catch_ups.items():
            each = seconds / sum(lens)
            for slot, length, late in zip(slots, lens, missed, strict=True):
                for counts in (self.sums, self.running[slot]):
                    counts[name].count_catch_up(length, late, late * each)
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
        """Add the wall time of the block to `round`, and the time since the previous round to `between`."""
        if self.round_ended is not None:
            self.seconds["between"] += time.perf_counter() - self.round_ended
        with self.timed("round"):
            yield
        self.round_ended = time.perf_counter()

    def snapshot(self) -> dict[str, Any]:
        """Totals as plain data. `rounds` count rows, `steps` count batches, `seconds` are by step."""
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

    def _blank(self) -> Counts:
        return {name: DrafterCounts() for name in self.names}

    def _figures(self, counts: Counts, longest: int) -> dict[str, Any]:
        """`counts` as plain data.

        An active drafter ingests the last round's tokens in every round. `catch_up` counts only what an idle drafter
        had missed before that, with one pass per request. `backlog_mean` covers both.
        """

        def by_drafter(field: str) -> dict[str, int]:
            return {name: count for name, of in counts.items() if (count := getattr(of, field))}

        total = DrafterCounts(*(sum(column) for column in zip(*map(astuple, counts.values()), strict=True)))
        return {
            "rounds": total.rounds,
            "rounds_by_drafter": by_drafter("rounds"),
            "drafted": total.drafted,
            "drafted_by_drafter": by_drafter("drafted"),
            "accepted_drafts": total.accepted,
            "accepted_by_drafter": by_drafter("accepted"),
            "switches": total.switches,
            "ingested_by_drafter": by_drafter("ingested"),
            "catch_up": {
                "passes": total.catch_ups,
                "tokens": total.missed,
                "ms": round(1000 * total.catch_up_s, 3),
            },
            "backlog_max": longest,
            "backlog_mean": round(total.ingested / total.ingestions, 3) if total.ingestions else 0.0,
        }


class RequestFigures:
    """A request's figures as SGLang's per-token `customized_info`: empty until it has ended, then one element.

    SGLang slices this by the tokens it is about to send, last after the request has ended.
    """

    def __init__(self, totals: Totals, request: Req, asked: Asked):
        self.totals = totals
        self.request = request
        self.asked = asked
        self.trace = Trace() if asked.hints.trace else None

    def begin(self, sampled: int | None) -> None:
        """Start recording after a prefill, also after each chunk and after a retraction. `sampled` is None for all but
        the last chunk."""
        ledger, request = self.totals.ledger, self.request
        self.slot = int(request.req_pool_idx)
        self.record = ledger.record(*self.asked, request.origin_input_ids, request.output_ids, sampled, self.trace)
        ledger.begin(self.slot, self.record)

    def __getitem__(self, tokens: slice) -> list[dict[str, Any]]:
        # The slot is already released, but its figures stay until its next request's prefill.
        if not self.request.finished():
            return []
        names = self.totals.names[:-1]
        # Every drafter keeps its own K and V for each of the request's KV slots.
        slots = {"draft_kv_slots": dict.fromkeys(names, int(self.request.kv_committed_len))}
        return [self.totals.request(self.slot) | slots | self.record.figures()]


class Metrics:
    """The totals as Prometheus metrics `whiflash_*`, shown by SGLang's `/metrics`."""

    INTERVAL_S = 1.0

    def __init__(self, totals: Totals, labels: Mapping[str, str]):
        # Lazy: SGLang must first set the folder for multi-process metrics.
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
            "failed_drafts": ("Request rounds with NaN or infinity in the drafts.", "drafter"),
            "catch_up_tokens": ("Ingested tokens that an idle drafter had missed.", None),
            "catch_up_passes": ("Catch-ups of a drafter with a request.", None),
            "catch_up_seconds": ("Wall time of catch-up passes.", None),
            "switches": ("Request rounds whose drafter differs from the round before.", None),
            "step_seconds": ("Wall time by step of a round, including prefill steps.", "step"),
            "span_rounds": ("Decode rounds of requests by the span in which they began.", "span"),
            "span_tokens": ("Tokens committed by these rounds.", "span"),
            "context_rounds": (
                "Decode rounds of requests by what their prompts end with.",
                "context_kind",
            ),
            "context_tokens": ("Tokens committed by these rounds.", "context_kind"),
        }
        self.counters = {
            key: Counter(f"whiflash_{key}", text, [*names, *([label] if label else [])])
            for key, (text, label) in counters.items()
        }
        self.longest = Gauge("whiflash_backlog_max_tokens", "Longest backlog of a drafter at a catch-up.", names)
        self.pool = Gauge(
            "whiflash_kv_pool_tokens", "KV tokens in the pool, and lost to draft pools.", [*names, "kind"]
        )
        self.not_drafted = Gauge(
            "whiflash_not_drafted_share", "Share of recent rows for which drafting did not pay off.", names
        )
        self.wrong = Gauge(
            "whiflash_round_costs_wrong",
            "Rounds that took twice or half the time measured at startup.",
            names,
        )
        self.off = Gauge(
            "whiflash_drafter_switched_off",
            "1 if the drafter is switched off after producing NaN for several requests.",
            [*names, "drafter"],
        )
        # Create every series at startup: a series that appears with its first count would lose that count in rates.
        known = {"drafter": totals.names, "step": STEPS, "span": SPANS, "context_kind": CONTEXT_KINDS, None: [None]}
        for key, (_, label) in counters.items():
            for value in known[label]:
                self.counters[key].labels(*labels.values(), *([value] if value else []))
        self.write(totals.snapshot())

    def update(self, at_once: bool = False) -> None:
        """Update the metrics, at most once per `INTERVAL_S`, or `at_once` if no round may follow."""
        now = time.monotonic()
        if now < self.next_update and not at_once:
            return
        self.next_update = now + self.INTERVAL_S
        self.write(self.totals.snapshot())

    def write(self, figures: Mapping[str, Any]) -> None:
        """Set the metrics to `Totals.snapshot()` figures."""
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
