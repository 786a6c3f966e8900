"""How routers use priors: adding them to scores, counting how often they decide, and the trials they are learned from.

The biases themselves are in `routing/priors.py`. Each request's bias is in its `RowState`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from whiflash_sglang.core.hints import AUTO
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan, Probe, RoundResult, RowState
from whiflash_sglang.routing.priors import Place, Priors
from whiflash_sglang.routing.score import Score

LOOK_EVERY = 16  # rounds; planning every round twice, with and without priors, would double the cost of routing
TRY_EVERY = 64  # rows per trial at a place without evidence
HALF_KNOWN = 256  # rounds seen at a place that halve the frequency of its trials


def learned_priors(rows: HostRows) -> list[float] | None:
    """Learned priors in tokens [rows]; None if all are zero."""
    values = [state.prior for state in rows.states or ()]
    return values if any(values) else None


def asked_priors(rows: HostRows) -> list[float] | None:
    """Requested priors in tokens [rows]; None if all are zero."""
    values = [state.asked_prior for state in rows.states or ()]
    return values if any(values) else None


def added(scores: list[float], more: list[float] | None) -> list[float]:
    """The elementwise sum; `more` None counts as zeros."""
    return scores if more is None else [score + some for score, some in zip(scores, more, strict=True)]


def place_of(state: RowState) -> Place:
    """The place of priors for a request."""
    return Place(state.context_kind, state.span, state.tool)


class PriorShare:
    """Counts how often the prior changes a row's drafter, in a sample of rounds."""

    def __init__(self) -> None:
        self.rounds = 0
        self.seen: Counter[tuple[str, str]] = Counter()  # by context kind and span
        self.decided: Counter[tuple[str, str]] = Counter()

    def look(self, rows: HostRows, plan: Plan, without: Callable[[], Plan]) -> None:
        """Compare `plan` with the plan `without` priors, in every `LOOK_EVERY`-th round."""
        self.rounds += 1
        if self.rounds % LOOK_EVERY or not rows.states:
            return
        other = without()
        for row, state in enumerate(rows.states):
            key = (state.context_kind, state.span)
            self.seen[key] += 1
            self.decided[key] += plan[row] != other[row]

    def snapshot(self) -> dict[str, Any]:
        """By context kind and span: sampled rows, and those that the prior decided."""
        result: dict[str, Any] = {}
        for (kind, span), seen in self.seen.items():
            result.setdefault(kind, {})[span] = {"rounds": seen, "decided": self.decided[kind, span]}
        return result


class ScoredRouter(Router, Protocol):
    """A router that decides by a score."""

    score: Score
    share: PriorShare

    def margin(self, rows: HostRows) -> float:
        """The expected gain over `df`, in tokens, above which `e3` is chosen for rows like these."""
        ...

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        """As `score.Score.signals`."""
        ...


class TrialRouter(Router):
    """Routes with `inner`, except for occasional trials, in which one row gets a random drafter.

    Without trials, the yield of a drafter that is never chosen would not be observed. `usual_tokens`: acceptance length
    to assume before the first trial. With one row in `TRY_EVERY` under trial, half of them with the same drafter as
    without, and a wrong drafter that costs a third of a round, trials cost 0.25%. That is as much as priors may gain,
    so trials become rarer at a place as its evidence grows.
    """

    def __init__(self, inner: ScoredRouter, priors: Priors, usual_tokens: float):
        self.inner = inner
        self.priors = priors
        self.usual_tokens = usual_tokens
        self.coin = random.Random(0)  # all ranks of a server must draw the same
        self.due = 0  # rows since the last trial
        self.trial: tuple[int, float, str] | None = None  # of the round in flight: row, score, drafter

    def route(self, rows: HostRows) -> Plan:
        plan = self.inner.route(rows)
        self.trial = None
        self.due += len(rows.slots)
        if self.due < TRY_EVERY or not any(plan) or not rows.states:
            return plan
        free = [row for row, name in enumerate(plan) if name and rows.states[row].route == AUTO]
        if not free:
            return plan
        self.due = 0
        row, drafter = self.coin.choice(free), self.coin.choice(("df", "e3"))
        known = self.priors.rounds(place_of(rows.states[row]))
        if self.coin.random() * (HALF_KNOWN + known) > HALF_KNOWN:
            return plan
        self.trial = (row, self.inner.score.read([rows.slots[row]])[0], drafter)
        return [*plan[:row], drafter, *plan[row + 1 :]]

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        return self.inner.probe(rows, plan)

    def ahead(self, rows: HostRows) -> int:
        return self.inner.ahead(rows)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        return self.inner.observe(logits, hidden, at)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.inner.keep(slots, signals)

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        self.inner.learn(rows, result, ms)
        if self.trial is None or rows.states is None:
            return
        row, gain, drafter = self.trial
        if result.plan[row] != drafter:  # the drafter was switched off
            return
        place = place_of(rows.states[row])
        tokens = len(result.committed[row])
        self.priors.add_trial(place, gain, drafter, tokens, self.usual_tokens)
        self.priors.settle(self.inner.margin(rows), place)

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return self.inner.signals(slots)
