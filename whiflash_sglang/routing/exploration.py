"""Priors in the routers' hands: what to add to scores, how often that decides, and the trials that teach it.

The biases themselves are in `whiflash_sglang/routing/priors.py`; each request carries its own in its `Standing`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from whiflash_sglang.core.hints import AUTO
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan, Probe, RoundResult, Standing
from whiflash_sglang.routing.priors import Place, Priors
from whiflash_sglang.routing.score import Score

LOOK_EVERY = 16  # rounds: planning each of them twice, to see what priors change, would cost as much as routing does
TRY_EVERY = 64  # requests' rounds, of which one is a trial, where nothing is known
HALF_KNOWN = 256  # rounds seen at a place by which its trials have become half as frequent


def learned_priors(rows: HostRows) -> list[float] | None:
    """What is known to be missing in the requests' scores, in tokens [rows]; None where nothing is."""
    values = [standing.prior for standing in rows.standings or ()]
    return values if any(values) else None


def asked_priors(rows: HostRows) -> list[float] | None:
    """What requests ask to be added to their scores, in tokens [rows]; None where none does."""
    values = [standing.asked_prior for standing in rows.standings or ()]
    return values if any(values) else None


def added(scores: list[float], more: list[float] | None) -> list[float]:
    return scores if more is None else [score + some for score, some in zip(scores, more, strict=True)]


def place_of(standing: Standing) -> Place:
    return Place(standing.context_kind, standing.span, standing.tool)


class PriorShare:
    """Of the requests' rounds that were looked at, those in which the prior decided who drafts."""

    def __init__(self) -> None:
        self.rounds = 0
        self.seen: Counter[tuple[str, str]] = Counter()  # by context kind and span
        self.decided: Counter[tuple[str, str]] = Counter()

    def look(self, rows: HostRows, plan: Plan, without: Callable[[], Plan]) -> None:
        """Compare a round's plan, now and then, with what it would have been `without` priors."""
        self.rounds += 1
        if self.rounds % LOOK_EVERY or not rows.standings:
            return
        other = without()
        for row, standing in enumerate(rows.standings):
            key = (standing.context_kind, standing.span)
            self.seen[key] += 1
            self.decided[key] += plan[row] != other[row]

    def snapshot(self) -> dict[str, Any]:
        """By context kind and span: rounds that were looked at, and decided by the prior."""
        result: dict[str, Any] = {}
        for (kind, span), seen in self.seen.items():
            result.setdefault(kind, {})[span] = {"rounds": seen, "decided": self.decided[kind, span]}
        return result


class ScoredRouter(Router, Protocol):
    """A router that decides by a score in tokens."""

    score: Score
    share: PriorShare

    def margin(self, rows: HostRows) -> float:
        """What `e3` must be expected to gain over `df`, in tokens, to be chosen for rows like these."""
        ...

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        """As `score.Score.signals`."""
        ...


class TrialRouter(Router):
    """Leaves the choice to `inner`, but now and then to a coin, for one request: what a drafter yields where it is
    never chosen is seen in no other way. `usual_tokens`: what rounds yield, before anything is known.

    With one row in `TRY_EVERY` tried, every second of which goes where it would have gone anyway, a wrong drafter that
    costs a third of a round costs a quarter of a percent. That is as much as priors may gain, so the more rounds have
    been seen at a place, the rarer it is tried.
    """

    def __init__(self, inner: ScoredRouter, priors: Priors, usual_tokens: float):
        self.inner = inner
        self.priors = priors
        self.usual_tokens = usual_tokens
        self.coin = random.Random(0)  # a server's ranks throw the same
        self.due = 0  # requests' rounds since the last trial
        self.trial: tuple[int, float, str] | None = None  # of the round in flight: row, score, drafter

    def route(self, rows: HostRows) -> Plan:
        plan = self.inner.route(rows)
        self.trial = None
        self.due += len(rows.slots)
        if self.due < TRY_EVERY or not any(plan) or not rows.standings:
            return plan
        free = [row for row, name in enumerate(plan) if name and rows.standings[row].route == AUTO]
        if not free:
            return plan
        self.due = 0
        row, drafter = self.coin.choice(free), self.coin.choice(("df", "e3"))
        known = self.priors.rounds(place_of(rows.standings[row]))
        if self.coin.random() * (HALF_KNOWN + known) > HALF_KNOWN:
            return plan
        self.trial = (row, self.inner.score.read([rows.slots[row]])[0], drafter)
        return [*plan[:row], drafter, *plan[row + 1 :]]

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        return self.inner.probe(rows, plan)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        return self.inner.observe(logits, hidden, at)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.inner.keep(slots, signals)

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        self.inner.learn(rows, result, ms)
        if self.trial is None or rows.standings is None:
            return
        row, gain, drafter = self.trial
        if result.plan[row] != drafter:  # it has been switched off
            return
        place = place_of(rows.standings[row])
        tokens = len(result.committed[row])
        self.priors.add_trial(place, gain, drafter, tokens, self.usual_tokens)
        self.priors.settle(self.inner.margin(rows), place)

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return self.inner.signals(slots)
