"""Priors: what a router's score leaves out, by where a request stands.

A place is a context kind, a span and, where it is known, the tool whose output the reply reacts to. Its bias, in tokens
of acceptance length, is added to what the score expects EAGLE-3 (`e3`) to accept more than DFlash (`df`).

    priors.bias(TOOL_OUTPUT, REASONING, "lookup_order")         what to add there
    priors.learn(standing, gain, difference, margin)            a round was seen: its score, what `e3` really gained

A router sends a row to `e3` where gain + bias exceeds a margin. Of all biases a place gets the one with which the
rounds that were seen there would have been worth most, and none where that is not more than chance: a score that is
right keeps the last word. Of biases that are worth the same it is the middle one. The mean of what the score was off
by is not that bias: a score may be off where the choice is clear anyway, and right where it is close.

The file, which `calibrate --priors` writes, `--whiflash-priors` reads and `GET /whiflash/priors` shows:

    {"format": "whiflash-priors", "format_version": 1, "models": {identity.py},
     "scores": {"entropy": [{"context_kind": "tool_output", "span": "answer", "tool": null, "bias": 0.5,
                             "trials": 12, "tokens": 5.1,
                             "seen": [[rounds, mean gain, mean difference, mean square of it], ...]}, ...],
                "neural": ...}}

Bounded: at most `MAX_TOOLS` tools, a few dozen numbers a place, biases within `MAX_BIAS`. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.core.spans import CONTEXT_KINDS, MAX_TOOL_NAME, SPANS
from whiflash_sglang.routing.identity import Identity, parsing
from whiflash_sglang.startup.config import FLAG_PRIORS, FLAG_ROUTER

FORMAT, FORMAT_VERSION = "whiflash-priors", 1
MAX_BIAS = 3.0  # tokens
MAX_TOOLS = 64  # of which places of their own are kept; rounds of others count for all tools together
MAX_ROUNDS = 4096  # of a place: beyond them what was seen before counts half
STEP = 0.25  # tokens: between biases that are tried, and of gains that are seen as one
MIN_ROUNDS = 8  # that a bias must decide otherwise
SURE = 2.0  # standard errors by which it must be better


class Place(NamedTuple):
    context_kind: str
    span: str
    tool: str | None  # None: whatever the tool

    def of_any_tool(self) -> Place:
        return self._replace(tool=None)


class Seen:
    """Rounds whose scores were alike."""

    def __init__(self, rounds: float = 0.0, gain: float = 0.0, difference: float = 0.0, square: float = 0.0):
        self.rounds = rounds
        self.gain, self.difference, self.square = gain * rounds, difference * rounds, square * rounds  # sums

    def fade(self) -> None:
        self.rounds, self.gain, self.difference, self.square = (
            value / 2 for value in (self.rounds, self.gain, self.difference, self.square)
        )

    @property
    def mean_gain(self) -> float:
        return self.gain / self.rounds

    def worth(self, margin: float) -> tuple[float, float]:
        """What sending these rounds to `e3` is worth over `df`, in tokens, and the square of its standard error."""
        squares = self.square - 2 * margin * self.difference + self.rounds * margin * margin
        return self.difference - self.rounds * margin, squares

    def means(self) -> list[float]:
        return [
            round(self.rounds, 2),
            *(round(value / self.rounds, 4) for value in (self.gain, self.difference, self.square)),
        ]


class Evidence:
    """What was seen at one place."""

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}  # by gain, in steps
        self.rounds = 0.0
        self.bias = 0.0
        self.trials = 0
        self.tokens = 0.0  # mean of the trials

    def add(self, gain: float, more: Seen) -> None:
        """Add rounds with gains around `gain`."""
        step = math.floor(gain / STEP)
        if step not in self.seen:
            self.seen[step] = Seen()
        known = self.seen[step]
        known.rounds += more.rounds
        known.gain += more.gain
        known.difference += more.difference
        known.square += more.square
        self.rounds += more.rounds
        if self.rounds > MAX_ROUNDS:
            for part in self.seen.values():
                part.fade()
            self.rounds /= 2

    def count_trial(self, tokens: float) -> None:
        self.trials += 1
        self.tokens += (tokens - self.tokens) / self.trials

    def best_bias(self, margin: float, usual: float) -> float:
        """The bias with which these rounds are worth most; `usual`, that of any tool, if no other is surely better.

        Biases between which no seen round is decided otherwise are worth the same. Of such a range the middle is taken,
        so that a score or a margin that has become a little different still decides as was best.
        """
        tried = [STEP * step - MAX_BIAS for step in range(int(2 * MAX_BIAS / STEP) + 1)]
        parts = [(part.mean_gain, part.rounds, *part.worth(margin)) for part in self.seen.values()]
        worths = [_surely(parts, usual - margin, bias - margin) for bias in tried]
        best = max(worths)
        if best <= 0:
            return usual
        ranges = [
            [bias for bias, _ in alike]
            for worth, alike in groupby(zip(tried, worths, strict=True), key=itemgetter(1))
            if worth == best
        ]
        nearest = min(ranges, key=lambda biases: min(abs(bias - usual) for bias in biases))
        return (nearest[0] + nearest[-1]) / 2


def _surely(parts: list[tuple[float, float, float, float]], before: float, after: float) -> float:
    """What it is worth, but for chance, to send rounds to `e3` where their gain exceeds -after, no longer -before.

    `parts`: of rounds alike their gain, number, worth and its squared error. 0 where too few are decided otherwise.
    """
    decided = worth = squares = 0.0
    for gain, rounds, gained, square in parts:
        if (gain + before > 0) != (gain + after > 0):
            decided += rounds
            worth += gained if gain + after > 0 else -gained
            squares += square
    return worth - SURE * math.sqrt(max(0.0, squares)) if decided >= MIN_ROUNDS else 0.0


class Priors:
    """The biases of one score, and what they were learned from."""

    def __init__(self) -> None:
        self.places: dict[Place, Evidence] = {}

    def bias(self, context_kind: str, span: str, tool: str | None) -> float:
        place = Place(context_kind, span, tool)
        known = self.places.get(place) or self.places.get(place.of_any_tool())
        return 0.0 if known is None else known.bias

    def rounds(self, place: Place) -> float:
        """How many were seen at `place`; later ones count for more."""
        known = self.places.get(place)
        return 0.0 if known is None else known.rounds

    def add(self, place: Place, gain: float, difference: float) -> None:
        """A round was seen at `place`: its score, and by how much `e3` accepted more than `df`. See `settle`."""
        for evidence in self._evidence(place):
            evidence.add(gain, Seen(1.0, gain, difference, difference * difference))

    def add_trial(self, place: Place, gain: float, drafter: str, tokens: float, usual_tokens: float) -> None:
        """A drafter that a coin chose has yielded `tokens`.

        What the other would have yielded is not known. But twice what this one yielded above any fixed number of
        tokens, with its sign, is on average what `e3` gains over `df`, since either was as likely. The nearer that
        number is to what rounds yield there, the less it scatters: `usual_tokens` at first, then the mean of trials.
        """
        own = self._evidence(place)[-1]
        expected = own.tokens if own.trials else usual_tokens
        self.add(place, gain, 2 * (tokens - expected) * (1 if drafter == "e3" else -1))
        for evidence in self._evidence(place):
            evidence.count_trial(tokens)

    def settle(self, margin: float, changed: Place | None = None) -> None:
        """Choose the biases of all places, or only of `changed` and of any tool there.

        The latter is for a server's rounds: other tools follow when they are seen themselves.
        """
        places = self.places if changed is None else {changed.of_any_tool(), changed} & self.places.keys()
        for place in sorted(places, key=lambda place: place.tool is not None):  # any tool's before each tool's
            usual = 0.0 if place.tool is None else self.places[place.of_any_tool()].bias
            self.places[place].bias = self.places[place].best_bias(margin, usual)

    def _evidence(self, place: Place) -> list[Evidence]:
        """Where a round at `place` counts: for any tool and, if there is room, for its own."""
        found = [self.places.setdefault(place.of_any_tool(), Evidence())]
        if place.tool is not None:
            if place not in self.places and place.tool not in self.tools and len(self.tools) >= MAX_TOOLS:
                return found
            found.append(self.places.setdefault(place, Evidence()))
        return found

    @property
    def tools(self) -> set[str]:
        return {place.tool for place in self.places if place.tool is not None}

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                **place._asdict(),
                "bias": evidence.bias,
                "trials": evidence.trials,
                "tokens": round(evidence.tokens, 4),
                "seen": [evidence.seen[step].means() for step in sorted(evidence.seen)],
            }
            for place, evidence in self.places.items()
        ]

    @classmethod
    def from_json(cls, content: list[dict[str, Any]]) -> Priors:
        """Raises KeyError, TypeError or ValueError where `content` is not what `to_json` gives."""
        priors = cls()
        for entry in content:
            place = _place(entry)
            evidence = priors.places.setdefault(place, Evidence())
            evidence.bias = _finite(entry["bias"])
            evidence.trials, evidence.tokens = int(entry["trials"]), _finite(entry["tokens"])
            if abs(evidence.bias) > MAX_BIAS or evidence.trials < 0:
                raise ValueError(f"a bias beyond {MAX_BIAS} tokens, or a negative number of trials, at {place}")
            for numbers in entry["seen"]:
                rounds, gain, difference, square = map(_finite, numbers)
                if rounds <= 0:
                    raise ValueError(f"{rounds} rounds at {place}")
                evidence.add(gain, Seen(rounds, gain, difference, square))
        for place in list(priors.places):
            priors.places.setdefault(place.of_any_tool(), Evidence())
        if len(priors.tools) > MAX_TOOLS:
            raise ValueError(f"{len(priors.tools)} tools, more than {MAX_TOOLS}")
        return priors


def _place(entry: Mapping[str, Any]) -> Place:
    place = Place(entry["context_kind"], entry["span"], entry["tool"])
    if place.context_kind not in CONTEXT_KINDS or place.span not in SPANS:
        raise ValueError(f"no such place as {place.context_kind!r}, {place.span!r}")
    if place.tool is not None and not (isinstance(place.tool, str) and 1 <= len(place.tool) <= MAX_TOOL_NAME):
        raise ValueError(f"`tool` must be null or a name of up to {MAX_TOOL_NAME} characters")
    return place


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("NaN or infinite values")
    return number


def document(scores: Mapping[str, Priors], identity: Identity, **about: Any) -> dict[str, Any]:
    """The file's content."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "models": identity.to_json(),
        "scores": {name: priors.to_json() for name, priors in scores.items()},
        **about,
    }


def save_priors(file: Path, scores: Mapping[str, Priors], identity: Identity, **about: Any) -> None:
    """Write the file; `about` is what a reader wants to know of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document(scores, identity, **about), indent=1) + "\n")


def load_priors(path: str, score: str, identity: Identity) -> Priors:
    """Read those of one score, and check that the file is one of these models."""
    fix = "learn them with `python -m whiflash_sglang.calibrate --priors FILE`, or use learned or none"
    content = identity.read(FLAG_PRIORS, path, FORMAT, FORMAT_VERSION, fix)
    scores = content.get("scores")
    if not isinstance(scores, dict) or score not in scores:
        known = ", ".join(scores) if isinstance(scores, dict) and scores else "no score"
        fix = f"learn them with it too, or use {FLAG_ROUTER} with a score that the file has"
        raise CheckpointError(FLAG_PRIORS, path, f"has priors for {known}, not for {score}", fix)
    with parsing(FLAG_PRIORS, path):
        return Priors.from_json(scores[score])
