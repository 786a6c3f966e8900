"""When sessions start, and how long tools take."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest

from tests.sessions import CALL, session
from whiflash_workloads.pacing import Arrivals, parse_arrivals, parse_tool_time, tool_pause, untimed_outputs


def timed(name: str, start: float | None) -> Any:
    messages = [{"role": "user", "content": "Hello", "timestamp_s": start}, {"role": "assistant", "content": "Hi"}]
    return session(name, messages=messages)


def with_tools(*durations: float | None) -> Any:
    """A turn with a call for each duration, and the turn that follows them at the last message."""
    calls = [CALL | {"id": f"call-{i}"} for i in range(len(durations))]
    outputs = [
        {"role": "tool", "tool_call_id": f"call-{i}", "content": "{}", "tool_duration_s": seconds}
        for i, seconds in enumerate(durations)
    ]
    asked = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    return session(messages=[*asked, *outputs, {"role": "assistant", "content": "Done."}])


def test_recorded_starts_count_from_the_earliest() -> None:
    sessions = [timed("b", 107.5), timed("a", 100.0), timed("c", 130.0)]
    assert parse_arrivals("recorded").starts(sessions, seed=0) == [7.5, 0.0, 30.0]


def test_recorded_starts_need_times() -> None:
    with pytest.raises(
        ValueError, match="--arrivals recorded: the first message of session `b` has no timestamp_s; give"
    ):
        Arrivals().starts([timed("a", 1.0), timed("b", None)], seed=0)


def test_poisson_starts_are_seeded_and_have_the_rate() -> None:
    arrivals, sessions = parse_arrivals("poisson:4"), [session()] * 4000
    starts = arrivals.starts(sessions, seed=1)
    assert starts == arrivals.starts(sessions, seed=1) != arrivals.starts(sessions, seed=2)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.08)  # as wide as its mean: not a fixed beat


@pytest.mark.parametrize(
    "text", ["poisson", "poisson:", "poisson:0", "poisson:-1", "poisson:nan", "poisson:inf", "fast", "fast:1"]
)
def test_other_arrivals_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"`{text}` is neither recorded nor poisson:RATE .*; give e.g. poisson:0.5"):
        parse_arrivals(text)


@pytest.mark.parametrize(("text", "scale"), [("recorded", 1.0), ("zero", 0.0), ("scale:0.1", 0.1), ("scale:0", 0.0)])
def test_tool_time(text: str, scale: float) -> None:
    assert parse_tool_time(text) == scale


@pytest.mark.parametrize("text", ["scale", "scale:", "scale:-1", "scale:nan", "half", "2"])
def test_other_tool_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"`{text}` is not one of recorded, zero, scale:X; give e.g. scale:0.1"):
        parse_tool_time(text)


def test_calls_of_one_message_run_side_by_side() -> None:
    recorded = with_tools(0.5, 2.0, None)
    assert tool_pause(recorded, 5, 1.0) == 2.0
    assert tool_pause(recorded, 5, 0.1) == pytest.approx(0.2)
    assert tool_pause(recorded, 5, 0.0) == 0.0


def test_a_turn_that_follows_no_tool_does_not_wait() -> None:
    assert tool_pause(with_tools(3.0), 1, 1.0) == 0.0


def test_outputs_without_a_duration_are_counted() -> None:
    assert untimed_outputs([with_tools(0.5, None), with_tools(None)]) == (2, 3)
