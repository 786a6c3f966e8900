"""Priors: learned corrections of a router's score by context kind, span and tool.

A place is a context kind, a span and, if known, the tool whose output the reply reacts to. Its bias, in tokens of
acceptance length, is added to the expected gain of EAGLE-3 (`e3`) over DFlash (`df`).

    priors.bias(TOOL_OUTPUT, REASONING, "lookup_order")         the bias there
    priors.add(place, gain, difference)                         a round: expected and actual gain of `e3`
    priors.settle(margin)                                       choose the biases

A router chooses `e3` if gain + bias exceeds a margin. The bias of a place is the one that maximizes the worth of the
rounds seen there. It is zero unless that is significantly better, so a score that is right keeps deciding. Among equal
biases, the middle one is taken. This is not the mean error of the score: a score may be wrong where the choice is clear
anyway, and right where it is close.

The file format, written by `calibrate --priors`, read by `--whiflash-priors` and returned by `GET /whiflash/priors`:

    {"format": "whiflash-priors", "format_version": 1, "models": {identity.py},
     "scores": {"entropy": [{"context_kind": "tool_output", "span": "answer", "tool": null, "bias": 0.5,
                             "trials": 12, "tokens": 5.1,
                             "seen": [[rounds, mean gain, mean difference, mean square of it], ...]}, ...],
                "neural": ...}}

Memory is bounded: at most `MAX_TOOLS` tools and a few dozen numbers per place. Biases are within `MAX_BIAS`.
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
MAX_TOOLS = 64  # tools with places of their own; other tools share the place of any tool
MAX_ROUNDS = 4096  # per place; beyond them, older evidence is halved
STEP = 0.25  # tokens; resolution of biases and of gains
MIN_ROUNDS = 8  # rounds that a bias must decide differently
SURE = 2.0  # standard errors by which a bias must be better


class Place(NamedTuple):
    """The key of a bias."""

    context_kind: str
    span: str
    tool: str | None  # None: any tool

    def of_any_tool(self) -> Place:
        """The same place, for any tool."""
        return self._replace(tool=None)


class Seen:
    """Sums over rounds with similar scores. `difference` is the actual gain of `e3`, `square` its square."""

    def __init__(self, rounds: float = 0.0, gain: float = 0.0, difference: float = 0.0, square: float = 0.0):
        self.rounds = rounds
        self.gain, self.difference, self.square = gain * rounds, difference * rounds, square * rounds  # sums

    def fade(self) -> None:
        """Halve the weight of these rounds."""
        self.rounds, self.gain, self.difference, self.square = (
            value / 2 for value in (self.rounds, self.gain, self.difference, self.square)
        )

    @property
    def mean_gain(self) -> float:
        return self.gain / self.rounds

    def worth(self, margin: float) -> tuple[float, float]:
        """Worth of choosing `e3` over `df` for these rounds, in tokens, and its squared standard error."""
        squares = self.square - 2 * margin * self.difference + self.rounds * margin * margin
        return self.difference - self.rounds * margin, squares

    def means(self) -> list[float]:
        """Rounds, mean gain, mean difference and mean square, as in the file."""
        return [
            round(self.rounds, 2),
            *(round(value / self.rounds, 4) for value in (self.gain, self.difference, self.square)),
        ]


class Evidence:
    """The rounds seen at one place, and its bias."""

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}  # by gain, in units of STEP
        self.rounds = 0.0
        self.bias = 0.0
        self.trials = 0
        self.tokens = 0.0  # mean acceptance length of the trials

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
        """Count a trial that yielded `tokens`."""
        self.trials += 1
        self.tokens += (tokens - self.tokens) / self.trials

    def best_bias(self, margin: float, usual: float) -> float:
        """The bias with the highest worth of these rounds; `usual`, the any-tool bias, if none is significantly better.

        Biases are worth the same if no seen round is decided differently. The middle of such a range is the most robust
        against small changes of score or margin.
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
    """Lower bound of the worth of choosing `e3` at gains above -after instead of -before.

    `parts`: gain, rounds, worth and squared error of similar rounds. 0 if too few rounds are decided differently.
    """
    decided = worth = squares = 0.0
    for gain, rounds, gained, square in parts:
        if (gain + before > 0) != (gain + after > 0):
            decided += rounds
            worth += gained if gain + after > 0 else -gained
            squares += square
    return worth - SURE * math.sqrt(max(0.0, squares)) if decided >= MIN_ROUNDS else 0.0


class Priors:
    """The biases of one score, and the evidence for them."""

    def __init__(self) -> None:
        self.places: dict[Place, Evidence] = {}

    def bias(self, context_kind: str, span: str, tool: str | None) -> float:
        """The bias in tokens; the any-tool bias for an unknown tool, 0 for an unknown place."""
        place = Place(context_kind, span, tool)
        known = self.places.get(place) or self.places.get(place.of_any_tool())
        return 0.0 if known is None else known.bias

    def rounds(self, place: Place) -> float:
        """Rounds seen at `place`, with older ones faded."""
        known = self.places.get(place)
        return 0.0 if known is None else known.rounds

    def add(self, place: Place, gain: float, difference: float) -> None:
        """Add a round: its score `gain`, and the actual gain `difference`, both in tokens. See `settle`."""
        for evidence in self._evidence(place):
            evidence.add(gain, Seen(1.0, gain, difference, difference * difference))

    def add_trial(self, place: Place, gain: float, drafter: str, tokens: float, usual_tokens: float) -> None:
        """Add a trial: a drafter chosen at random, with probability 1/2, yielded `tokens`.

        The other drafter's yield is unknown. But for any constant c, +-2 * (tokens - c), positive for `e3`, is an
        unbiased estimate of the gain of `e3` over `df`. Its variance is lower the closer c is to the usual yield. So c
        is `usual_tokens` at first, then the mean of the trials.
        """
        own = self._evidence(place)[-1]
        expected = own.tokens if own.trials else usual_tokens
        self.add(place, gain, 2 * (tokens - expected) * (1 if drafter == "e3" else -1))
        for evidence in self._evidence(place):
            evidence.count_trial(tokens)

    def settle(self, margin: float, changed: Place | None = None) -> None:
        """Choose the biases of all places, or only of `changed` and its any-tool place.

        The latter is for serving: other tools are updated when they are seen.
        """
        places = self.places if changed is None else {changed.of_any_tool(), changed} & self.places.keys()
        for place in sorted(places, key=lambda place: place.tool is not None):  # any-tool places first
            usual = 0.0 if place.tool is None else self.places[place.of_any_tool()].bias
            self.places[place].bias = self.places[place].best_bias(margin, usual)

    def _evidence(self, place: Place) -> list[Evidence]:
        """The evidence that a round at `place` counts for: of any tool and, if there is room, of its tool."""
        found = [self.places.setdefault(place.of_any_tool(), Evidence())]
        if place.tool is not None:
            if place not in self.places and place.tool not in self.tools and len(self.tools) >= MAX_TOOLS:
                return found
            found.append(self.places.setdefault(place, Evidence()))
        return found

    @property
    def tools(self) -> set[str]:
        """The tools with places of their own."""
        return {place.tool for place in self.places if place.tool is not None}

    def to_json(self) -> list[dict[str, Any]]:
        """The places, as in the file."""
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
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on malformed content."""
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
        raise ValueError(f"unknown place {place.context_kind!r}, {place.span!r}")
    if place.tool is not None and not (isinstance(place.tool, str) and 1 <= len(place.tool) <= MAX_TOOL_NAME):
        raise ValueError(f"`tool` must be null or a name of up to {MAX_TOOL_NAME} characters")
    return place


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("NaN or infinite values")
    return number


def document(scores: Mapping[str, Priors], identity: Identity, **about: Any) -> dict[str, Any]:
    """The file's content. `scores`: priors by score."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "models": identity.to_json(),
        "scores": {name: priors.to_json() for name, priors in scores.items()},
        **about,
    }


def save_priors(file: Path, scores: Mapping[str, Priors], identity: Identity, **about: Any) -> None:
    """Write the file. `about`: more fields for the reader."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document(scores, identity, **about), indent=1) + "\n")


def load_priors(path: str, score: str, identity: Identity) -> Priors:
    """Read the priors of one score and check that they fit the models. Raises CheckpointError."""
    fix = "create it with `python -m whiflash_sglang.calibrate --priors FILE`, or use learned or none"
    content = identity.read(FLAG_PRIORS, path, FORMAT, FORMAT_VERSION, fix)
    scores = content.get("scores")
    if not isinstance(scores, dict) or score not in scores:
        known = ", ".join(scores) if isinstance(scores, dict) and scores else "no score"
        fix = f"create it again with this score, or change {FLAG_ROUTER}"
        raise CheckpointError(FLAG_PRIORS, path, f"has priors for {known}, not for {score}", fix)
    with parsing(FLAG_PRIORS, path):
        return Priors.from_json(scores[score])
