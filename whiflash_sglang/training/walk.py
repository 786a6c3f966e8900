"""Decode a recorded reply with a policy, on paper: which rounds it would take, and what they would cost.

At every position the acceptance lengths of both drafters are known, so that any policy's rounds follow: a round at
position i commits what its drafter accepts there, and the next one starts behind it. The rounds are those that a server
makes (tests/e2e/test_whiflash_server.py), as its greedy text is this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from whiflash_sglang.training.router_data import Record
from whiflash_sglang.training.text import SPANS

EQUAL_COSTS = {"df": 1.0, "e3": 1.0}  # policies are compared by acceptance length


class Walk(NamedTuple):
    """The rounds of all replies, in order."""

    tokens: np.ndarray  # [rounds], committed
    is_e3: np.ndarray  # [rounds] bool
    ms: np.ndarray  # [rounds]
    span: np.ndarray  # [rounds], index into SPANS, at the round's start
    position: np.ndarray  # [rounds], index into the positions of all replies, one after the other

    @property
    def acceptance_length(self) -> float:
        return float(self.tokens.sum() / len(self.tokens))

    @property
    def tokens_per_ms(self) -> float:
        return float(self.tokens.sum() / self.ms.sum())

    def by_span(self) -> dict[str, dict[str, float]]:
        """Acceptance length, tokens per ms and share of `e3`, by the span that a round begins in."""
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
    """The rounds of `records` with `e3` wherever `to_e3` [all positions] says so; `ms`: of a round by drafter.

    With a `lag` of k rounds a round is decided by what was known when the k-th before it began, or the reply did.
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
            tokens.append(min(length, n - i + 1))  # the reply ends behind its last position
            positions.append(first + i)
            spans.append(found.span[i])
            chosen.append(is_e3)
            i += length
        first += n
    by_e3 = np.array(chosen)
    return Walk(np.array(tokens), by_e3, np.where(by_e3, ms["e3"], ms["df"]), np.array(spans), np.array(positions))


def oracle(records: Sequence[Record], ms: Mapping[str, float]) -> np.ndarray:
    """The choice of hindsight [all positions]: the drafter of the round with more tokens per millisecond."""
    e3, df = (gather(records, name).astype(np.float64) for name in ("e3", "df"))
    return e3 / ms["e3"] > df / ms["df"]


def ceiling(records: Sequence[Record], ms: Mapping[str, float]) -> np.ndarray:
    """The choice [all positions] with which a reply takes the least time of all: what no choice between two drafters
    beats.

    The oracle looks one round ahead; this knows, from the end backwards, where a round leaves the next one to begin.
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
    """The choice of objective tokens_per_ms [all positions], with `gain` [all positions] as what `e3` is expected to
    accept more: what router/cost_aware.py settles at when its rate has become that of its own rounds."""
    rate = 0.0
    choice = gain > 0
    for _ in range(steps):
        rate = walk(records, choice, ms).tokens_per_ms
        choice = gain > rate * (ms["e3"] - ms["df"])
    return choice


def lengths_of(records: Sequence[Record]) -> dict[str, float]:
    """Acceptance length of each drafter alone, over the rounds that it would make. Over all positions it would be
    larger: long drafts are started from more seldom than they are long."""
    return {name: round(found.acceptance_length, 4) for name, found in _alone(records).items()}


def round_starts(records: Sequence[Record]) -> np.ndarray:
    """The positions [rounds] where rounds of either drafter alone begin; one that both come to counts twice."""
    return np.concatenate([found.position for found in _alone(records).values()])


def _alone(records: Sequence[Record]) -> dict[str, Walk]:
    n = len(gather(records, "entropy"))
    choices = {"df": np.zeros(n, dtype=bool), "e3": np.ones(n, dtype=bool)}
    return {name: walk(records, choice, EQUAL_COSTS) for name, choice in choices.items()}


def gather(records: Sequence[Record], field: str) -> np.ndarray:
    """One field of `replies.Positions` over all replies, one after the other."""
    return np.concatenate([getattr(record.positions, field) for record in records])


def best_threshold(
    records: Sequence[Record], score: np.ndarray, candidates: Sequence[float], ms: Mapping[str, float]
) -> tuple[float, dict[float, float]]:
    """The threshold of `score` [all positions] with the most tokens per ms, and those of all candidates."""
    table = {float(value): round(walk(records, score > value, ms).tokens_per_ms, 5) for value in candidates}
    return max(table, key=table.__getitem__), table
