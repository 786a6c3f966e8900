"""Objective `tokens_per_ms`: the plan of the whole batch that is expected to yield most, at what it costs.

A round of expected yield A (tokens, over its rows) and time T is worth A - rate * T tokens, where `rate` is what this
server makes of a millisecond at this batch size: time that a round takes is time in which other rounds would have
yielded. Choosing the round of the highest worth each time maximises tokens per millisecond in the long run (the
renewal-reward argument; the rate is that of the rounds that were chosen, so it settles at the best one). With one row
it says: `e3` drafts if it is expected to gain more than rate * (its round's time - the other's).

Rows are ranked by what `e3` would gain for them, so that one split for each number of `e3` rows has to be looked at,
and one round without any drafts: with many rows a round's time goes with its width, and speculation may not pay.
"""

from __future__ import annotations

import torch

from whiflash_sglang.costs import RoundCosts
from whiflash_sglang.round import Router
from whiflash_sglang.router.score import Score, priors
from whiflash_sglang.types import Plan, RoundResult, Rows

EXPLORE_EVERY = 128  # rounds of one batch size without drafts, until one with drafts is tried again
LEARN_EVERY = 4  # rounds: learning from each would cost as much as routing does
_MEMORY = 0.05  # weight of the newest round in the running means
_CONTEXT_STEP = 64  # tokens; contexts that differ by less cost the same


class CostAwareRouter(Router):
    """`gain`: what `e3` is expected to accept more than `df`, in tokens. `base`: what `df` accepts on average, at
    first."""

    def __init__(self, gain: Score, costs: RoundCosts, base: float):
        self.gain = gain
        self.costs = costs
        self.base = base  # acceptance length of df; kept current by what rounds of either drafter yield
        # Running means of a round's tokens and time, by number of rows: their quotient is the rate.
        self.yields: dict[int, tuple[float, float]] = {}
        self.without_drafts = [0] * (costs.max_rows + 1)  # rounds since the last one with drafts
        self.gains: list[float] = []  # of the rows of the round in flight
        self.rounds = 0
        self.expected: dict[tuple[int, int, int, int], float] = {}  # milliseconds; see `round_ms`

    def route(self, rows: Rows) -> Plan:
        device = rows.slots.device
        self.gains = self.gain.read(rows.slots).tolist()
        if (prior := priors(rows)) is not None:
            self.gains = [gain + more for gain, more in zip(self.gains, prior, strict=True)]
        may_draft = [True] * len(self.gains) if rows.draftable is None else rows.draftable.tolist()
        drafted = [row for row, may in enumerate(may_draft) if may]
        ranked = sorted(drafted, key=self.gains.__getitem__, reverse=True)
        num_e3 = self.best_split([self.gains[row] for row in ranked], len(self.gains), mean(rows.prefix_lens.tolist()))
        if num_e3 is None:
            return {}
        parts = {"df": sorted(ranked[num_e3:]), "e3": sorted(ranked[:num_e3])}
        return {name: torch.tensor(index, device=device) for name, index in parts.items() if index}

    def best_split(self, gains: list[float], num_rows: int, context: float) -> int | None:
        """How many of the rows with the descending `gains` go to `e3`, the others to `df`; None: no drafts at all.

        Of `num_rows` rows, those beyond `gains` may not be drafted for.
        """
        if not gains:
            return None
        rate = self.rate(num_rows, context)
        drafted = len(gains)
        yield_ = num_rows - drafted + drafted * self.base
        best, best_worth = 0, -float("inf")
        for num_e3 in range(drafted + 1):
            if num_e3:
                yield_ += gains[num_e3 - 1]
            worth = yield_ - rate * self.round_ms(drafted - num_e3, num_e3, num_rows, context)
            if worth > best_worth:
                best, best_worth = num_e3, worth
        if num_rows - rate * self.round_ms(0, 0, num_rows, context) <= best_worth:
            self.without_drafts[num_rows] = 0
            return best
        self.without_drafts[num_rows] += 1
        if self.without_drafts[num_rows] % EXPLORE_EVERY == 0:  # what drafts yield is known from drafting only
            return best
        return None

    def rate(self, num_rows: int, context: float) -> float:
        """Tokens that a millisecond yields; before any round of this many rows, what the best single choice would."""
        if num_rows not in self.yields:
            drafted = num_rows * self.base
            singles = (
                (drafted, self.round_ms(num_rows, 0, num_rows, context)),
                (drafted, self.round_ms(0, num_rows, num_rows, context)),
                (float(num_rows), self.round_ms(0, 0, num_rows, context)),
            )
            self.yields[num_rows] = max(singles, key=lambda single: single[0] / single[1])
        tokens, ms = self.yields[num_rows]
        return tokens / ms

    def round_ms(self, num_df: int, num_e3: int, num_rows: int, context: float) -> float:
        """The table's word, remembered until it learns again."""
        step = int(context) // _CONTEXT_STEP
        key = (num_df, num_e3, num_rows, step)
        if key not in self.expected:
            counts = {"df": num_df, "e3": num_e3}
            self.expected[key] = self.costs.round_ms(counts, num_rows, (step + 0.5) * _CONTEXT_STEP)
        return self.expected[key]

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        self.gain.observe(slots, logits, hidden, at)

    def signals(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.gain.signals(slots)

    def learn(self, rows: Rows, result: RoundResult, ms: float) -> None:
        self.rounds += 1
        if self.rounds % LEARN_EVERY:
            return
        self.expected.clear()
        num_rows = len(self.gains)
        counts = {name: len(index) for name, index in result.plan.items()}
        self.costs.observe(counts, num_rows, mean(rows.prefix_lens.tolist()), ms)
        committed = result.accepted.num_committed.tolist()
        tokens_so_far, ms_so_far = self.yields.get(num_rows, (float(sum(committed)), ms))
        self.yields[num_rows] = running(tokens_so_far, sum(committed)), running(ms_so_far, ms)
        for name, index in result.plan.items():
            for row in index.tolist():
                as_df = committed[row] - (self.gains[row] if name == "e3" else 0.0)
                self.base += _MEMORY * (as_df - self.base)


def running(mean_so_far: float, value: float) -> float:
    """An exponential running mean, one value on."""
    return mean_so_far + _MEMORY * (value - mean_so_far)


def mean(values: list[int]) -> float:
    return sum(values) / len(values)
