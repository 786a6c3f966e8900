"""Objective tokens_per_ms: which plan it chooses, and what it learns from rounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learned import cost_table
from whiflash_sglang.core.plan import grouped
from whiflash_sglang.core.types import HostRows, Plan, Probe, RoundResult, RowState
from whiflash_sglang.routing.cost_aware import MAX_STEPS, PROBE_EVERY, STEPS_MS, TRY_AFTER, CostAwareRouter
from whiflash_sglang.routing.costs import RoundCosts
from whiflash_sglang.routing.score import Score
from whiflash_sglang.routing.yields import Yields


class Gains(Score):
    """A score whose values the test sets."""

    def __init__(self, values: list[float]):
        self.values = values
        self.num_reads = 0

    def read(self, slots: Sequence[int]) -> list[float]:
        self.num_reads += 1
        return super().read(slots)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not asked here")

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        raise AssertionError("not asked here")


def rows(n: int, draftable: list[bool] | None = None, context: int = 256) -> HostRows:
    return HostRows([*range(n)], [context] * n, draftable)


def router(gains: list[float], costs: RoundCosts | None = None, base: float = 5.0) -> CostAwareRouter:
    return CostAwareRouter(Gains(gains), costs or cost_table(), Yields({"df": base, "e3": base}))


def chosen(plan: Plan) -> dict[str, list[int]]:
    return {name: [*rows] for name, rows in grouped(plan).items()}


def result(plan: Plan, committed: list[int], probe: Probe | None = None) -> RoundResult:
    tokens = torch.zeros(len(committed), max(committed), dtype=torch.int64)
    return RoundResult(plan, [0] * len(committed), tokens, tokens, [[0] * count for count in committed], {}, {}, probe)


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


def serve(
    decided: CostAwareRouter, num_rounds: int, ms: dict[str, float], drafts: list[int], num_rows: int = 1
) -> dict:
    """Rounds of requests that say 0, 0, .. and whose drafts are these tokens. Rounds by arm, and probes."""
    counts: dict[str, int] = {"df": 0, "e3": 0, "none": 0, "probes": 0}
    length = 256
    for _ in range(num_rounds):
        batch = HostRows([*range(num_rows)], [length] * num_rows)
        plan = decided.route(batch)
        probe = decided.probe(batch, plan)
        arm = next(filter(None, plan), "none")
        counts[arm] += 1
        counts["probes"] += probe is not None
        accepted = next((i for i, token in enumerate(drafts) if token), len(drafts)) if any(plan) else 0
        told = None if probe is None else probe._replace(drafts=drafts)
        decided.learn(batch, result(plan, [1 + accepted] * num_rows, told), ms[arm])
        length += 1 + accepted
    return counts


MS = {"df": 10.0, "e3": 12.0, "none": 5.0}
GOOD, BAD = [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]


def test_text_that_no_drafter_knows_goes_without_drafts() -> None:
    """A score that promises four tokens more was believed for ever: EAGLE-3 drafted on at an acceptance of 1.06."""
    for gain in (4.0, -2.0):
        decided = router([gain], base=5.0)
        first, then = serve(decided, 64, MS, BAD), serve(decided, 640, MS, BAD)
        assert first["none"] >= 40
        # A draft takes 2 ms here and a round 5: every 40 rounds that is 1% of the time.
        assert then["none"] >= 0.99 * 640 and then["probes"] <= 640 / 40 + 1


def test_rows_that_no_drafter_knows_are_planned_again_only_after_a_probe() -> None:
    """A plan for each round took as long as all other routing, and came out the same."""
    decided = router([4.0], base=5.0)
    serve(decided, 400, MS, BAD)
    before = decided.score.num_reads
    probes = serve(decided, 400, MS, BAD)["probes"]
    # `serve` begins a request: that is one plan too, and what it is trusted with falls for a few rounds.
    assert probes >= 5 and probes <= decided.score.num_reads - before <= 3 * probes + 10
    length = 256 + 400
    decided.asleep = HostRows([0], [length])
    decided.route(HostRows([0], [length + 1]))
    assert decided.score.num_reads > before, "a length that does not follow is another request"


def test_the_target_runs_ahead_where_no_score_would_change_the_plan() -> None:
    """At most for STEPS_MS, and not for text that a drafter may know."""
    decided = router([4.0], cost_table(none=5.0))
    assert any(decided.route(rows(1))) and decided.ahead(rows(1)) == 1
    serve(decided, 400, MS, BAD)
    known = rows(1, context=256 + 400)
    assert not any(decided.route(known)) and decided.ahead(known) == MAX_STEPS
    decided.known.clear()
    for grid in decided.costs.rest.values():
        for cell, _ in grid.places():
            cell.ms = 0.4 * STEPS_MS / decided.costs.speed
    assert decided.ahead(known) == 2
    decided.next_trial = "none"
    decided.route(known)
    assert decided.ahead(known) == 1, "a trial is one round"


def test_steps_count_as_rounds() -> None:
    decided = router([0.0], cost_table(none=5.0))
    serve(decided, 400, MS, BAD)
    decided.asleep, decided.hopeless = rows(1), True
    before, ms = decided.without_drafts, decided.costs.round_ms({}, 1, 256)
    plan = decided.route(decided.asleep)
    decided.learn(decided.asleep, result(plan, [4])._replace(steps=4), 4 * ms)
    assert decided.without_drafts == before + 3  # and one in `probe`
    assert decided.costs.round_ms({}, 1, 256) == pytest.approx(ms, rel=0.05)
    assert decided.tokens == pytest.approx(1.0, abs=0.2)


def test_drafts_come_back_with_the_text_that_drafters_know() -> None:
    """All of it within 64 rounds, each time."""
    decided = router([-1.0], base=5.0)
    for _ in range(3):
        serve(decided, 64, MS, BAD)
        assert serve(decided, 200, MS, BAD)["none"] >= 195
        serve(decided, 64, MS, GOOD)
        assert serve(decided, 200, MS, GOOD)["none"] <= 5


def test_changing_batch_sizes_hide_nothing() -> None:
    """Rounds without drafts were counted by number of rows, so that a batch that changes waited many times as long."""
    decided = router([-1.0] * 9, base=5.0)
    for num_rows in range(1, 9):
        serve(decided, 30, MS, BAD, num_rows)
    probes = sum(serve(decided, 8, MS, BAD, 1 + turn % 8)["probes"] for turn in range(20))
    assert probes >= 160 // PROBE_EVERY


def test_a_probe_is_judged_by_what_the_target_says_next() -> None:
    decided = router([0.0])
    batch = rows(1)
    plan = decided.route(batch)
    before = decided.yields.expect(batch, [0.0])[0].trust["e3"]
    decided.learn(batch, result([None], [1], Probe("e3", 0, [0, 9, 0])), 5.0)
    assert decided.pending[0].drafts == [9, 0] and decided.pending[0].accepted == 1
    later = batch._replace(prefix_lens=[257])
    decided.route(later)
    decided.learn(later, result(plan, [2]), 10.0)
    assert not decided.pending
    assert decided.yields.expect(later._replace(prefix_lens=[259]), [0.0])[0].trust["e3"] < before


def test_a_probe_of_a_request_that_ended_says_nothing() -> None:
    decided = router([0.0])
    decided.route(rows(1))
    decided.learn(rows(1), result([None], [1], Probe("e3", 0, [0, 0, 0])), 5.0)
    ratio = decided.yields.places[None]["e3"].value
    other = rows(1, context=40)  # the slot's next request
    decided.route(other)
    decided.resolve(other, result([None], [1]))
    assert not decided.pending and decided.yields.places[None]["e3"].value == ratio


def test_probes_stop_where_nothing_may_be_drafted() -> None:
    decided = router([0.0])
    for _ in range(10 * PROBE_EVERY):
        batch = rows(1, [False])
        assert decided.probe(batch, decided.route(batch)) is None


@pytest.mark.parametrize("wrong", ["df", "e3", "none"])
def test_an_arm_that_looks_too_dear_is_tried_and_found_out(wrong: str) -> None:
    """One disturbed measurement kept an arm out for as long as the server lived."""
    decided = router([0.0 if wrong == "df" else 3.0], cost_table(**{**MS, wrong: 60 * MS[wrong]}))
    drafts = BAD if wrong == "none" else GOOD
    serve(decided, 3 * TRY_AFTER, MS, drafts)
    assert serve(decided, 200, MS, drafts)[wrong] >= 190


def test_confirmed_arms_are_tried_ever_more_seldom() -> None:
    decided = router([-1.0], base=6.0)
    counts = serve(decided, 40 * TRY_AFTER, MS, [0] * 6)
    assert 4 <= counts["e3"] <= 12 and 4 <= counts["none"] <= 12


def test_rows_that_may_not_be_drafted_for_stand_in_no_plan() -> None:
    decided = router([9.0, 9.0, 9.0])
    assert chosen(decided.route(rows(3, [True, False, True]))) == {"e3": [0, 2]}
    assert chosen(decided.route(rows(3, [False, False, False]))) == {}


@pytest.mark.parametrize(("gain", "prior", "drafter"), [(0.9, 0.3, "e3"), (1.1, -0.3, "df"), (1.1, 0.0, "e3")])
def test_a_prior_is_added_to_the_gain(gain: float, prior: float, drafter: str) -> None:
    for asked, learned in ((prior, 0.0), (0.0, prior), (2 * prior, -prior)):
        state = RowState("answer", "user", None, asked, "auto", learned)
        assert chosen(router([gain]).route(rows(1)._replace(states=(state,)))) == {drafter: [0]}


def test_a_prior_is_no_evidence() -> None:
    """What one client wishes for must not change what the server believes of everybody's drafts."""
    decided = router([0.0], cost_table(none=100.0), base=5.0)
    length = 256
    for _ in range(400):
        state = RowState("answer", "user", None, 16.0, "auto")
        asking = HostRows([0], [length], None, (state,))
        decided.learn(asking, result(decided.route(asking), [5]), 12.0)
        length += 5
    (row,) = decided.yields.expect(HostRows([0], [length], None, (state._replace(asked_prior=0.0),)), [0.0])
    assert row.tokens == pytest.approx({"df": 5.0, "e3": 5.0}, abs=0.2)


def test_the_rate_is_that_of_the_rounds() -> None:
    decided = router([0.0])
    length = 256
    for _ in range(1600):
        batch = HostRows([0], [length])
        decided.learn(batch, result(decided.route(batch), [6]), 8.0)
        length += 6 if length < 400 else -144
    assert decided.rate(decided.routed, 256) == pytest.approx(6 / 8, rel=0.1)


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
    plan = chosen(decided.route(rows(n)))
    expected = [row.tokens for row in decided.routed]
    rate = decided.rate(decided.routed, 256)

    def worth(assignment: tuple[str, ...]) -> float:
        counts = {"df": assignment.count("df"), "e3": assignment.count("e3")}
        tokens = sum(row[name] for row, name in zip(expected, assignment, strict=True))
        return tokens - rate * costs.round_ms(counts, n, 256)

    best = max(worth(assignment) for assignment in itertools.product(("df", "e3"), repeat=n))
    best = max(best, n - rate * costs.round_ms({}, n, 256))
    if plan:
        named = {row: name for name, index in plan.items() for row in index}
        found = worth(tuple(named[row] for row in range(n)))
    else:
        found = n - rate * costs.round_ms({}, n, 256)
    assert found == pytest.approx(best, abs=1e-4)
