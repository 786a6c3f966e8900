"""Per-request records (span, context, hints, trace) by request slot, and round counts by span and context.

    ledger.begin(slot, record)              after a request's prefill
    rows = ledger.stand(rows)               before a round: adds each row's `Standing`
    ledger.count(rows, result, signals)     after a round: updates spans, counts rounds and tokens

A round, with all its tokens, counts for the span in which it began, because that is what the router knows when it
chooses. Tokens / rounds of a span is therefore the acceptance length of that choice.

Plain Python on the host, which is faster than tensors for a few dozen rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from whiflash_sglang.core.hints import OFF, Hints
from whiflash_sglang.core.spans import ANSWER, Context, Place, SpanReader
from whiflash_sglang.core.types import HostRows, RoundResult, Standing
from whiflash_sglang.routing.priors import Priors

NOBODY = "none"  # a row that was not drafted for
MAX_TRACED_ROUNDS = 1024  # per request; later rounds are only counted

Counts = dict[tuple[str, ...], list[int]]
"""Key -> [rounds, tokens]."""
Signals = Mapping[str, Sequence[float]]
"""The router's inputs by kind (`entropy` in nats, `score` in AL), one number per row."""


@runtime_checkable
class Explains(Protocol):
    """A router that can report its inputs."""

    def signals(self, slots: Sequence[int]) -> Signals:
        """Kind -> one number per request slot, [rows]."""
        ...


class Trace:
    """Every round of one request, as token ids."""

    def __init__(self) -> None:
        self.first: int | None = None  # token sampled by the prefill
        self.rounds: list[dict[str, Any]] = []
        self.left_out = 0

    def begin(self, token: int, span: str) -> None:
        """Record the token that a prefill sampled. After a retraction it is added as a round without drafts."""
        if self.first is None:
            self.first = token
        else:
            self.add({"drafter": NOBODY, "drafts": [], "accepted": 0, "tokens": [token], "span": span}, {}, 0)

    def add(self, entry: dict[str, Any], signals: Signals, row: int) -> None:
        """Append a round with the signals of `row`, up to `MAX_TRACED_ROUNDS`."""
        if len(self.rounds) >= MAX_TRACED_ROUNDS:
            self.left_out += 1
            return
        for kind in ("entropy", "score"):
            entry[kind] = signals[kind][row] if kind in signals else None
        self.rounds.append(entry)

    def figures(self) -> dict[str, Any]:
        """The trace as plain data."""
        return {"first": self.first, "trace": self.rounds, "trace_rounds_left_out": self.left_out}


class Record:
    """One request since its last prefill."""

    def __init__(self, hints: Hints, context: Context, place: Place, trace: Trace | None, priors: Priors | None = None):
        self.hints = hints
        self.priors = priors
        self.context = context
        self.trace = trace
        self.counts: Counts = {}  # by span and drafter
        self.move(place)

    def move(self, place: Place) -> None:
        """Update the standing after the text has grown up to `place`."""
        self.place = place
        hints, kind, tool = self.hints, self.context.kind, self.hints.tool or self.context.tool
        prior = 0.0 if self.priors is None else self.priors.bias(kind, place.span, tool)
        self.standing = Standing(place.span, kind, tool, hints.prior, hints.route, prior)

    def figures(self) -> dict[str, Any]:
        """Plain data for the request's `meta_info`."""
        return {
            "by_span": _summed(self.counts),
            "by_span_drafter": _nested(self.counts),
            "context_kind": self.standing.context_kind,
            "tool": self.standing.tool,
            "hints": self.hints.given(),
            **({} if self.trace is None else self.trace.figures()),
        }


class Ledger:
    """Records of running requests, and counts over all requests since startup."""

    def __init__(self, reader: SpanReader, priors: Priors | None = None):
        self.reader = reader
        self.priors = priors  # of the router's score
        self.records: dict[int, Record] = {}  # by request slot; stays until the slot's next request
        self.counts: Counts = {}  # by context kind, span and drafter

    def record(
        self,
        hints: Hints,
        context: Context | None,
        prompt: Sequence[int],
        output: Sequence[int],
        sampled: int | None,
        trace: Trace | None,
    ) -> Record:
        """Create the record of a prefilled request from its token ids.

        `output` is non-empty after a retraction. `sampled` is None for all but the last chunk of a chunked prefill;
        the text is read only then.
        """
        if sampled is None:
            return Record(hints, context or Context(), Place(hints.span or ANSWER, ""), trace, self.priors)
        place = self.reader.begin(prompt)
        if hints.span is not None:
            place = Place(hints.span, place.tail)
        place = self.reader.follow(place, output)
        if trace is not None:
            trace.begin(sampled, place.span)
        place = self.reader.follow(place, [sampled])
        known = self.reader.context(prompt) if context is None else context
        return Record(hints, known, place, trace, self.priors)

    def begin(self, slot: int, record: Record) -> None:
        """Store a request's record in its slot."""
        self.records[slot] = record

    def stand(self, rows: HostRows) -> HostRows:
        """Return the rows with their standings. Requests with the hint `route=off` are not draftable."""
        standings = [self.records[slot].standing for slot in rows.slots]
        draftable = rows.draftable
        if any(standing.route == OFF for standing in standings):
            may_draft = set(rows.may_draft())
            draftable = [standing.route != OFF and row in may_draft for row, standing in enumerate(standings)]
        return rows._replace(standings=standings, draftable=draftable)

    def signals(self, rows: HostRows, router: object) -> Signals:
        """The router's inputs; empty if no request of the batch is traced."""
        traced = any(self.records[slot].trace is not None for slot in rows.slots)
        return router.signals(rows.slots) if traced and isinstance(router, Explains) else {}

    def count(self, rows: HostRows, result: RoundResult, signals: Signals) -> None:
        """Count a round for the span in which it began, and move spans forward.

        Several steps without drafts count as a round each.
        """
        for row, tokens in enumerate(result.committed):
            if result.steps == 1:
                self.count_row(rows, row, result, tokens, signals)
            else:
                for step, token in enumerate(tokens):
                    self.count_row(rows, row, result, [token], {} if step else signals)

    def count_row(
        self, rows: HostRows, row: int, result: RoundResult, committed: Sequence[int], signals: Signals
    ) -> None:
        """Count a row's round that committed these tokens."""
        record, drafter = self.records[rows.slots[row]], result.plan[row] or NOBODY
        standing = record.standing
        _add(record.counts, (standing.span, drafter), len(committed))
        _add(self.counts, (standing.context_kind, standing.span, drafter), len(committed))
        if record.trace is not None:
            entry = {
                "drafter": drafter,
                "drafts": result.window[row, 1 : 1 + result.num_drafts[row]].tolist(),
                "accepted": len(committed) - 1,
                "tokens": committed,
                "span": standing.span,
            }
            added = standing.prior + standing.asked_prior
            if added and "score" in signals:  # entropy thresholds in nats do not use priors
                entry["prior"] = round(added, 4)
            record.trace.add(entry, signals, row)
        place = self.reader.follow(record.place, committed)
        if place.span == standing.span:
            record.place = place
        else:
            record.move(place)

    def snapshot(self) -> dict[str, Any]:
        """Counts as nested dicts of numbers."""
        by_span: Counts = {}
        by_context: Counts = {}
        for (kind, span, drafter), (rounds, tokens) in self.counts.items():
            _add(by_span, (span, drafter), tokens, rounds)
            _add(by_context, (kind, span), tokens, rounds)
        return {
            "by_span": _summed(by_span),
            "by_span_drafter": _nested(by_span),
            "by_context": _summed(by_context),
            "by_context_span": _nested(by_context),
        }


def _add(counts: Counts, key: tuple[str, ...], tokens: int, rounds: int = 1) -> None:
    count = counts.setdefault(key, [0, 0])
    count[0] += rounds
    count[1] += tokens


def _figures(count: Iterable[int]) -> dict[str, int]:
    rounds, tokens = count
    return {"rounds": rounds, "tokens": tokens}


def _summed(counts: Counts) -> dict[str, dict[str, int]]:
    """Sum by the first part of the key."""
    sums: Counts = {}
    for (first, *_), (rounds, tokens) in counts.items():
        _add(sums, (first,), tokens, rounds)
    return {first: _figures(count) for (first,), count in sums.items()}


def _nested(counts: Counts) -> dict[str, dict[str, dict[str, int]]]:
    """Nest by the first, then the second part of the key."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    for (first, second), count in counts.items():
        result.setdefault(first, {})[second] = _figures(count)
    return result
