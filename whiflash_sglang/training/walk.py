"""Simulate decoding of recorded replies with any routing policy: its rounds and their cost.

Both drafters' acceptance lengths are known at every position, which determines the rounds of any policy: a round at
position i commits what its drafter accepts there, and the next round starts after it. They are the same rounds that a
server runs (tests/e2e/test_whiflash_server.py), because its greedy text is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from whiflash_sglang.training.router_data import Record
from whiflash_sglang.training.text import SPANS

EQUAL_COSTS = {"df": 1.0, "e3": 1.0}  # compares policies by acceptance length


class Walk(NamedTuple):
    """The rounds of all replies, in order."""

    tokens: np.ndarray  # [rounds], committed tokens
    is_e3: np.ndarray  # [rounds] bool
    ms: np.ndarray  # [rounds]
    span: np.ndarray  # [rounds], index into SPANS, at the round's start
    position: np.ndarray  # [rounds], index into the concatenated positions of all replies

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round."""
        return float(self.tokens.sum() / len(self.tokens))

    @property
    def tokens_per_ms(self) -> float:
        """Tokens per millisecond."""
        return float(self.tokens.sum() / self.ms.sum())

    def by_span(self) -> dict[str, dict[str, float]]:
        """Acceptance length, tokens per ms and share of `e3`, by the span in which a round begins."""
        result = {}
        for index in np.unique(self.span):
            part = Walk(*(values[self.span == index] for values in self))
            result[SPANS[index]] = {
                "rounds": len(part.tokens),
                "acceptance_length": round(part.acceptance_length, 3),
                "tokens_per_ms": round(part.tokens_per_ms, 4),
                "e3_share": round(float(part.is_e3.mean()), 3),
            }
        return result


def walk(records: Sequence[Record], to_e3: np.ndarray, ms: Mapping[str, float], lag: int = 0) -> Walk:
    """Simulate `records`, with `e3` where `to_e3` [all positions] is true. `ms`: milliseconds per round by drafter.

    `lag`: decide each round with the information of that many rounds before (or of the reply's start).
    """
    tokens, positions, spans, chosen = [], [], [], []
    first = 0
    for record in records:
        found = record.positions
        n = len(found.entropy)
        starts: list[int] = []
        i = 0
        while i < n:
            starts.append(i)
            is_e3 = bool(to_e3[first + starts[max(0, len(starts) - 1 - lag)]])
            length = int((found.e3 if is_e3 else found.df)[i])
            tokens.append(min(length, n - i + 1))  # the reply ends after its last position
            positions.append(first + i)
            spans.append(found.span[i])
            chosen.append(is_e3)
            i += length
        first += n
    by_e3 = np.array(chosen)
    return Walk(np.array(tokens), by_e3, np.where(by_e3, ms["e3"], ms["df"]), np.array(spans), np.array(positions))


def oracle(records: Sequence[Record], ms: Mapping[str, float]) -> np.ndarray:
    """The choice in hindsight, [all positions] bool: `e3` where its round yields more tokens per millisecond."""
    e3, df = (gather(records, name).astype(np.float64) for name in ("e3", "df"))
    return e3 / ms["e3"] > df / ms["df"]


def ceiling(records: Sequence[Record], ms: Mapping[str, float]) -> np.ndarray:
    """The choice that minimizes a reply's total time, [all positions] bool: an upper bound for any routing policy.

    Computed backwards from the end. Unlike the oracle, which considers one round, it includes where later rounds begin.
    """
    choices = []
    for record in records:
        e3, df = record.positions.e3.astype(int), record.positions.df.astype(int)
        n = len(e3)
        left = [0.0] * (n + 1)  # time from each position to the end
        choice = np.zeros(n, dtype=bool)
        for i in reversed(range(n)):
            with_e3 = ms["e3"] + left[min(n, i + e3[i])]
            with_df = ms["df"] + left[min(n, i + df[i])]
            choice[i], left[i] = with_e3 < with_df, min(with_e3, with_df)
        choices.append(choice)
    return np.concatenate(choices)


def by_worth(records: Sequence[Record], gain: np.ndarray, ms: Mapping[str, float], steps: int = 12) -> np.ndarray:
    """The choice of objective tokens_per_ms, [all positions] bool, for a predicted `gain` of `e3` [all positions].

    This is the fixed point of routing/cost_aware.py, whose rate is that of its own rounds.
    """
    rate = 0.0
    choice = gain > 0
    for _ in range(steps):
        rate = walk(records, choice, ms).tokens_per_ms
        choice = gain > rate * (ms["e3"] - ms["df"])
    return choice


def lengths_of(records: Sequence[Record]) -> dict[str, float]:
    """Acceptance length of each drafter alone, over its own rounds. The mean over all positions would be larger:
    long accepted runs contain few round starts."""
    return {name: round(found.acceptance_length, 4) for name, found in _alone(records).items()}


def round_starts(records: Sequence[Record]) -> np.ndarray:
    """The positions [rounds] where rounds of either drafter alone begin; common ones are listed twice."""
    return np.concatenate([found.position for found in _alone(records).values()])


def _alone(records: Sequence[Record]) -> dict[str, Walk]:
    n = len(gather(records, "entropy"))
    choices = {"df": np.zeros(n, dtype=bool), "e3": np.ones(n, dtype=bool)}
    return {name: walk(records, choice, EQUAL_COSTS) for name, choice in choices.items()}


def gather(records: Sequence[Record], field: str) -> np.ndarray:
    """One field of `replies.Positions`, concatenated over all replies."""
    return np.concatenate([getattr(record.positions, field) for record in records])


def best_threshold(
    records: Sequence[Record], score: np.ndarray, candidates: Sequence[float], ms: Mapping[str, float]
) -> tuple[float, dict[float, float]]:
    """The threshold of `score` [all positions] with the most tokens per ms, and a table of all candidates."""
    table = {float(value): round(walk(records, score > value, ms).tokens_per_ms, 5) for value in candidates}
    return max(table, key=table.__getitem__), table
