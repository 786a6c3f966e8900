"""Objective `tokens_per_ms`: the plan of the whole batch that is expected to yield most, at what it costs.

A round of expected yield A (tokens, over its rows) and time T is worth A - rate * T tokens, where `rate` is what this
server makes of a millisecond with such batches: time that a round takes is time in which other rounds would have
yielded. Choosing the round of the highest worth each time maximises tokens per millisecond in the long run (the
renewal-reward argument; the rate is that of the rounds that were chosen, so it settles at the best one). With one row
it says: `e3` drafts if it is expected to gain more than rate * (its round's time - the other's).

Rows are ranked by what `e3` would gain for them, so that one split for each number of `e3` rows has to be looked at,
and one round without any drafts: with many rows a round's time goes with its width, and speculation may not pay.

What is not chosen is not seen, so two kinds of rounds look at it:

probe   While rounds go without drafts, a drafter drafts for one row now and then, and nothing of it is verified. What
        the target says next shows how much would have been accepted. Where it would have paid, the next rounds draft.
trial   An arm (a drafter, or none) that has not been run for long is run for the whole batch once, as its costs may be
        wrong. A surprise is followed by another trial at once; each confirmation doubles the time to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan, Probe, RoundResult
from whiflash_sglang.routing.costs import NONE, RoundCosts
from whiflash_sglang.routing.exploration import PriorShare, added, asked_priors, learned_priors
from whiflash_sglang.routing.score import Score
from whiflash_sglang.routing.yields import DF, E3, Row, Yields

PROBE_AFTER, PROBE_EVERY = 8, 56  # rounds without drafts: at least, and at most where a probe then costs less than
PROBE_SHARE = 0.01  # of their time
TRY_AFTER, TRY_AFTER_MOST = 256, 8192  # rounds in which an arm was not run
SURPRISE = 1.5  # times what a trial was expected to cost
LEARN_EVERY = 16  # rounds: correcting sure costs in each would take as long as routing does
HOPELESS = 0.1  # trust; of rows that no drafter knows this much of, no score changes the plan
MOST_PREMIUM = 1.3  # what the router may be believed to make of the time of the best single choice
_MEMORY = 0.1  # weight of the newest round in the running means
_CONTEXT_STEP = 64  # tokens; contexts that differ by less cost the same


class Pending(NamedTuple):
    """A probe whose outcome is not known yet."""

    drafter: str
    drafts: Sequence[int]  # those that the target has not spoken about
    length: int  # committed positions when the next round begins
    accepted: int  # so far
    routed: Row


class CostAwareRouter(Router):
    """`score`: what `e3` is expected to accept more than `df`. `costs` and `yields` are corrected by every round."""

    def __init__(self, score: Score, costs: RoundCosts, yields: Yields):
        self.score = score
        self.share = PriorShare()
        self.costs = costs
        self.yields = yields
        # Running means over rounds, a row: tokens, and what the best single choice would have made of the same time.
        self.tokens, self.par = 1.0, 1.0
        self.routed: list[Row] = []  # of the round in flight
        self.hopeless: HostRows | None = None  # what the next round has if nothing changes but the rows' lengths
        self.rounds = 0
        self.without_drafts = 0  # rounds since the last probe
        self.probes = 0
        self.pending: dict[int, Pending] = {}  # by request slot
        self.idle = dict.fromkeys((DF, E3, NONE), 0)  # rounds since an arm was run
        self.patience = dict.fromkeys(self.idle, TRY_AFTER)
        self.trial: str | None = None  # the arm that the round in flight tries
        self.next_trial: str | None = None
        self.known: dict[tuple[int, int, int], tuple[list[float], float]] = {}  # see `times`; until costs are corrected

    def route(self, rows: HostRows) -> Plan:
        drafted = rows.may_draft()
        nothing: Plan = [None] * len(rows.slots)
        plan = nothing if rows == self.hopeless else self.plan_by_score(rows, drafted)
        self.trial = self.arm_to_try() if drafted else None
        if self.trial is None:
            return plan
        return nothing if self.trial == NONE else where_allowed(rows, [self.trial] * len(rows.slots))

    def plan_by_score(self, rows: HostRows, drafted: Sequence[int]) -> Plan:
        scores, learned, asked = self.score.read(rows.slots), learned_priors(rows), asked_priors(rows)
        # A wish is no evidence: nothing is learned from it.
        self.routed = self.yields.expect(rows, added(scores, learned), asked)
        plan = self.best_plan(rows, self.routed, drafted)
        if learned is not None:
            self.share.look(rows, plan, lambda: self.best_plan(rows, self.yields.expect(rows, scores, asked), drafted))
        return plan

    def arm_to_try(self) -> str | None:
        if self.next_trial is not None:
            arm, self.next_trial = self.next_trial, None
            return arm
        return next((arm for arm, rounds in self.idle.items() if rounds >= self.patience[arm]), None)

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """While nothing is drafted: one row, and the drafter whose turn it is."""
        if any(plan):
            self.without_drafts = 0
            return None
        self.without_drafts += 1
        if self.without_drafts < PROBE_AFTER:
            return None
        free = [row for row in rows.may_draft() if rows.slots[row] not in self.pending]
        drafter = (DF, E3)[self.probes % 2]
        if not free or self.without_drafts < self.probe_interval(drafter, rows):
            return None
        self.without_drafts = 0
        self.probes += 1
        return Probe(drafter, free[self.probes % len(free)])

    def probe_interval(self, drafter: str, rows: HostRows) -> float:
        num_rows, context = len(rows.slots), mean(rows.prefix_lens)
        draft_ms = self.costs.draft[drafter].at(1, context) * self.costs.speed
        return min(PROBE_EVERY, draft_ms / (PROBE_SHARE * self.costs.round_ms({}, num_rows, context)))

    def best_plan(self, rows: HostRows, expected: Sequence[Row], drafted: Sequence[int]) -> Plan:
        """Who drafts for the rows `drafted`, given what is expected of each; nobody where that does not pay."""
        ranked = sorted(drafted, key=lambda row: expected[row].tokens[E3] - expected[row].tokens[DF], reverse=True)
        nothing: Plan = [None] * len(expected)
        if not ranked:
            return nothing
        num_e3, pays = self.best_split([expected[row].tokens for row in ranked], expected, mean(rows.prefix_lens))
        if not pays:
            return nothing
        return where_allowed(rows, [E3 if row in ranked[:num_e3] else DF for row in range(len(expected))])

    def best_split(
        self, ranked: Sequence[Mapping[str, float]], everyone: Sequence[Row], context: float
    ) -> tuple[int, bool]:
        """How many of the `ranked` rows go to `e3`, the others to `df`; and whether that is worth more than a round
        without drafts. Of all the rows, those beyond `ranked` may not be drafted for.
        """
        num_rows = len(everyone)
        times, without = self.times(len(ranked), num_rows, context)
        rate = self.rate(everyone, context)
        as_df = num_rows - len(ranked) + sum(tokens[DF] for tokens in ranked)
        yields = accumulate((tokens[E3] - tokens[DF] for tokens in ranked), initial=as_df)
        worths = [tokens - rate * ms for tokens, ms in zip(yields, times, strict=True)]
        best = max(range(len(worths)), key=worths.__getitem__)
        return best, worths[best] >= num_rows - rate * without

    def margin(self, rows: HostRows) -> float:
        n, context = len(rows.slots), mean(rows.prefix_lens)
        chained, drafted = (self.costs.round_ms({name: n}, n, context) for name in (E3, DF))
        return self.rate(self.routed, context) * (chained - drafted) / n

    def times(self, drafted: int, num_rows: int, context: float) -> tuple[list[float], float]:
        """Milliseconds of rounds with 0, 1, .. `drafted` rows at `e3`, the others at `df`; and of one without."""
        step = int(context) // _CONTEXT_STEP
        key = (drafted, num_rows, step)
        if key not in self.known:
            context = (step + 0.5) * _CONTEXT_STEP
            rounds = ({DF: drafted - num_e3, E3: num_e3} for num_e3 in range(drafted + 1))
            times = [self.costs.round_ms(counts, num_rows, context) for counts in rounds]
            self.known[key] = times, self.costs.round_ms({}, num_rows, context)
        return self.known[key]

    def rate(self, rows: Sequence[Row], context: float) -> float:
        """Tokens that a millisecond yields: what the best single choice would make of it, and how much more than that
        this router has made. The first follows rows, context and text at once, the second is learned from rounds."""
        return min(MOST_PREMIUM, max(1.0, self.tokens / self.par)) * self.best_single(rows, context)

    def best_single(self, rows: Sequence[Row], context: float) -> float:
        """Tokens per millisecond of the best of three: all rows to `df`, all to `e3`, no drafts."""
        num_rows = len(rows)
        times, without = self.times(num_rows, num_rows, context)
        usual = self.yields.usual(rows)
        return num_rows * max(usual[DF] / times[0], usual[E3] / times[-1], 1 / without)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.score.observe(logits, hidden, at)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.score.keep(slots, signals)

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return self.score.signals(slots)

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        self.rounds += 1
        committed = [len(tokens) for tokens in result.committed]
        looked = result.probe is not None or bool(self.pending)
        self.resolve(rows, result)
        self.learn_costs(rows, result, committed, ms)
        if looked or any(result.plan) or rows != self.hopeless:
            self.yields.learn(rows, self.routed, result.plan, committed)
        self.yields.advance(rows, committed)
        lens = [length + count for length, count in zip(rows.prefix_lens, committed, strict=True)]
        # What was just looked at may have changed the trust that the rows were routed by.
        unknown = not looked and not any(result.plan) and all(max(row.trust.values()) < HOPELESS for row in self.routed)
        self.hopeless = rows._replace(prefix_lens=lens) if unknown else None

    def learn_costs(self, rows: HostRows, result: RoundResult, committed: Sequence[int], ms: float) -> None:
        num_rows, context = len(committed), mean(rows.prefix_lens)
        counts = Counter(name for name in result.plan if name is not None)
        for arm in self.idle:
            self.idle[arm] = 0 if arm in (counts or (NONE,)) else self.idle[arm] + 1
        trial, self.trial = self.trial, None
        if trial is None and self.rounds % LEARN_EVERY and self.costs.is_sure(counts, num_rows, context):
            return
        probed = {} if result.probe is None else {result.probe.drafter: 1}
        off_by = self.costs.observe(counts, num_rows, context, ms, probed)
        self.known.clear()
        if trial is None:
            single = self.best_single(self.routed, context) * ms / num_rows
            self.tokens = running(self.tokens, sum(committed) / num_rows)
            self.par = running(self.par, single)
        elif trial in (counts or (NONE,)):
            self.judge_trial(trial, off_by, sum(committed) - num_rows, self.extra_tokens(trial, num_rows, context))

    def judge_trial(self, arm: str, off_by: float, gained: int, needed: float) -> None:
        """Try again at once where a trial's cost was a surprise or its drafts paid, which the next plan may not see."""
        pays_unseen = arm != NONE and gained > needed and self.is_underrated(arm)
        if pays_unseen or max(off_by, 1 / off_by) > SURPRISE:
            self.next_trial = arm
        else:
            self.patience[arm] = min(2 * self.patience[arm], TRY_AFTER_MOST)

    def is_underrated(self, arm: str) -> bool:
        """Whether so little is expected of all rows in flight that no plan would draft for them."""
        return all(row.tokens[arm] < self.yields.lengths[arm] / 2 for row in self.routed)

    def extra_tokens(self, arm: str, num_rows: int, context: float) -> float:
        """What a round of `arm` must yield more than one without drafts, over its rows, to be worth its time."""
        if arm == NONE:
            return 0.0
        without = self.costs.round_ms({}, num_rows, context)
        return num_rows * (self.costs.round_ms({arm: num_rows}, num_rows, context) / without - 1)

    def resolve(self, rows: HostRows, result: RoundResult) -> None:
        """Follow probes by what was committed, and begin the one of this round."""
        number = {slot: row for row, slot in enumerate(rows.slots)}
        for slot, pending in list(self.pending.items()):
            row = number.get(slot)
            if row is not None:
                self.follow(rows, row, pending, result.committed[row])
        if result.probe is not None:
            drafter, row, drafts = result.probe
            routed = self.routed[row]
            start = Pending(drafter, drafts, rows.prefix_lens[row], 0, routed)
            self.follow(rows, row, start, result.committed[row])

    def follow(self, rows: HostRows, row: int, pending: Pending, tokens: Sequence[int]) -> None:
        """Compare a probe's drafts with the tokens that were committed in their place."""
        slot, length = rows.slots[row], rows.prefix_lens[row]
        self.pending.pop(slot, None)
        if pending.length != length:
            return  # the slot's next request
        agreed = common_prefix(pending.drafts, tokens)
        accepted = pending.accepted + agreed
        left = pending.drafts[agreed:]
        if agreed == len(tokens) and left:
            self.pending[slot] = pending._replace(drafts=left, length=length + agreed, accepted=accepted)
            if accepted <= self.extra_tokens(pending.drafter, 1, length):
                return
            # It has paid already, and what more it would have yielded shows sooner in a trial.
            del self.pending[slot]
            self.next_trial = pending.drafter
        self.yields.count(rows, row, pending.routed, pending.drafter, accepted)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading elements in which both agree."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def running(mean_so_far: float, value: float) -> float:
    """An exponential running mean, one value on."""
    return mean_so_far + _MEMORY * (value - mean_so_far)


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
