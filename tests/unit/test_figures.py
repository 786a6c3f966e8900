"""Figures of turns: percentiles, depth, objectives, and what speculation adds up to."""

from __future__ import annotations

from typing import Any

import pytest

from whiflash_workloads import slo
from whiflash_workloads.figures import (
    by_depth,
    depth_label,
    depth_labels,
    latencies,
    percentiles,
    quantiles,
    speculation,
)
from whiflash_workloads.report import Report, Turn, merge
from whiflash_workloads.speculation import RequestFigures


def turn(**changes: Any) -> Turn:
    made: dict[str, Any] = dict.fromkeys(("ttft_s", "tpot_s", "error"))
    made |= {"session_id": "s", "index": 2, "text": "", "prompt_tokens": 100, "cached_tokens": 40}
    return Turn(**(made | {"completion_tokens": 10, "cut_turns": 0, "shortened": False} | changes))


def said(**changes: Any) -> RequestFigures:
    """Four rounds that committed ten tokens."""
    made = {
        "rounds": 4,
        "rounds_by_drafter": {"df": 3, "e3": 1},
        "accepted_by_drafter": {"df": 6},
        "by_span": {"reasoning": {"rounds": 3, "tokens": 6}, "tool_call": {"rounds": 1, "tokens": 4}},
        "context_kind": "user",
    }
    return RequestFigures.model_validate(made | changes)


# Latencies


def test_every_latency_is_of_its_own_samples() -> None:
    """ITL has one for each gap, and a turn without a time does not count as nought."""
    turns = [turn(ttft_s=0.2, tpot_s=0.01, e2e_s=1.0, gaps_s=(0.03, 0.01)), turn(ttft_s=0.1, gaps_s=(0.02,))]
    assert latencies(turns) == {"ttft_ms": [100, 200], "tpot_ms": [10], "itl_ms": [10, 20, 30], "e2e_ms": [1000]}


def test_percentiles() -> None:
    values = [float(i) for i in range(101)]
    assert quantiles(values) == values
    assert percentiles("x", values) == {"x_p50": 50.0, "x_p95": 95.0, "x_p99": 99.0}
    assert percentiles("x", [3.0]) == {"x_p50": 3.0, "x_p95": 3.0, "x_p99": 3.0}
    assert percentiles("x", []) == {"x_p50": None, "x_p95": None, "x_p99": None}


# Depth


def test_depths() -> None:
    assert depth_labels() == ["1", "2", "3-4", "5-8", "9-16", "17+"]
    found = {depth: depth_label(depth) for depth in (1, 2, 3, 4, 5, 8, 9, 16, 17, 400)}
    assert list(found.values()) == ["1", "2", "3-4", "3-4", "5-8", "5-8", "9-16", "9-16", "17+", "17+"]


def test_the_cache_by_depth() -> None:
    turns = [turn(depth=1, cached_tokens=0, ttft_s=0.3), turn(depth=3), turn(depth=4, cached_tokens=80)]
    assert by_depth(turns) == {
        "1": {"turns": 1, "prompt_tokens": 100, "cached_tokens": 0, "cached_share": 0.0, "ttft_ms_p50": 300.0},
        "3-4": {"turns": 2, "prompt_tokens": 200, "cached_tokens": 120, "cached_share": 0.6, "ttft_ms_p50": None},
    }


# Objectives


def test_goodput_is_of_turns_that_keep_every_limit() -> None:
    limits = slo.parse("ttft_ms=500,tpot_ms=30, e2e_ms=2000")
    assert limits == {"ttft_ms": 500, "tpot_ms": 30, "e2e_ms": 2000}
    good = turn(ttft_s=0.5, tpot_s=0.03, e2e_s=2.0)
    one_token = turn(ttft_s=0.1, tpot_s=None, e2e_s=0.1)
    late, slow = turn(ttft_s=0.51, tpot_s=0.01, e2e_s=1.0), turn(ttft_s=0.1, tpot_s=0.04, e2e_s=1.0)
    failed = turn(error="500")
    report = Report("x", (good, one_token, late, slow, failed), 10.0, None, limits=limits)
    assert report.figures()["goodput"] == {"limits": limits, "turns": 2, "share": 0.4, "turns_per_s": 0.2}
    assert merge([report, report]).figures()["goodput"]["turns_per_s"] == 0.2
    assert Report("x", (good,), 1.0, None).figures()["goodput"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft=500", "`ttft` is not an objective; use ttft_ms=MS, tpot_ms=MS, e2e_ms=MS"),
        ("", "`` is not an objective"),
        ("ttft_ms=500,", "`` is not an objective"),
        ("ttft_ms=500,ttft_ms=400", "`ttft_ms` is given twice"),
        ("ttft_ms=0", "`ttft_ms=0`: `0` is not a number of milliseconds above 0; give e.g. ttft_ms=500"),
        ("ttft_ms", "`ttft_ms=`: `` is not a number"),
        ("e2e_ms=nan", "`e2e_ms=nan`: `nan` is not a number"),
    ],
)
def test_other_objectives_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        slo.parse(text)
    assert message in str(error.value)


# Speculation


def test_al_is_of_all_rounds_not_of_turns() -> None:
    """A turn of one round with many drafts must not weigh as much as one of a hundred."""
    short = said(
        rounds=1,
        rounds_by_drafter={"df": 1},
        accepted_by_drafter={"df": 15},
        by_span={"tool_call": {"rounds": 1, "tokens": 16}},
        context_kind="tool_output",
        tool="find_order",
    )
    found = speculation([turn(speculation=said()), turn(speculation=short), turn()], None)
    assert found == {
        "turns": 2,
        "by_drafter": {
            "df": {"rounds": 4, "tokens": 25, "acceptance_length": 6.25},
            "e3": {"rounds": 1, "tokens": 1, "acceptance_length": 1.0},
        },
        "by_span": {
            "reasoning": {"rounds": 3, "tokens": 6, "acceptance_length": 2.0},
            "tool_call": {"rounds": 2, "tokens": 20, "acceptance_length": 10.0},
        },
        "by_context_kind": {
            "user": {"rounds": 4, "tokens": 10, "acceptance_length": 2.5},
            "tool_output": {"rounds": 1, "tokens": 16, "acceptance_length": 16.0},
        },
        "by_tool": {"find_order": {"rounds": 1, "tokens": 16, "acceptance_length": 16.0}},
    }


def test_without_figures_of_turns_al_by_drafter_is_that_of_the_totals() -> None:
    totals = {"rounds_by_drafter": {"df": 10}, "accepted_by_drafter": {"df": 25}}
    found = speculation([turn()], totals)
    assert found["by_drafter"] == {"df": {"rounds": 10, "tokens": 35, "acceptance_length": 3.5}}
    assert (found["turns"], found["by_span"]) == (0, {})
    assert speculation([turn()], None)["by_drafter"] == {}


def test_what_a_newer_server_says_more_is_left_aside() -> None:
    assert said(catch_up={"passes": 3}, by_kind={"x": 1}) == said()
