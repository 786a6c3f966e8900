"""Figures of several replicas as one."""

from __future__ import annotations

import pytest

from tests.unit.test_round import config
from whiflash_sglang.bridge.replicas import together
from whiflash_sglang.serving.totals import Totals


def test_counts_add_up_and_the_rest_is_what_it_says() -> None:
    one = {
        "rounds": 4,
        "by": {"df": 3, "e3": 1},
        "backlog_max": 9,
        "backlog_mean": 2.0,
        "round_ms": {"df": {"1": 10.0}},
    }
    other = {"rounds": 2, "by": {"df": 2}, "backlog_max": 4, "backlog_mean": 4.0, "round_ms": {"df": {"1": 20.0}}}
    assert together([one, other]) == {
        "rounds": 6,
        "by": {"df": 5, "e3": 1},
        "backlog_max": 9,
        "backlog_mean": 3.0,
        "round_ms": {"df": {"1": 15.0}},
    }


@pytest.mark.parametrize("replicas", [1, 2])
def test_real_figures_can_be_added(replicas: int) -> None:
    """Every figure of a server is a number or a dict of them; a list among them once ended a replay."""
    figures = Totals(config("entropy").drafter_names).snapshot()
    assert together([figures] * replicas).keys() == figures.keys()
