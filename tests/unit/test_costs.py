"""The cost table: what it says between its places, how it is filled, and how it follows the machine."""

from __future__ import annotations

import itertools

import pytest

from tests.learned import cost_table
from whiflash_sglang.costs import NONE, RoundCosts, measure, places


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
    for _ in range(200):
        costs.observe({"df": 1}, 1, 256, ms=15.0)
    assert costs.round_ms({"df": 1}, 1, 256) == pytest.approx(15.0, rel=0.01)
    assert costs.round_ms({}, 1, 256) == pytest.approx(7.5, rel=0.1), "a slow machine is slow for all rounds"
    assert costs.round_ms({"df": 16}, 16, 256) == pytest.approx(10.0), "of that many rows"
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


def test_places() -> None:
    assert places(16, (1, 4, 16, 64)) == (1, 4, 16)
    assert places(10, (1, 4, 16, 64)) == (1, 4, 10)
    assert places(1, (1, 4)) == (1,)
