"""What the server knows of each running request beside its tokens, by request slot, and what its rounds came to.

    ledger.begin(slot, record)              a request's prompt is prefilled: its context, its hints, its span
    rows = ledger.stand(rows)               before a round: every row with its `Standing`
    ledger.count(rows, result, signals)     after it: spans move on, rounds and tokens are counted

A round counts for the span in which it began, all of its tokens with it: that is what a router knows when it chooses,
and so tokens / rounds of a span is the acceptance length that the choice led to there.

Everything is on the host and in plain Python: for some tens of rows this is quicker than tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from whiflash_sglang.core.hints import OFF, Hints
from whiflash_sglang.core.plans import drafter_by_row
from whiflash_sglang.core.spans import ANSWER, Context, Place, SpanReader
from whiflash_sglang.core.types import HostRows, RoundResult, Standing
from whiflash_sglang.routing.priors import Priors

NOBODY = "none"  # a row that was not drafted for
MAX_TRACED_ROUNDS = 1024  # of a request; what comes later is counted only

Counts = dict[tuple[str, ...], list[int]]
"""Key -> [rounds, tokens]."""
Signals = Mapping[str, Sequence[float]]
"""What a router decided by, by kind (`entropy` in nats, `score` in AL): a number for each row."""


@runtime_checkable
class Explains(Protocol):
    """A router that can say what it will decide by."""

    def signals(self, slots: Sequence[int]) -> Signals:
        """By kind: a number for each of the request slots, [rows]."""
        ...


class Trace:
    """Every round of one request, as token ids."""

    def __init__(self) -> None:
        self.first: int | None = None  # what the prefill gave
        self.rounds: list[dict[str, Any]] = []
        self.left_out = 0

    def begin(self, token: int, span: str) -> None:
        """A prefill gave `token`; after a retraction it goes on where the text stood."""
        if self.first is None:
            self.first = token
        else:
            self.add({"drafter": NOBODY, "drafts": [], "accepted": 0, "tokens": [token], "span": span}, {}, 0)

    def add(self, entry: dict[str, Any], signals: Signals, row: int) -> None:
        if len(self.rounds) >= MAX_TRACED_ROUNDS:
            self.left_out += 1
            return
        for kind in ("entropy", "score"):
            entry[kind] = signals[kind][row] if kind in signals else None
        self.rounds.append(entry)

    def figures(self) -> dict[str, Any]:
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
        """The text has grown, up to `place`."""
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
    """Records of running requests, and the sums of all requests that have been."""

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
        """A request whose text so far is `prompt` and `output`, and the token `sampled` by its prefill.

        `output`: what it had when it was retracted. None is sampled while chunks of the prompt are still to come, and
        nothing is read then: the last chunk's call reads all of it.
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
        self.records[slot] = record

    def stand(self, rows: HostRows) -> HostRows:
        """The rows with where each request stands. Those that want no drafts may not be drafted for."""
        standings = [self.records[slot].standing for slot in rows.slots]
        draftable = rows.draftable
        if any(standing.route == OFF for standing in standings):
            may_draft = set(rows.may_draft())
            draftable = [standing.route != OFF and row in may_draft for row, standing in enumerate(standings)]
        return rows._replace(standings=standings, draftable=draftable)

    def signals(self, rows: HostRows, router: object) -> Signals:
        """What the router will decide by; nothing where no request of the batch is traced."""
        traced = any(self.records[slot].trace is not None for slot in rows.slots)
        return router.signals(rows.slots) if traced and isinstance(router, Explains) else {}

    def count(self, rows: HostRows, result: RoundResult, signals: Signals) -> None:
        """A round has been: texts grow, and their rounds are counted where they began."""
        names = drafter_by_row(result.plan)
        for row, (slot, committed) in enumerate(zip(rows.slots, result.committed, strict=True)):
            record, drafter = self.records[slot], names.get(row, NOBODY)
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
                if added and "score" in signals:  # a score in nats has no use for it
                    entry["prior"] = round(added, 4)
                record.trace.add(entry, signals, row)
            place = self.reader.follow(record.place, committed)
            if place.span == standing.span:
                record.place = place
            else:
                record.move(place)

    def snapshot(self) -> dict[str, Any]:
        """Sums as plain data: numbers, and dicts of them."""
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
    """By the first part of the key."""
    sums: Counts = {}
    for (first, *_), (rounds, tokens) in counts.items():
        _add(sums, (first,), tokens, rounds)
    return {first: _figures(count) for (first,), count in sums.items()}


def _nested(counts: Counts) -> dict[str, dict[str, dict[str, int]]]:
    """By the first part of the key, then by the second."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    for (first, second), count in counts.items():
        result.setdefault(first, {})[second] = _figures(count)
    return result
