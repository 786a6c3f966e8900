"""Objective tokens_per_ms: which plan it chooses, and what it learns from rounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learned import cost_table
from whiflash_sglang.costs import RoundCosts
from whiflash_sglang.router.cost_aware import EXPLORE_EVERY, CostAwareRouter
from whiflash_sglang.router.score import Score
from whiflash_sglang.types import HostRows, Plan, RoundResult, Standing


class Gains(Score):
    """A score whose values the test sets."""

    def __init__(self, values: list[float]):
        self.values = values

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not asked here")

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        raise AssertionError("not asked here")


def rows(n: int, draftable: list[bool] | None = None, context: int = 256) -> HostRows:
    return HostRows([*range(n)], [context] * n, draftable)


def router(gains: list[float], costs: RoundCosts | None = None, base: float = 5.0) -> CostAwareRouter:
    return CostAwareRouter(Gains(gains), costs or cost_table(), base)


def chosen(plan: Plan) -> dict[str, list[int]]:
    return {name: [*chosen] for name, chosen in plan.items()}


def result(plan: Plan, committed: list[int]) -> RoundResult:
    tokens = torch.zeros(len(committed), max(committed), dtype=torch.int64)
    return RoundResult(plan, [0] * len(committed), tokens, tokens, [[0] * count for count in committed], {}, {})


def test_e3_has_to_gain_more_than_its_time_is_worth() -> None:
    """df yields 5 tokens in 10 ms, so that e3's 2 ms more are worth one token."""
    assert chosen(router([0.9]).route(rows(1))) == {"df": [0]}
    assert chosen(router([1.1]).route(rows(1))) == {"e3": [0]}


def test_a_batch_is_planned_as_a_whole() -> None:
    """Two drafters in a round cost 2 + 4 + 8 ms where e3 alone costs 12: a row that would choose df by itself goes with
    the others, and one row's gain does not pay for a second drafter."""
    many = [3.0, 3.0, 3.0, -0.1]
    assert chosen(router(many).route(rows(4))) == {"e3": [0, 1, 2, 3]}
    assert chosen(router([1.5, -2.0, -2.0, -2.0]).route(rows(4))) == {"df": [0, 1, 2, 3]}
    assert chosen(router([9.0, -9.0, 9.0, -9.0]).route(rows(4))) == {"df": [1, 3], "e3": [0, 2]}


def test_no_drafts_where_they_do_not_pay() -> None:
    """A round of 16 rows takes 10 + 15 * 20 ms with drafts and 5 without: 80 tokens in 310 ms, or 16 in 5."""
    costs = cost_table(df=10.0, e3=12.0, none=5.0, per_row=20.0)
    decided = router([0.0] * 16, costs)
    assert chosen(decided.route(rows(16))) == {}
    assert chosen(decided.route(rows(1))) == {"df": [0]}, "one row alone is another matter"


def test_drafts_are_tried_again_now_and_then() -> None:
    """What drafts yield is seen only when there are some: without this a server would never draft again."""
    decided = router([0.0], cost_table(df=100.0, e3=100.0, none=1.0))
    plans = [chosen(decided.route(rows(1))) for _ in range(2 * EXPLORE_EVERY)]
    assert [i + 1 for i, plan in enumerate(plans) if plan] == [EXPLORE_EVERY, 2 * EXPLORE_EVERY]


def test_what_a_trial_yields_is_learned_at_once() -> None:
    """Trials are seldom: were only every sixteenth round learned from, whatever it is, most would be for nothing."""
    decided = router([0.0], cost_table(df=100.0, e3=100.0, none=1.0), base=2.0)
    plans = [decided.route(rows(1)) for _ in range(EXPLORE_EVERY)]
    decided.learn(rows(1), result(plans[-1], [8]), 100.0)
    assert plans[-1] and decided.base > 2.0


def test_rows_that_may_not_be_drafted_for_stand_in_no_plan() -> None:
    decided = router([9.0, 9.0, 9.0])
    assert chosen(decided.route(rows(3, [True, False, True]))) == {"e3": [0, 2]}
    assert chosen(decided.route(rows(3, [False, False, False]))) == {}


@pytest.mark.parametrize(("gain", "prior", "drafter"), [(0.9, 0.3, "e3"), (1.1, -0.3, "df"), (1.1, 0.0, "e3")])
def test_a_prior_is_added_to_the_gain(gain: float, prior: float, drafter: str) -> None:
    for asked, learned in ((prior, 0.0), (0.0, prior), (2 * prior, -prior)):
        standing = Standing("answer", "user", None, asked, "auto", learned)
        assert chosen(router([gain]).route(rows(1)._replace(standings=(standing,)))) == {drafter: [0]}


def test_a_prior_is_no_evidence() -> None:
    """What one client wishes for must not change what the server believes of everybody's drafts."""
    decided = router([0.0], cost_table(none=100.0), base=5.0)
    asking = rows(1)._replace(standings=(Standing("answer", "user", None, 16.0, "auto"),))
    for _ in range(800):
        decided.learn(asking, result(decided.route(asking), [5]), 12.0)
    assert decided.base == pytest.approx(5.0)


def test_the_base_is_learned_from_rounds_of_either_drafter() -> None:
    """A round of e3 tells what df would have made of it, by the gain that was expected: 7 - 3."""
    for gain, committed in ((3.0, 7), (-3.0, 4)):
        decided = router([gain], cost_table(none=100.0), base=1.0)
        for _ in range(1600):
            plan = decided.route(rows(1))
            decided.learn(rows(1), result(plan, [committed]), 10.0)
        assert decided.base == pytest.approx(4.0, abs=0.05)


def test_the_rate_is_that_of_the_rounds() -> None:
    decided = router([0.0])
    for _ in range(1600):
        decided.learn(rows(1), result(decided.route(rows(1)), [6]), 8.0)
    assert decided.rate(1, 256) == pytest.approx(6 / 8, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    gains=st.lists(st.floats(-6, 6), min_size=1, max_size=5),
    times=st.tuples(st.floats(4, 30), st.floats(5, 30), st.floats(1, 10)),
    base=st.floats(1, 8),
)
def test_the_plan_is_the_worthiest_of_all_there_are(
    gains: list[float], times: tuple[float, float, float], base: float
) -> None:
    """Looking at one split for each number of e3 rows finds what looking at every assignment would."""
    costs = cost_table(*times)
    decided = router(gains, costs, base)
    n = len(gains)
    rate = decided.rate(n, 256)

    def worth(assignment: tuple[str, ...]) -> float:
        counts = {"df": assignment.count("df"), "e3": assignment.count("e3")}
        tokens = sum(base + (gain if name == "e3" else 0) for gain, name in zip(gains, assignment, strict=True))
        return tokens - rate * costs.round_ms(counts, n, 256)

    best = max(worth(assignment) for assignment in itertools.product(("df", "e3"), repeat=n))
    best = max(best, n - rate * costs.round_ms({}, n, 256))
    plan = chosen(decided.route(rows(n)))
    if plan:
        named = {row: name for name, index in plan.items() for row in index}
        found = worth(tuple(named[row] for row in range(n)))
    else:
        found = n - rate * costs.round_ms({}, n, 256)
    assert found == pytest.approx(best, abs=1e-4)
