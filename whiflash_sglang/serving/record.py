"""The record of one request: its row state, and counts of its rounds and catch-ups.

A round, with all its tokens, counts for the span in which it began, because that is what the router knows when it
chooses. Tokens / rounds of a span is therefore the acceptance length of that choice.

Plain Python on the host, which is faster than tensors for a few dozen rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import add, attrgetter
from typing import Any

from whiflash_sglang.core.hints import Asked
from whiflash_sglang.core.spans import ANSWER, Context, Place, SpanReader
from whiflash_sglang.core.types import RowState
from whiflash_sglang.routing.priors import Priors
from whiflash_sglang.serving.trace import NOBODY, Trace

Key = tuple[str, ...]
CONTEXT_KIND, SPAN, DRAFTER = WHOLE_KEY = (0, 1, 2)


@dataclass(slots=True)
class Counts:
    """What a drafter did in a span. `ingested` and `missed` are tokens, as `CatchUp` has them.

    All are integers. A sum of floats depends on the order, so a total could fall when a request is moved into it.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    switches: int = 0
    ingested: int = 0
    ingestions: int = 0
    missed: int = 0
    catch_ups: int = 0
    catch_up_ns: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, _values(self), _values(other)))

    @property
    def accepted(self) -> int:
        return self.tokens - self.rounds


_values = attrgetter(*(field.name for field in fields(Counts)))


def summed(counts: Iterable[tuple[Key, Counts]], *parts: int) -> dict[Key, Counts]:
    """Sum by these parts of the keys."""
    sums: dict[Key, Counts] = {}
    for key, more in counts:
        group = tuple(key[part] for part in parts)
        sums[group] = sums.get(group, Counts()) + more
    return sums


def nested(counts: Iterable[tuple[Key, Counts]], *parts: int) -> dict[str, Any]:
    """Rounds and tokens by these parts of the keys, as nested dicts."""
    result: dict[str, Any] = {}
    for (*outer, last), of in summed(counts, *parts).items():
        if of.rounds:
            inner = result
            for name in outer:
                inner = inner.setdefault(name, {})
            inner[last] = {"rounds": of.rounds, "tokens": of.tokens}
    return result


def figures(counts: Iterable[tuple[Key, Counts]], backlog_max: int) -> dict[str, Any]:
    """The counts as plain data.

    An active drafter ingests the last round's tokens in every round. `catch_up` counts only what an idle drafter had
    missed before that, with one pass per request. `backlog_mean` covers both.
    """
    counts = [*counts]
    drafters = sorted(summed(counts, DRAFTER).items())
    total = sum((of for _, of in drafters), Counts())

    def by_drafter(field: str) -> dict[str, int]:
        return {name: count for (name,), of in drafters if (count := getattr(of, field))}

    return {
        "rounds": total.rounds,
        "rounds_by_drafter": by_drafter("rounds"),
        "drafted": total.drafted,
        "drafted_by_drafter": by_drafter("drafted"),
        "accepted_drafts": total.accepted,
        "accepted_by_drafter": by_drafter("accepted"),
        "switches": total.switches,
        "ingested_by_drafter": by_drafter("ingested"),
        "catch_up": {"passes": total.catch_ups, "tokens": total.missed, "ms": round(total.catch_up_ns / 1e6, 3)},
        "backlog_max": backlog_max,
        "backlog_mean": round(total.ingested / total.ingestions, 3) if total.ingestions else 0.0,
        "by_span": nested(counts, SPAN),
        "by_span_drafter": nested(counts, SPAN, DRAFTER),
    }


class Record:
    """One request since its last prefill.

    `output` is non-empty after a retraction. `sampled` is None for all but the last chunk of a chunked prefill; the
    text is read only then.
    """

    def __init__(
        self,
        reader: SpanReader,
        priors: Priors | None,
        asked: Asked,
        prompt: Sequence[int],
        output: Sequence[int],
        sampled: int | None,
        trace: Trace | None = None,
    ):
        self.reader, self.priors, self.hints, self.trace = reader, priors, asked.hints, trace
        self.counts: defaultdict[Key, Counts] = defaultdict(Counts)
        self.backlog_max = 0  # at a catch-up, in tokens
        self.drafter: str | None = None  # of the last round
        place, self.context = Place(ANSWER, ""), asked.context or Context()
        if sampled is not None:
            place, self.context = reader.begin(prompt), asked.context or reader.context(prompt)
        place = Place(self.hints.span or place.span, place.tail)
        if sampled is not None:
            place = reader.follow(place, output)
            if trace is not None:
                trace.begin(sampled, place.span)
            place = reader.follow(place, [sampled])
        self.move(place)

    def move(self, place: Place) -> None:
        """Update the row state after the text has grown up to `place`."""
        self.place = place
        hints, kind, tool = self.hints, self.context.kind, self.hints.tool or self.context.tool
        prior = 0.0 if self.priors is None else self.priors.bias(kind, place.span, tool)
        self.state = RowState(place.span, kind, tool, hints.prior, hints.route, prior)

    def count(self, drafter: str | None, num_drafts: int, committed: Sequence[int]) -> None:
        """Add a round, then follow the text."""
        name, span = drafter or NOBODY, self.state.span
        counts = self.counts[self.context.kind, span, name]
        counts.rounds += 1
        counts.tokens += len(committed)
        counts.drafted += num_drafts
        if name != self.drafter:
            counts.switches += self.drafter is not None
            self.drafter = name
        place = self.reader.follow(self.place, committed)
        if place.span == span:
            self.place = place
        else:
            self.move(place)

    def count_catch_up(self, drafter: str, ingested: int, missed: int, seconds: float) -> None:
        """Add the request's share of a pass, possibly of no tokens. `seconds`: those of its missed tokens."""
        counts = self.counts[self.context.kind, self.state.span, drafter]
        counts.ingested += ingested
        counts.ingestions += 1
        counts.missed += missed
        counts.catch_ups += missed > 0
        counts.catch_up_ns += round(1e9 * seconds)
        self.backlog_max = max(self.backlog_max, ingested)

    def figures(self) -> dict[str, Any]:
        """Plain data for the request's `meta_info`."""
        return {
            **figures(self.counts.items(), self.backlog_max),
            "context_kind": self.context.kind,
            "tool": self.state.tool,
            "hints": self.hints.given(),
            **({} if self.trace is None else self.trace.figures()),
        }
