"""Objective `tokens_per_ms`: choose the plan of the batch that maximizes expected tokens per millisecond.

A round with expected yield A (tokens over its rows) and time T is worth A - rate * T tokens. `rate` is this server's
throughput with such batches in tokens per millisecond, so rate * T is what other rounds would yield in that time.
Always choosing the round worth most maximizes long-run throughput (renewal-reward theorem). `rate` is that of the
chosen rounds, so it converges to the best one. With one row, `e3` drafts if its expected gain exceeds
rate * (time of its round - time of the `df` round).

Rows are ranked by the expected gain of `e3`. Then only one split per number of `e3` rows needs to be compared, plus the
round without drafts. With many rows, round time grows with the verify width, and speculation may not pay off.

Options that are not chosen are not observed. Two mechanisms explore them:

probe   While rounds run without drafts, a drafter occasionally drafts for one row without verification. The target's
        next tokens show how much would have been accepted. If that would have paid off, the next rounds draft.
trial   An arm (a drafter, or none) that has not run for many rounds runs once for the whole batch, as its costs may be
        wrong. After a surprise, another trial follows at once. Each confirmation doubles the interval.
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

PROBE_AFTER, PROBE_EVERY = 8, 56  # minimum and maximum of rounds without drafts between probes
PROBE_SHARE = 0.01  # a probe's share of the time between probes, which sets their interval
TRY_AFTER, TRY_AFTER_MOST = 256, 8192  # rounds since an arm was run
SURPRISE = 1.5  # factor between actual and expected cost of a trial
LEARN_EVERY = 16  # rounds; correcting sure costs in every round would take as long as routing
MAX_STEPS = 4  # of the target in a round without drafts
STEPS_MS = 100.0  # maximum time of these steps, for which a new request has to wait
MOST_PREMIUM = 1.3  # maximum factor of the router's throughput over the best single arm's
_MEMORY = 0.1  # weight of the latest round in the running means
_CONTEXT_STEP = 64  # tokens; resolution of contexts in `CostAwareRouter.times`


class Pending(NamedTuple):
    """A probe without a result yet."""

    drafter: str
    drafts: Sequence[int]  # not yet compared with the target's tokens
    length: int  # committed positions when the next round begins
    accepted: int  # so far
    routed: Row


class CostAwareRouter(Router):
    """Decides by `score`, the expected gain of `e3` over `df`. Updates `costs` and `yields` after rounds."""

    def __init__(self, score: Score, costs: RoundCosts, yields: Yields):
        self.score = score
        self.share = PriorShare()
        self.costs = costs
        self.yields = yields
        # Running means per row over rounds: tokens, and tokens that the best single arm would yield in the same time.
        self.tokens, self.par = 1.0, 1.0
        self.routed: list[Row] = []  # of the round in flight
        self.hopeless = False  # whether no score would have made the plan in flight draft
        self.asleep: HostRows | None = None  # such rows in the next round, if only their lengths change
        self.rounds = 0
        self.without_drafts = 0  # rounds since the last probe
        self.probes = 0
        self.pending: dict[int, Pending] = {}  # by request slot
        self.idle = dict.fromkeys((DF, E3, NONE), 0)  # rounds since the arm was run
        self.patience = dict.fromkeys(self.idle, TRY_AFTER)
        self.trial: str | None = None  # arm under trial in the round in flight
        self.next_trial: str | None = None
        self.known: dict[
            tuple[int, int, int], tuple[list[float], float]
        ] = {}  # cache of `times`, cleared when costs change
        self.sure: set[tuple[frozenset[tuple[str, int]], int, int]] = set()  # cache of `is_sure`, likewise

    def route(self, rows: HostRows) -> Plan:
        drafted = rows.may_draft()
        nothing: Plan = [None] * len(rows.slots)
        if rows == self.asleep:
            plan = nothing
        else:
            plan = self.plan_by_score(rows, drafted)
            best = [self.at_best(row) for row in self.routed]
            self.hopeless = not any(plan) and not any(self.best_plan(rows, best, drafted))
        self.trial = self.arm_to_try() if drafted else None
        if self.trial is None:
            return plan
        return nothing if self.trial == NONE else where_allowed(rows, [self.trial] * len(rows.slots))

    def plan_by_score(self, rows: HostRows, drafted: Sequence[int]) -> Plan:
        """The best plan for the draftable rows `drafted`, given scores and priors."""
        scores, learned, asked = self.score.read(rows.slots), learned_priors(rows), asked_priors(rows)
        # Requested priors affect the plan, but nothing is learned from them.
        self.routed = self.yields.expect(rows, added(scores, learned), asked)
        plan = self.best_plan(rows, self.routed, drafted)
        if learned is not None:
            self.share.look(rows, plan, lambda: self.best_plan(rows, self.yields.expect(rows, scores, asked), drafted))
        return plan

    def at_best(self, row: Row) -> Row:
        """The row, as if all its drafts were accepted that its trust allows, whatever its score."""
        tokens = {name: 1 + min(1.0, trust) * (self.costs.widths[name] - 1) for name, trust in row.trust.items()}
        return row._replace(tokens=tokens)

    def arm_to_try(self) -> str | None:
        """The arm to try in this round, if a trial is due."""
        if self.next_trial is not None:
            arm, self.next_trial = self.next_trial, None
            return arm
        return next((arm for arm, rounds in self.idle.items() if rounds >= self.patience[arm]), None)

    def ahead(self, rows: HostRows) -> int:
        """More than one step where no score would change the plan."""
        if not self.hopeless or self.trial is not None:
            return 1
        _, ms = self.times(0, len(rows.slots), mean(rows.prefix_lens))
        return max(1, min(MAX_STEPS, int(STEPS_MS / ms)))

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """A probe, if one is due in rounds without drafts. Rows and drafters take turns."""
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
        """Rounds between probes, such that they take `PROBE_SHARE` of the time; at most `PROBE_EVERY`."""
        num_rows, context = len(rows.slots), mean(rows.prefix_lens)
        draft_ms = self.costs.draft[drafter].at(1, context) * self.costs.speed
        return min(PROBE_EVERY, draft_ms / (PROBE_SHARE * self.costs.round_ms({}, num_rows, context)))

    def best_plan(self, rows: HostRows, expected: Sequence[Row], drafted: Sequence[int]) -> Plan:
        """The best plan for the rows `drafted`, given `expected` yields [rows]; all None if drafting does not pay."""
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
        """The best number of leading `ranked` rows for `e3`, with `df` for the others, and whether it pays off.

        `ranked`: expected tokens by drafter, of the draftable rows. `everyone`: all rows of the batch.
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
        """The extra time of `e3` per row, in tokens at the current rate."""
        n, context = len(rows.slots), mean(rows.prefix_lens)
        chained, drafted = (self.costs.round_ms({name: n}, n, context) for name in (E3, DF))
        return self.rate(self.routed, context) * (chained - drafted) / n

    def times(self, drafted: int, num_rows: int, context: float) -> tuple[list[float], float]:
        """Milliseconds of rounds with 0, 1, .. `drafted` rows at `e3` and the others at `df`, and without drafts."""
        step = int(context) // _CONTEXT_STEP
        key = (drafted, num_rows, step)
        if key not in self.known:
            context = (step + 0.5) * _CONTEXT_STEP
            rounds = ({DF: drafted - num_e3, E3: num_e3} for num_e3 in range(drafted + 1))
            times = [self.costs.round_ms(counts, num_rows, context) for counts in rounds]
            self.known[key] = times, self.costs.round_ms({}, num_rows, context)
        return self.known[key]

    def rate(self, rows: Sequence[Row], context: float) -> float:
        """Tokens per millisecond: the best single arm's, times this router's measured premium over it.

        The former follows rows, context and text at once. The latter is a running mean over rounds.
        """
        return min(MOST_PREMIUM, max(1.0, self.tokens / self.par)) * self.best_single(rows, context)

    def best_single(self, rows: Sequence[Row], context: float) -> float:
        """Tokens per millisecond of the best single arm: all rows to `df`, all to `e3`, or no drafts."""
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
        self.without_drafts += result.steps - 1
        committed = [len(tokens) for tokens in result.committed]
        looked = result.probe is not None or bool(self.pending) or any(result.plan)
        asleep = not looked and rows == self.asleep  # nothing to learn about yields
        # What was just looked at may have changed the trust that the rows were routed by.
        self.hopeless = self.hopeless and not looked
        self.resolve(rows, result)
        self.learn_costs(rows, result, committed, ms / result.steps)
        if not asleep:
            self.yields.learn(rows, self.routed, result.plan, committed)
        self.yields.advance(rows, committed)
        lens = [length + count for length, count in zip(rows.prefix_lens, committed, strict=True)]
        self.asleep = rows._replace(prefix_lens=lens) if self.hopeless else None

    def learn_costs(self, rows: HostRows, result: RoundResult, committed: Sequence[int], ms: float) -> None:
        """Correct the costs and the premium by a round of `ms` milliseconds a step, and judge its trial."""
        num_rows, context = len(committed), mean(rows.prefix_lens)
        counts = Counter(name for name in result.plan if name is not None)
        for arm in self.idle:
            self.idle[arm] = 0 if arm in (counts or (NONE,)) else self.idle[arm] + 1
        trial, self.trial = self.trial, None
        if trial is None and self.rounds % LEARN_EVERY and self.is_sure(counts, num_rows, context):
            return
        probed = {} if result.probe is None else {result.probe.drafter: 1}
        off_by = self.costs.observe(counts, num_rows, context, ms, probed)
        self.known.clear()
        self.sure.clear()
        if trial is None:
            single = self.best_single(self.routed, context) * ms / num_rows
            self.tokens = running(self.tokens, sum(committed) / num_rows / result.steps)
            self.par = running(self.par, single)
        elif trial in (counts or (NONE,)):
            self.judge_trial(trial, off_by, sum(committed) - num_rows, self.extra_tokens(trial, num_rows, context))

    def is_sure(self, counts: Mapping[str, int], num_rows: int, context: float) -> bool:
        """`RoundCosts.is_sure`, cached."""
        key = (frozenset(counts.items()), num_rows, int(context) // _CONTEXT_STEP)
        if key not in self.sure and self.costs.is_sure(counts, num_rows, context):
            self.sure.add(key)
        return key in self.sure

    def judge_trial(self, arm: str, off_by: float, gained: int, needed: float) -> None:
        """Repeat a trial at once if its cost was a surprise, or if it paid off and no plan would expect that."""
        pays_unseen = arm != NONE and gained > needed and self.is_underrated(arm)
        if pays_unseen or max(off_by, 1 / off_by) > SURPRISE:
            self.next_trial = arm
        else:
            self.patience[arm] = min(2 * self.patience[arm], TRY_AFTER_MOST)

    def is_underrated(self, arm: str) -> bool:
        """Whether the expected yield of every row in flight is too low for any plan to draft."""
        return all(row.tokens[arm] < self.yields.lengths[arm] / 2 for row in self.routed)

    def extra_tokens(self, arm: str, num_rows: int, context: float) -> float:
        """Tokens that a round of `arm` must yield over one without drafts, summed over rows, to break even."""
        if arm == NONE:
            return 0.0
        without = self.costs.round_ms({}, num_rows, context)
        return num_rows * (self.costs.round_ms({arm: num_rows}, num_rows, context) / without - 1)

    def resolve(self, rows: HostRows, result: RoundResult) -> None:
        """Compare pending probes with the committed tokens, and begin this round's probe."""
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
        """Compare a probe's drafts with the committed `tokens` at their positions."""
        slot, length = rows.slots[row], rows.prefix_lens[row]
        self.pending.pop(slot, None)
        if pending.length != length:
            return  # a new request in this slot
        agreed = common_prefix(pending.drafts, tokens)
        accepted = pending.accepted + agreed
        left = pending.drafts[agreed:]
        if agreed == len(tokens) and left:
            self.pending[slot] = pending._replace(drafts=left, length=length + agreed, accepted=accepted)
            if accepted <= self.extra_tokens(pending.drafter, 1, length):
                return
            # It has paid off already. A trial shows the rest sooner.
            del self.pending[slot]
            self.next_trial = pending.drafter
        self.yields.count(rows, row, pending.routed, pending.drafter, accepted)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def running(mean_so_far: float, value: float) -> float:
    """Update an exponential running mean."""
    return mean_so_far + _MEMORY * (value - mean_so_far)


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
