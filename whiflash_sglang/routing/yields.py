"""Expected acceptance length by row and drafter: the score, corrected by observed rounds.

There are two corrections, both in accepted drafts (acceptance length without the bonus token):

level   drafts that `df` accepts at a given score. A score only predicts the difference between the drafters. Learned
        slowly, and only from requests with text that a drafter knows.
trust   accepted over expected drafts, by request and drafter: 1 on text like the calibration's, 0 on text that no
        drafter knows. Learned within about ten rounds, since text differs between requests. The mean of the request's
        place (context kind and span) serves as a prior, worth a few rounds.

    expected acceptance length of `d` = 1 + trust of `d` * (level + gain of `d`)

Text that is unknown to one drafter is usually unknown to both. So a round of one drafter also counts for the other,
with half the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from whiflash_sglang.core.types import HostRows, Plan

DF, E3 = "df", "e3"
MOST = 2.0  # maximum trust
KNOWN, KNOWN_ROUNDS = 0.75, 4  # trust and drafted rounds, from which a request's rounds count for levels
_FAST, _SLOW = 0.15, 0.02  # weight of the latest round
_SHARED = 8  # weight of a place's trust, in rounds of the request
_FEW = 16  # weight of a level's initial value, in rounds
_STEP = 0.5  # tokens; resolution of gains for levels
_MAX_GAIN = 8.0  # tokens


class Ratio:
    """Accepted over expected drafts, each a running mean per round."""

    __slots__ = ("accepted", "expected")

    def __init__(self, accepted: float, expected: float):
        self.accepted, self.expected = accepted, expected

    def add(self, accepted: float, expected: float, weight: float) -> None:
        """Update the running means by a round."""
        self.accepted += weight * (accepted - self.accepted)
        self.expected += weight * (expected - self.expected)

    @property
    def value(self) -> float:
        """The trust, at most `MOST`."""
        return min(MOST, self.accepted / self.expected)

    def copy(self) -> Ratio:
        return Ratio(self.accepted, self.expected)


class Level(NamedTuple):
    """The level at one gain."""

    drafts: float  # accepted by `df`
    rounds: int  # learned from


Trust = Mapping[str, Ratio]
"""Accepted over expected drafts, by drafter."""


class Request(NamedTuple):
    """The state of the request in a slot. Its length distinguishes it from the next request in the slot."""

    length: int  # committed positions when its next round begins
    own: Trust
    drafted: int = 0  # rounds learned from


class Row(NamedTuple):
    """One row of a round, as routed."""

    slot: int
    gain: float  # expected gain of `e3` over `df`, tokens
    trust: Mapping[str, float]  # by drafter
    tokens: Mapping[str, float]  # expected acceptance length by drafter


class Yields:
    """Tracks levels and trust. `lengths`: mean acceptance length by drafter on the calibration's text."""

    def __init__(self, lengths: Mapping[str, float]):
        self.lengths = {name: max(1.5, lengths[name]) for name in (DF, E3)}
        self.requests: dict[int, Request] = {}  # by request slot
        self.places: dict[tuple[str, str] | None, Trust] = {}  # by context kind and span
        self.levels: dict[int, Level] = {}  # by gain, in units of _STEP
        # Running mean of accepted drafts on known text, over all scores.
        self.usual_drafts = {name: length - 1 for name, length in self.lengths.items()}

    def expect(self, rows: HostRows, gains: Sequence[float], wished: Sequence[float] | None = None) -> list[Row]:
        """The expected yields of every row, from `gains` [rows] in tokens. `wished` [rows]: requested priors."""
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
        """Mean acceptance length by drafter over scores, at the trust of these rows."""
        return {
            name: 1 + drafts * sum(row.trust[name] for row in rows) / len(rows)
            for name, drafts in self.usual_drafts.items()
        }

    def learn(self, rows: HostRows, routed: Sequence[Row], plan: Plan, committed: Sequence[int]) -> None:
        """Learn from a round with drafts. `committed` [rows]: acceptance lengths."""
        for row, name in enumerate(plan):
            if name is not None:
                self.count(rows, row, routed[row], name, committed[row] - 1)
        for one in routed:
            level = self._level(one.gain)
            for name, drafts in ((DF, level), (E3, max(0.0, level + one.gain))):
                self.usual_drafts[name] += _SLOW / len(routed) * (drafts - self.usual_drafts[name])

    def advance(self, rows: HostRows, committed: Sequence[int]) -> None:
        """Advance the requests' lengths by `committed` [rows] tokens."""
        for slot, length, tokens in zip(rows.slots, rows.prefix_lens, committed, strict=True):
            self.requests[slot] = self.requests[slot]._replace(length=length + tokens)

    def count(self, rows: HostRows, row: int, routed: Row, name: str, accepted: int) -> None:
        """Learn that `accepted` drafts of drafter `name` were accepted for a row, or would have been (probe)."""
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
                else:  # as if its ratio of accepted to expected were the same
                    ratio.add(accepted * expected / max(0.5, level + gain), expected, _FAST / 2)

    def _place(self, rows: HostRows, row: int) -> Trust:
        state = None if rows.states is None else rows.states[row]
        key = None if state is None else (state.context_kind, state.span)
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
