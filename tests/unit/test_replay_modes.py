"""Live history, open loop, tool times, warm-up, markers, retries and the figures of single turns, on a stub server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.sessions import CALL, session
from tests.stub_server import StubServer
from whiflash_workloads import client, runner
from whiflash_workloads import replay as module
from whiflash_workloads.pacing import Arrivals
from whiflash_workloads.replay import replay
from whiflash_workloads.schema import Session


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.01)


def with_tool_time(seconds: float | None) -> Session:
    messages = session().model_dump(exclude_none=True)["messages"]
    messages[3] |= {"tool_duration_s": seconds}
    return session(messages=messages)


def write(path: Path, *sessions: Session) -> Path:
    path.write_text("".join(each.model_dump_json(exclude_none=True) + "\n" for each in sessions))
    return path


def run_main(*arguments: object) -> int:
    return module.main([str(argument) for argument in arguments])


# History


def test_live_history() -> None:
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "Look it up."},
        {"tool_calls": [{"index": 0, "id": "own", "function": {"name": "find_order", "arguments": '{"id"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 7}"}}]},
    ]
    with StubServer(deltas=deltas) as stub:
        report = replay([session()], stub.base_url, live=True)
    asked = stub.requests[1]["messages"]
    assert asked[2]["reasoning_content"] == "Look it up."
    (call,) = asked[2]["tool_calls"]
    assert (call["id"], call["function"]) == ("call-1", {"name": "find_order", "arguments": '{"id": 7}'})
    assert asked[3]["tool_call_id"] == "call-1"
    assert report.divergences == 1  # the last reply calls a tool where the recorded one did not


def test_a_live_turn_that_fails_leaves_the_recorded_message() -> None:
    with StubServer(fail={0: "500"}) as stub:
        replay([session()], stub.base_url, live=True)
    assert stub.requests[1]["messages"][2]["tool_calls"] == [CALL]


def test_long_live_prompts_are_cut() -> None:
    with StubServer(context=60, answer_words=30) as stub:
        report = replay([session(words=20)], stub.base_url, live=True, max_tokens=20)
    assert [turn.error for turn in report.turns] == [None, None]
    assert report.turns[1].prompt_tokens + 20 <= 60
    assert report.figures()["cut_prompts"] + report.figures()["shortened_prompts"] > 0


# Load


def test_sessions_of_an_open_loop_do_not_wait_for_each_other() -> None:
    with StubServer(delay=0.1) as stub:
        report = replay([session(str(i)) for i in range(8)], stub.base_url, arrivals=Arrivals(rate=100))
    assert [turn.error for turn in report.turns] == [None] * 16
    assert stub.most_in_flight > 4


def test_recorded_arrivals_keep_their_times() -> None:
    sessions = [
        session(
            name, messages=[{"role": "user", "content": name, "timestamp_s": at}, {"role": "assistant", "content": ""}]
        )
        for name, at in (("late", 1000.5), ("early", 1000.0))
    ]
    with StubServer() as stub:
        report = replay(sessions, stub.base_url, arrivals=Arrivals())
    assert [body["messages"][0]["content"] for body in stub.requests] == ["early", "late"]
    assert report.wall_s >= 0.5
    assert [turn.session_id for turn in report.turns] == ["late", "early"]  # in the order of the file


def test_tools_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float, sleep: Any = asyncio.sleep) -> None:
        slept.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(runner.asyncio, "sleep", sleep)
    with StubServer() as stub:
        slow = replay([with_tool_time(2.0)], stub.base_url, tool_scale=0.5)
        assert 1.0 in slept and slow.wall_s >= 1.0
        slept.clear()
        replay([with_tool_time(2.0)], stub.base_url)
    assert not any(slept)
    # It is not the server's time.
    assert sum(turn.e2e_s or 0.0 for turn in slow.turns) <= slow.wall_s - 1.0


def test_the_warm_up_is_played_but_not_counted() -> None:
    sessions = [session(str(i)) for i in range(3)]
    with StubServer() as stub:
        report = replay(sessions, stub.base_url, warm_up=1, turn_figures=True)
    assert len(stub.requests) == 6
    assert [turn.session_id for turn in report.turns] == ["1", "1", "2", "2"]
    assert report.figures()["rounds"] == 8
    assert report.figures()["not_asked"] == 0
    assert len(stub.asked_figures) == 4


def test_a_server_that_goes_in_the_warm_up_leaves_an_empty_report() -> None:
    with StubServer() as stub:
        stub.gone_after = 1
        report = replay([session(), session("t")], stub.base_url, warm_up=1, retries=0)
    assert report.figures()["ending"] == "server gone"
    assert (report.figures()["turns"], report.figures()["not_asked"]) == (0, 2)


def test_the_marker_is_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, markers = write(tmp_path / "trace.jsonl", session()), []
    with StubServer() as stub:
        for _ in range(2):
            assert run_main(trace, "--base-url", stub.base_url, "--cache-bust") == 0
            markers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["arguments"]["marker"])
    firsts = [body["messages"][0]["content"] for body in stub.requests]
    assert firsts == [f"{marker}\nYou help." for marker in markers for _ in range(2)]
    assert markers[0] != markers[1]


# Order and numbers


def test_sessions_with_the_same_id_are_kept_apart() -> None:
    """The same file given twice doubles the load; a session is whole when its own turns are."""
    with StubServer(fail={1: "500"}) as stub:
        report = replay([session(), session()], stub.base_url)
    assert [(turn.session, turn.depth) for turn in report.turns] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert report.whole_sessions == 1
    assert report.figures()["sessions_per_hour"] == pytest.approx(3600 / report.wall_s, rel=0.01)


def test_times_add_up() -> None:
    with StubServer(delay=0.03, answer_words=9) as stub:
        first, *_ = replay([session()], stub.base_url).turns
    assert first.ttft_s is not None and first.e2e_s is not None
    assert len(first.gaps_s) == 2  # three pieces
    assert first.ttft_s + sum(first.gaps_s) <= first.e2e_s


# Failing connections


def test_a_connection_that_fails_is_tried_again() -> None:
    with StubServer() as stub:
        stub.refuse = {0, 1}
        report = replay([session()], stub.base_url, retries=2)
    assert [turn.error for turn in report.turns] == [None, None]
    assert [turn.retries for turn in report.turns] == [2, 0]
    assert report.figures()["retries"] == 2
    assert stub.connections == 4


def test_retries_have_a_limit() -> None:
    """The server still answers otherwise, so that the replay goes on."""
    with StubServer() as stub:
        stub.refuse = {0, 1}
        report = replay([session()], stub.base_url, retries=1)
    first, second = report.turns
    assert first.error is not None and first.error.startswith("APIConnectionError") and first.retries == 1
    assert second.error is None
    assert report.ending == "complete"


@pytest.mark.parametrize("how", ["500", "drop", "cut"])
def test_what_has_been_reached_is_not_asked_again(how: Any) -> None:
    with StubServer(fail={0: how}) as stub:
        report = replay([session()], stub.base_url, retries=5)
    assert stub.connections == 2
    assert report.figures()["retries"] == 0


def test_the_command_says_what_was_done_until_the_server_was_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = write(tmp_path / "trace.jsonl", *(session(str(i)) for i in range(3))), tmp_path / "out.json"
    with StubServer() as stub:
        stub.gone_after = 3
        assert run_main(trace, "--base-url", stub.base_url, "--json-out", out) == 1
    captured = capsys.readouterr()
    assert "note: stopped, because the server no longer responds: 4 turns done, 2 not started; 1 sessions complete" in (
        captured.err
    )
    figures = json.loads(captured.out.splitlines()[-1])["figures"]
    assert (figures["ending"], figures["failed"], figures["completion_tokens"]) == ("server gone", 1, 18)
    assert json.loads(out.read_text())["figures"] == figures


# Figures of single turns


def test_the_figures_of_every_turn() -> None:
    with StubServer() as stub:
        report = replay([session()], stub.base_url, turn_figures=True)
    assert stub.asked_figures == ["answer-0", "answer-1"]
    assert "custom_params" not in stub.requests[0]
    found = report.figures()["speculation"]
    # A first word, then three words by df as reasoning, then two by e3 as answer.
    assert found["by_drafter"]["df"] == {"rounds": 2, "tokens": 6, "acceptance_length": 3.0}
    assert found["by_span"]["answer"] == {"rounds": 2, "tokens": 4, "acceptance_length": 2.0}
    assert found["by_context_kind"] == {"user": {"rounds": 4, "tokens": 10, "acceptance_length": 2.5}}


def test_only_the_first_turns_are_traced() -> None:
    with StubServer() as stub:
        report = replay([session("a"), session("b")], stub.base_url, turn_figures=True, token_views=3, concurrency=2)
    traced = [(turn.session_id, turn.index) for turn in report.turns if turn.speculation and turn.speculation.trace]
    assert traced == [("a", 2), ("a", 4), ("b", 2)]
    assert sum("custom_params" in body for body in stub.requests) == 3
    trace = report.turns[0].speculation
    assert trace is not None and trace.trace is not None and trace.first == "word-1 "
    assert [each.tokens for each in trace.trace] == [["word-2 ", "word-3 ", "word-4 "], ["word-5 ", "word-6 "]]


def test_a_server_that_is_not_whiflash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "trace.jsonl", session())
    with StubServer(speculates=False) as stub:
        assert run_main(trace, "--base-url", stub.base_url, "--json-out", tmp_path / "out.json") == 0
    captured = capsys.readouterr()
    assert "note: the server reports no speculation figures (it is not WhiFlash)" in captured.err
    assert stub.asked_figures == [] and not any("custom_params" in body for body in stub.requests)
    figures = json.loads(captured.out.splitlines()[-1])["figures"]
    assert figures["speculation"] == {"turns": 0, "by_drafter": {}, "by_span": {}, "by_context_kind": {}, "by_tool": {}}


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (None, "HTTP 404"),
        ("{", "field (whole): Invalid JSON"),
        ('{"rounds": 1}', "field rounds_by_drafter: Field required"),
    ],
)
def test_figures_that_are_missing_are_no_error(
    says: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server forgets old requests, or is of another version; what is missing is said, with the first reason."""
    trace = write(tmp_path / "trace.jsonl", session())
    with StubServer(says=says, forgets=says is None) as stub:
        assert run_main(trace, "--base-url", stub.base_url) == 0
    captured = capsys.readouterr()
    assert f"note: no speculation figures for 2 turns (first reason: {said}" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["figures"]["rounds"] == 4


def test_figures_are_not_asked_for_where_they_are_not_wanted(tmp_path: Path) -> None:
    trace, out = write(tmp_path / "trace.jsonl", session()), tmp_path / "out.json"
    with StubServer() as stub:
        assert run_main(trace, "--base-url", stub.base_url, "--no-turn-figures", "--json-out", out) == 0
    assert stub.asked_figures == []


# Flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arrivals", "fast"], "argument --arrivals: `fast` is neither recorded nor poisson:RATE"),
        (["--tool-time", "slow"], "argument --tool-time: `slow` is not one of recorded, zero, scale:X"),
        (["--slo", "ttft=1"], "argument --slo: `ttft` is not an objective"),
        (
            ["--arrivals", "poisson:1", "--concurrency", "2"],
            "argument --concurrency: 2: conflicts with --arrivals",
        ),
        (["--no-turn-figures", "--token-views", "2"], "argument --token-views: 2: needs the figures of each turn"),
        (["--warm-up", "-1"], "argument --warm-up: `-1` is not a whole number of at least 0"),
        (["--report", "/"], "argument --report: /: is a folder; give a file"),
        (["--history", "none"], "argument --history: invalid choice"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_main("trace.jsonl", "--base-url=http://127.0.0.1:9", *flags)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--warm-up", "1"], "error: --warm-up 1: leaves none of 1 sessions to count; give less, or more traces"),
        (
            ["--tool-time", "recorded"],
            "error: --tool-time: no tool output of the traces has a tool_duration_s; give zero",
        ),
        (["--arrivals", "recorded"], "error: --arrivals recorded: the first message of session `s` has no timestamp_s"),
    ],
)
def test_what_traces_do_not_have_is_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write(tmp_path / "trace.jsonl", session())
    assert run_main(trace, "--base-url=http://127.0.0.1:9", *flags) == 2
    assert capsys.readouterr().err.startswith(said)


def test_the_tables_show_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "trace.jsonl", session())
    with StubServer() as stub:
        assert run_main(trace, "--base-url", stub.base_url, "--slo", "e2e_ms=60000") == 0
    printed = capsys.readouterr().out
    for title in ("Latency, ms", "Prompts by depth", "Acceptance length", "Goodput (e2e_ms=60000)"):
        assert title in printed
    assert "100.0%" in printed
