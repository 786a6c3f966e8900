"""Objective `tokens_per_ms`: the plan of the whole batch that is expected to yield most, at what it costs.

A round of expected yield A (tokens, over its rows) and time T is worth A - rate * T tokens, where `rate` is what this
server makes of a millisecond with such batches: time that a round takes is time in which other rounds would have
yielded. Choosing the round of the highest worth each time maximises tokens per millisecond in the long run (the
renewal-reward argument; the rate is that of the rounds that were chosen, so it settles at the best one). With one row
it says: `e3` drafts if it is expected to gain more than rate * (its round's time - the other's).

Rows are ranked by what `e3` would gain for them, so that one split for each number of `e3` rows has to be looked at,
and one round without any drafts: with many rows a round's time goes with its width, and speculation may not pay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from whiflash_sglang.costs import RoundCosts
from whiflash_sglang.round import Router
from whiflash_sglang.router.prior import PriorShare, added, asked_priors, learned_priors
from whiflash_sglang.router.score import Score
from whiflash_sglang.types import HostRows, Plan, RoundResult

EXPLORE_EVERY = 128  # rounds of one batch size without drafts, until one with drafts is tried again
LEARN_EVERY = 16  # rounds: learning from each would cost as much as routing does
_MEMORY = 0.1  # weight of the newest round in the running means
_CONTEXT_STEP = 64  # tokens; contexts that differ by less cost the same


class CostAwareRouter(Router):
    """`score`: what `e3` is expected to accept more than `df`. `base`: what `df` accepts on average, at first."""

    def __init__(self, score: Score, costs: RoundCosts, base: float):
        self.score = score
        self.share = PriorShare()
        self.costs = costs
        self.base = max(1.0, base)  # acceptance length of df; kept current by what rounds of either drafter yield
        # Running means over rounds, a row: tokens, and what the best single choice would have made of the same time.
        self.tokens, self.par = self.base, self.base
        self.without_drafts: Counter[int] = Counter()  # by number of rows: rounds since the last one with drafts
        self.is_trying = False  # whether the round in flight drafts only to see whether that pays again
        self.gains: list[float] = []  # of the rows of the round in flight: scores and what is known to be missing
        self.rounds = 0
        self.known: dict[tuple[int, int, int], tuple[list[float], float]] = {}  # see `worths`; until it learns again

    def route(self, rows: HostRows) -> Plan:
        scores, learned = self.score.read(rows.slots), learned_priors(rows)
        self.gains = added(scores, learned)
        asked = asked_priors(rows)  # a wish, and no evidence: nothing is learned from it
        plan, pays = self.best_plan(rows, added(self.gains, asked))
        if learned is not None:
            self.share.look(rows, plan, lambda: self.best_plan(rows, added(scores, asked))[0])
        num_rows = len(scores)
        self.without_drafts[num_rows] = 0 if pays else self.without_drafts[num_rows] + 1
        # What drafts yield is known from drafting only.
        self.is_trying = not pays and self.without_drafts[num_rows] % EXPLORE_EVERY == 0
        return plan if pays or self.is_trying else {}

    def best_plan(self, rows: HostRows, gains: list[float]) -> tuple[Plan, bool]:
        """Who drafts, given what `e3` gains for each row; and whether that is worth more than no drafts at all."""
        drafted = rows.may_draft()
        ranked = sorted(drafted, key=gains.__getitem__, reverse=True)
        if not ranked:
            return {}, True
        context = mean(rows.prefix_lens)
        num_e3, pays = self.best_split([gains[row] for row in ranked], len(gains), context)
        if num_e3 in (0, len(ranked)):
            return {"e3" if num_e3 else "df": tuple(drafted)}, pays
        return {"df": tuple(sorted(ranked[num_e3:])), "e3": tuple(sorted(ranked[:num_e3]))}, pays

    def best_split(self, gains: list[float], num_rows: int, context: float) -> tuple[int, bool]:
        """How many of the rows with the descending `gains` go to `e3`, the others to `df`; and whether that is worth
        more than a round without drafts. Of `num_rows` rows, those beyond `gains` may not be drafted for.
        """
        worths, without = self.worths(len(gains), num_rows, context)
        best, best_worth, gained = 0, worths[0], 0.0
        for num_e3, gain in enumerate(gains, start=1):
            gained += gain
            if gained + worths[num_e3] > best_worth:
                best, best_worth = num_e3, gained + worths[num_e3]
        return best, without <= best_worth

    def margin(self, rows: HostRows) -> float:
        n, context = len(rows.slots), mean(rows.prefix_lens)
        chained, drafted = (self.costs.round_ms({name: n}, n, context) for name in ("e3", "df"))
        return self.rate(n, context) * (chained - drafted) / n

    def worths(self, drafted: int, num_rows: int, context: float) -> tuple[list[float], float]:
        """Worth of rounds with 0, 1, .. `drafted` rows at `e3`, before its gains; and of one without drafts."""
        step = int(context) // _CONTEXT_STEP
        key = (drafted, num_rows, step)
        if key not in self.known:
            context = (step + 0.5) * _CONTEXT_STEP
            rate = self.rate(num_rows, context)
            tokens = num_rows - drafted + drafted * self.base
            rounds = ({"df": drafted - num_e3, "e3": num_e3} for num_e3 in range(drafted + 1))
            worths = [tokens - rate * self.costs.round_ms(counts, num_rows, context) for counts in rounds]
            self.known[key] = worths, num_rows - rate * self.costs.round_ms({}, num_rows, context)
        return self.known[key]

    def rate(self, num_rows: int, context: float) -> float:
        """Tokens that a millisecond yields: what the best single choice would make of it, and how much more than that
        this router has made. The first follows rows and context at once, the second is learned from rounds of any."""
        return self.tokens / self.par * self.best_single(num_rows, context)

    def best_single(self, num_rows: int, context: float) -> float:
        """Tokens per millisecond of the best of three: all rows to `df`, all to `e3`, no drafts."""
        drafted = self.base * num_rows / self.costs.round_ms({"df": num_rows}, num_rows, context)
        chained = self.base * num_rows / self.costs.round_ms({"e3": num_rows}, num_rows, context)
        return max(drafted, chained, num_rows / self.costs.round_ms({}, num_rows, context))

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.score.observe(logits, hidden, at)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.score.keep(slots, signals)

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return self.score.signals(slots)

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        self.rounds += 1
        if self.rounds % LEARN_EVERY and not self.is_trying:
            return
        self.known.clear()
        num_rows = len(self.gains)
        counts = {name: len(chosen) for name, chosen in result.plan.items()}
        context = mean(rows.prefix_lens)
        self.costs.observe(counts, num_rows, context, ms)
        committed = [len(tokens) for tokens in result.committed]
        if not self.is_trying:
            self.tokens = running(self.tokens, sum(committed) / num_rows)
            self.par = running(self.par, self.best_single(num_rows, context) * ms / num_rows)
        as_df = [
            committed[row] - (self.gains[row] if name == "e3" else 0.0)
            for name, chosen in result.plan.items()
            for row in chosen
        ]
        if as_df:
            self.base = max(1.0, running(self.base, sum(as_df) / len(as_df)))


def running(mean_so_far: float, value: float) -> float:
    """An exponential running mean, one value on."""
    return mean_so_far + _MEMORY * (value - mean_so_far)


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
