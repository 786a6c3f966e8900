"""The cost table: what it says between its places, how it is filled, and how it follows the machine."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tests.learned import cost_table
from whiflash_sglang.routing.costs import BUDGET_S, NONE, Measured, RoundCosts, is_table, measure, places


def test_a_round_is_its_drafts_and_the_rest_of_the_widest() -> None:
    costs = cost_table(df=10.0, e3=12.0, none=5.0)
    assert costs.round_ms({"df": 1}, 1, 256) == pytest.approx(10.0)
    assert costs.round_ms({"e3": 1}, 1, 256) == pytest.approx(12.0)
    assert costs.round_ms({}, 1, 256) == pytest.approx(5.0)
    # Both draft, and the verify is as wide as df's: 2 + 4 + 8.
    assert costs.round_ms({"df": 1, "e3": 1}, 2, 256) == pytest.approx(14.0)
    assert costs.round_ms({"df": 0, "e3": 2}, 2, 256) == pytest.approx(12.0), "a drafter without rows costs nothing"


def test_lines_between_and_beyond_the_measured_places() -> None:
    costs = RoundCosts({"df": 8}, (1, 4), (100, 1100))
    for rows, context in itertools.product((1, 4), (100, 1100)):
        costs.set_round("df", rows, context, 1.0, rows * context / 100)
        costs.set_round(NONE, rows, context, 0.0, 1.0)
    assert costs.round_ms({"df": 4}, 4, 1100) == pytest.approx(1 + 44)
    assert costs.round_ms({"df": 2}, 2, 600) == pytest.approx(1 + 2 * 6)
    assert costs.round_ms({"df": 8}, 8, 100) == pytest.approx(1 + 8)
    assert costs.round_ms({"df": 1}, 1, 2100) == pytest.approx(1 + 21)


def test_a_falling_line_never_says_that_a_round_is_free() -> None:
    costs = RoundCosts({"df": 8}, (1, 2), (100,))
    costs.set_round("df", 1, 100, 1.0, 9.0)
    costs.set_round("df", 2, 100, 1.0, 6.0)  # noise
    assert costs.round_ms({"df": 64}, 64, 100) >= 3.0


def test_the_table_follows_the_machine_but_not_a_pause() -> None:
    costs = cost_table(df=10.0, none=5.0)
    for _ in range(30):
        costs.observe({"df": 1}, 1, 256, ms=10.0)
        costs.observe({}, 1, 256, ms=5.0)
    for _ in range(200):
        costs.observe({"df": 1}, 1, 256, ms=15.0)
    assert costs.round_ms({"df": 1}, 1, 256) == pytest.approx(15.0, rel=0.01)
    assert costs.round_ms({}, 1, 256) == pytest.approx(7.5, rel=0.15), "a slow machine is slow for all rounds"
    assert costs.round_ms({"df": 16}, 16, 256) == pytest.approx(15.0, rel=0.15), "of any number of rows"
    before = costs.round_ms({"df": 1}, 1, 256)
    costs.observe({"df": 1}, 1, 256, ms=5000.0)
    assert costs.round_ms({"df": 1}, 1, 256) < 1.15 * before, "and not five hundred times as much"


def test_a_drafter_that_is_dearer_than_measured_is_found_out() -> None:
    """Rounds of both: what one takes more than the table says ends at that one, and not at the machine."""
    costs = cost_table(df=10.0, e3=12.0)
    for _ in range(600):
        costs.observe({"df": 1}, 1, 256, ms=10.0)
        costs.observe({"e3": 1}, 1, 256, ms=18.0)
    assert costs.round_ms({"df": 1}, 1, 256) == pytest.approx(10.0, rel=0.05)
    assert costs.round_ms({"e3": 1}, 1, 256) == pytest.approx(18.0, rel=0.05)


def test_measuring_fills_every_place_and_takes_the_quickest_run() -> None:
    costs = RoundCosts({"df": 8, "e3": 6}, (1, 4), (256,))
    noise = itertools.cycle([3.0, 1.0, 2.0])
    seen = []

    def run(name: str, rows: int, context: int) -> tuple[float, float]:
        seen.append((name, rows, context))
        draft = {"df": 0.001, "e3": 0.002, NONE: 0.0}[name]
        return draft, draft + 0.004 * rows * next(noise)

    measure(costs, run)
    assert set(seen) == set(itertools.product(("df", "e3", NONE), (1, 4), (256,)))
    assert costs.round_ms({"df": 1}, 1, 256) == pytest.approx(1 + 4)
    assert costs.round_ms({"e3": 4}, 4, 256) == pytest.approx(2 + 16)
    assert costs.snapshot()["none"]["4"]["256"] == pytest.approx(16)


def test_measuring_is_bounded_and_says_how_far_it_is() -> None:
    """A table of slow rounds took as long as it took; what was not reached has a cost all the same."""
    costs = RoundCosts({"df": 8, "e3": 6}, (1, 16), (256, 4096))
    told: list[float] = []
    measured = measure(costs, lambda name, rows, context: (0.05, 0.1 * rows), told.append)
    assert measured.seconds <= BUDGET_S + 1.6
    assert measured.passes == 0 and measured.disturbed
    assert told == sorted(told) and told[-1] >= 1.0
    assert all(0 < ms < math.inf for by in costs.snapshot().values() for row in by.values() for ms in row.values())
    assert costs.round_ms({"e3": 16}, 16, 4096) <= 16 * 16 * costs.round_ms({"e3": 1}, 1, 256) + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_a_disturbed_measurement_is_monotone(seed: int) -> None:
    """One pause of half a second was kept as what a round of one row costs."""
    chance = random.Random(seed)
    costs = RoundCosts({"df": 8, "e3": 6}, (1, 4, 16), (256, 1024, 4096))

    def run(name: str, rows: int, context: int) -> tuple[float, float]:
        draft = {"df": 0.003, "e3": 0.005, NONE: 0.0}[name] * rows**0.5
        rest = 0.004 * (costs.widths[name] * rows * context / 256) ** 0.3
        return draft, draft + rest + (0.5 if chance.random() < 0.1 else 0.0)

    measure(costs, run)
    for rows, context in itertools.product(costs.batch_sizes, costs.contexts):
        cells = {name: grid.cell(rows, context).ms for name, grid in costs.rest.items()}
        assert cells[NONE] <= cells["e3"] <= cells["df"]
        assert cells["df"] < 3 * 4 * (8 * rows * context / 256) ** 0.3
    for grid in (*costs.rest.values(), *costs.draft.values()):
        rows_of = [[cell.ms for cell in cells] for cells in grid.cells]
        assert all(row == sorted(row) for row in rows_of)
        assert all([*column] == sorted(column) for column in zip(*rows_of, strict=True))


def test_a_busy_machine_is_told_from_a_quiet_one() -> None:
    def measured(noise: float) -> Measured:
        chance = random.Random(0)
        costs = RoundCosts({"df": 8}, (1, 4), (256, 1024))
        return measure(costs, lambda name, rows, context: (0.0, 0.01 * (1 + noise * chance.random())))

    assert measured(0.1).disturbed is None
    assert measured(5.0).disturbed


@pytest.mark.parametrize("seed", range(8))
def test_a_table_of_nonsense_is_right_after_some_rounds_of_each_kind(seed: int) -> None:
    chance = random.Random(seed)
    true, costs = cost_table(df=10.0, e3=12.0, none=5.0, per_row=0.5), cost_table()
    for grid in (*costs.rest.values(), *costs.draft.values()):
        for cell, _ in grid.places():
            cell.ms *= 10 ** chance.uniform(-2, 2)
    plans: list[tuple[dict[str, int], int]] = [({"df": n}, n) for n in (1, 3, 8)] + [({"e3": n}, n) for n in (1, 8)]
    plans += [({}, n) for n in (1, 3, 8)] + [({"df": 4, "e3": 4}, 8)]
    for _ in range(50):
        for counts, rows in plans:
            context = chance.choice((300, 700, 1500))
            costs.observe(counts, rows, context, true.round_ms(counts, rows, context) * chance.lognormvariate(0, 0.1))
    for counts, rows in plans:
        assert costs.round_ms(counts, rows, 700) == pytest.approx(true.round_ms(counts, rows, 700), rel=0.3)
    assert costs.health()["wrong"] > 0


def test_what_was_not_seen_is_kept_within_what_was() -> None:
    """A verify of eight tokens takes at most eight times as long as one of one, whatever the start measured."""
    costs = cost_table(none=5.0)
    costs.rest["df"].cell(1, 256).ms = 5000.0
    costs.rest["df"].cell(4, 256).ms = 0.001
    for _ in range(4):
        costs.observe({}, 1, 256, ms=5.0)
    assert costs.rest["df"].cell(1, 256).ms <= 8 * 5.5
    assert costs.rest["df"].cell(4, 256).ms >= 4.5


def test_a_quiet_table_lends_its_shape() -> None:
    """Of a machine that is twice as fast, measured at other places."""
    costs = cost_table(df=10.0, e3=12.0, none=5.0, per_row=1.0)
    quiet = {
        name: {str(n): {str(at): ms / 2 + (n - 1) / 2 * (name != NONE) for at in (512, 2048)} for n in (1, 16)}
        for name, ms in {"df": 10.0, "e3": 12.0, NONE: 5.0}.items()
    }
    assert is_table(quiet)
    for context in costs.contexts:
        costs.rest["df"].cell(4, context).ms = 700.0  # disturbed
    costs.adopt(quiet)
    assert costs.round_ms({"df": 4}, 4, 256) == pytest.approx(13.0, rel=0.05)
    assert costs.round_ms({}, 1, 256) == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize(
    "value", [None, {}, {"none": {"1": {"256": 0.0}}}, {"none": {"a": {"256": 1.0}}}, {"df": 1}, []]
)
def test_what_is_no_table(value: object) -> None:
    assert not is_table(value)


def test_places() -> None:
    assert places(16, (1, 4, 16, 64)) == (1, 4, 16)
    assert places(10, (1, 4, 16, 64)) == (1, 4, 10)
    assert places(1, (1, 4)) == (1,)
