"""What a drafter is expected to yield for a row: the score's expectation, corrected by what its rounds did yield.

Two corrections, both in accepted drafts (acceptance length less the bonus token):

level   what `df` accepts where the score says the same. A score says how far apart the drafters are, not how well both
        do there. Learned slowly, and only from requests whose text has been found to be known to a drafter.
trust   accepted over expected, by request and drafter. It is 1 on text like that of the calibration, and 0 on text that
        no drafter knows. Learned within some ten rounds, as text changes from one request to the next. What requests at
        its place (context kind and span) have come to counts for as much as a few rounds of the request's own.

    expected acceptance length of `d` = 1 + trust of `d` * (level + gain of `d`)

A round of one drafter tells something about the other, as text that is strange to one is usually strange to both: its
evidence counts half for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from whiflash_sglang.core.types import HostRows, Plan

DF, E3 = "df", "e3"
MOST = 2.0  # trust; a calibration may be too modest, but not by more
KNOWN, KNOWN_ROUNDS = 0.75, 4  # trust, after so many drafts, from which a request's rounds count for levels
_FAST, _SLOW = 0.15, 0.02  # weight of the newest round
_SHARED = 8  # rounds of a request's own that its place counts for
_FEW = 16  # rounds that what a level begins with counts for
_STEP = 0.5  # tokens; gains that differ by less share a level
_MAX_GAIN = 8.0  # tokens


class Ratio:
    """Accepted over expected drafts, each a running mean."""

    __slots__ = ("accepted", "expected")

    def __init__(self, accepted: float, expected: float):
        self.accepted, self.expected = accepted, expected

    def add(self, accepted: float, expected: float, weight: float) -> None:
        self.accepted += weight * (accepted - self.accepted)
        self.expected += weight * (expected - self.expected)

    @property
    def value(self) -> float:
        return min(MOST, self.accepted / self.expected)

    def copy(self) -> Ratio:
        return Ratio(self.accepted, self.expected)


class Level(NamedTuple):
    drafts: float  # that `df` accepts
    rounds: int  # that this was learned from


Trust = Mapping[str, Ratio]
"""By drafter."""


class Request(NamedTuple):
    """What is known of the request in a slot. Its length tells it from the slot's next one."""

    length: int  # committed positions when its next round begins
    own: Trust
    drafted: int = 0  # rounds that it has learned from


class Row(NamedTuple):
    """One row of a round, as it was routed."""

    slot: int
    gain: float  # what `e3` was expected to accept more than `df`
    trust: Mapping[str, float]  # by drafter
    tokens: Mapping[str, float]  # expected acceptance length by drafter


class Yields:
    """`lengths`: mean acceptance length by drafter on the text that the score was calibrated on."""

    def __init__(self, lengths: Mapping[str, float]):
        self.lengths = {name: max(1.5, lengths[name]) for name in (DF, E3)}
        self.requests: dict[int, Request] = {}  # by request slot
        self.places: dict[tuple[str, str] | None, Trust] = {}  # by context kind and span
        self.levels: dict[int, Level] = {}  # by gain, in steps
        # Drafts accepted of text that is known, the running mean over whatever the scores said.
        self.usual_drafts = {name: length - 1 for name, length in self.lengths.items()}

    def expect(self, rows: HostRows, gains: Sequence[float], wished: Sequence[float] | None = None) -> list[Row]:
        """Every row with what each drafter is expected to yield. `wished` [rows]: gains that requests ask for."""
        found = []
        for row, (slot, length, gain) in enumerate(zip(rows.slots, rows.prefix_lens, gains, strict=True)):
            known, place = self.requests.get(slot), self._place(rows, row)
            if known is None or known.length != length:
                known = Request(length, {name: ratio.copy() for name, ratio in place.items()})
                self.requests[slot] = known
            share = _SHARED / (_SHARED + known.drafted)
            trust = {name: share * place[name].value + (1 - share) * own.value for name, own in known.own.items()}
            level, more = self._level(gain), gain if wished is None else gain + wished[row]
            tokens = {DF: 1 + trust[DF] * level, E3: max(1.0, 1 + trust[E3] * (level + more))}
            found.append(Row(slot, gain, trust, tokens))
        return found

    def usual(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean acceptance length by drafter of text as well known as these rows', whatever their scores say now."""
        return {
            name: 1 + drafts * sum(row.trust[name] for row in rows) / len(rows)
            for name, drafts in self.usual_drafts.items()
        }

    def learn(self, rows: HostRows, routed: Sequence[Row], plan: Plan, committed: Sequence[int]) -> None:
        """What came of a round's drafts: `committed` [rows] tokens."""
        for row, name in enumerate(plan):
            if name is not None:
                self.count(rows, row, routed[row], name, committed[row] - 1)
        for one in routed:
            level = self._level(one.gain)
            for name, drafts in ((DF, level), (E3, max(0.0, level + one.gain))):
                self.usual_drafts[name] += _SLOW / len(routed) * (drafts - self.usual_drafts[name])

    def advance(self, rows: HostRows, committed: Sequence[int]) -> None:
        """The requests are longer by `committed` [rows] tokens."""
        for slot, length, tokens in zip(rows.slots, rows.prefix_lens, committed, strict=True):
            self.requests[slot] = self.requests[slot]._replace(length=length + tokens)

    def count(self, rows: HostRows, row: int, routed: Row, name: str, accepted: int) -> None:
        """Drafts of `name` for a row: so many were, or would have been, accepted."""
        known = self.requests[routed.slot]
        self.requests[routed.slot] = known._replace(drafted=known.drafted + 1)
        gain = routed.gain if name == E3 else 0.0
        level = self._level(routed.gain)
        if known.drafted >= KNOWN_ROUNDS and max(ratio.value for ratio in known.own.values()) > KNOWN:
            self._learn_level(routed.gain, accepted - gain)
        for trust in (known.own, self._place(rows, row)):
            for drafter, ratio in trust.items():
                expected = max(0.5, level + (routed.gain if drafter == E3 else 0.0))
                if drafter == name:
                    ratio.add(accepted, expected, _FAST)
                else:  # as if it had been accepted as far from what was expected
                    ratio.add(accepted * expected / max(0.5, level + gain), expected, _FAST / 2)

    def _place(self, rows: HostRows, row: int) -> Trust:
        standing = None if rows.standings is None else rows.standings[row]
        key = None if standing is None else (standing.context_kind, standing.span)
        if key not in self.places:
            self.places[key] = {name: Ratio(length - 1, length - 1) for name, length in self.lengths.items()}
        return self.places[key]

    def _level(self, gain: float) -> float:
        known = self.levels.get(self._step(gain))
        return self.lengths[DF] - 1 if known is None else known.drafts

    def _learn_level(self, gain: float, drafts: float) -> None:
        step = self._step(gain)
        level, rounds = self.levels.get(step, Level(self.lengths[DF] - 1, 0))
        weight = max(_SLOW, 1 / (_FEW + rounds))
        self.levels[step] = Level(max(0.0, level + weight * (drafts - level)), rounds + 1)

    def _step(self, gain: float) -> int:
        return round(max(-_MAX_GAIN, min(_MAX_GAIN, gain)) / _STEP)
