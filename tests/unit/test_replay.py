"""The replay against a stub server: what it asks, what it measures, what it survives, and how the command ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sessions import CALL, TOOL, session
from tests.stub_server import StubServer
from whiflash_workloads import replay as module
from whiflash_workloads.fitting import MARK, PromptTooLong, fit
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.provenance import provenance
from whiflash_workloads.replay import Report, merge, replay, table
from whiflash_workloads.report import Turn

ALL_WORDS = " ".join(f"word-{i}" for i in range(1, 7))


def turn(**changes: Any) -> Turn:
    made = Turn(
        session_id="s",
        index=2,
        text="text",
        prompt_tokens=100,
        cached_tokens=40,
        completion_tokens=10,
        ttft_s=0.1,
        tpot_s=0.01,
        cut_turns=0,
        shortened=False,
        error=None,
    )
    return replace(made, **changes)


TOTALS = {
    "rounds": 10,
    "rounds_by_drafter": {"df": 6, "e3": 4},
    "accepted_drafts": 25,
    "drafted": 50,
    "switches": 3,
    "steps": 10,
    "seconds": {
        "draft": 1.0,
        "verify": 2.0,
        "catch_up": 0.5,
        "prefill_drafters": 0.0,
        "prefill": 0.5,
        "read": 0.0,
        "round": 4.0,
    },
}


# What is asked


def test_the_recorded_history_is_forced() -> None:
    with StubServer() as stub:
        report = replay([session()], stub.base_url)
    first, second = stub.requests
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "tool"]
    assert second["messages"][2]["tool_calls"] == [CALL]
    assert report.texts() == {("s", 2): ALL_WORDS, ("s", 4): ALL_WORDS}


def test_what_a_request_carries() -> None:
    with StubServer() as stub:
        replay([session(), session("no tools", tools=[])], stub.base_url, max_tokens=17, temperature=0.5)
    body = stub.requests[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("stub", 17, 0.5)
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["tools"] == [TOOL]
    assert "tool_choice" not in body
    assert not stub.requests[2].get("tools")


def test_greedy_unless_told() -> None:
    with StubServer() as stub:
        replay([session()], stub.base_url)
    assert [body["temperature"] for body in stub.requests] == [0.0, 0.0]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_sessions_overlap_and_turns_of_one_do_not(concurrency: int) -> None:
    with StubServer(delay=0.01) as stub:
        report = replay([session(str(i)) for i in range(4)], stub.base_url, concurrency=concurrency)
    assert stub.most_in_flight == concurrency
    assert [(turn.session_id, turn.index) for turn in report.turns] == [(str(i), k) for i in range(4) for k in (2, 4)]


# What is measured


def test_reasoning_content_and_tool_calls_are_one_text() -> None:
    """A tool call's arguments come in pieces; the name only with the first."""
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "Look "},
        {"reasoning_content": "it up."},
        {"content": "One moment."},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "find_order", "arguments": '{"a'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '": 1}'}}]},
    ]
    with StubServer(deltas=deltas) as stub:
        report = replay([session()], stub.base_url)
    assert report.turns[0].text == 'Look it up.One moment.find_order{"a": 1}'


def test_times_of_a_turn() -> None:
    """Two chunks, each after 0.05 s: six tokens, of which five behind the first. A busy client sees the first late."""
    with StubServer(delay=0.05) as stub:
        (first, *_) = replay([session()], stub.base_url).turns
    assert first.ttft_s is not None and first.tpot_s is not None
    assert 0.05 <= first.ttft_s < 1
    assert 0 < first.tpot_s < 0.2
    assert first.ttft_s + 5 * first.tpot_s >= 0.1 - 1e-9


def test_one_token_has_no_time_per_token() -> None:
    with StubServer(answer_words=1) as stub:
        assert [turn.tpot_s for turn in replay([session()], stub.base_url).turns] == [None, None]


def test_an_empty_answer_is_no_failure() -> None:
    with StubServer(deltas=[{"content": ""}], answer_words=0) as stub:
        report = replay([session()], stub.base_url)
    assert [(turn.text, turn.ttft_s, turn.error) for turn in report.turns] == [("", None, None)] * 2


def test_the_servers_totals_are_those_of_this_replay() -> None:
    with StubServer() as stub:
        replay([session("before")], stub.base_url)
        report = replay([session(), session("t")], stub.base_url)
    figures = report.figures()
    assert figures["rounds"] == 8  # four turns of two
    assert figures["rounds_by_drafter"] == {"df": 8}
    assert figures["share_by_drafter"] == {"df": 1.0}
    assert figures["acceptance_length"] == 3.0
    assert figures["switches"] == 4
    assert figures["completion_tokens"] == 24
    assert figures["cached_prompt_tokens"] == sum(turn.prompt_tokens // 2 for turn in report.turns)


def test_without_speculation_a_step_is_a_token() -> None:
    with StubServer(speculates=False) as stub:
        report = replay([session()], stub.base_url)
    figures = report.figures()
    assert report.totals is None
    assert figures["acceptance_length"] == 1.0
    assert [figures[name] for name in ("rounds", "rounds_by_drafter", "switches", "host_share")] == [None] * 4


def test_what_another_algorithm_accepts_is_unknown() -> None:
    with StubServer(speculates=False, algorithm="EAGLE3") as stub:
        assert replay([session()], stub.base_url).figures()["acceptance_length"] is None


def test_figures() -> None:
    turns = [turn(ttft_s=seconds, tpot_s=seconds / 10) for seconds in (0.1, 0.2, 0.3)]
    turns += [turn(tpot_s=None, ttft_s=None, cut_turns=2, shortened=True), turn(error="500", completion_tokens=0)]
    figures = Report("x", tuple(turns), 2.0, TOTALS).figures()
    assert (figures["turns"], figures["failed"]) == (5, 1)
    assert figures["tokens_per_s"] == 20.0  # of the four that were answered
    assert (figures["prompt_tokens"], figures["cached_prompt_tokens"], figures["completion_tokens"]) == (400, 160, 40)
    assert (figures["ttft_ms_p50"], figures["ttft_ms_p95"]) == (200.0, 290.0)
    assert (figures["tpot_ms_p50"], figures["tpot_ms_p95"]) == (20.0, 29.0)
    assert (figures["acceptance_length"], figures["share_by_drafter"]) == (3.5, {"df": 0.6, "e3": 0.4})
    assert (figures["cut_prompts"], figures["shortened_prompts"]) == (1, 1)


def test_blocks_of_one_policy_add_up() -> None:
    """A drafter that only one block used is counted from there."""
    other = TOTALS | {"rounds_by_drafter": {"df": 9, "none": 1}}
    merged = merge([Report("x", (turn(),), 1.0, TOTALS), Report("x", (turn(index=4),), 2.0, other)])
    assert (merged.label, merged.wall_s, len(merged.turns)) == ("x", 3.0, 2)
    assert merged.totals is not None
    assert merged.totals["rounds"] == 20
    assert merged.totals["rounds_by_drafter"] == {"df": 15, "e3": 4, "none": 1}
    assert merged.totals["seconds"]["verify"] == 4.0
    assert merge([Report("off", (turn(),), 1.0, None)] * 2).totals is None


def test_the_table_has_every_policy() -> None:
    reports = {"off": Report("off", (turn(),), 1.0, None), "entropy": Report("entropy", (turn(),), 1.0, TOTALS)}
    view = table({label: report.figures() for label, report in reports.items()})
    assert view.row_count == 2
    assert list(view.columns[0].cells) == ["off", "entropy"]
    assert table({"nothing came": Report("x", (), 0.0, None).figures()}).row_count == 1


def test_what_was_asked_otherwise_than_recorded_is_said_under_the_table() -> None:
    turns = (turn(), turn(cut_turns=2, shortened=True), turn(cut_turns=1))
    cut = Report("entropy", turns, 1.0, TOTALS).figures() | {"changed": {"function_call": 2, "byte order mark": 1}}
    view = table({"off": Report("off", (turn(),), 1.0, None).figures(), "entropy": cut})
    assert view.caption == (
        "entropy: 2 of 3 prompts were cut to fit the context: their oldest turns were dropped\n"
        "entropy: 1 of 3 prompts have a shortened message, as dropping turns was not enough\n"
        "entropy: some messages were converted (2 x function_call, 1 x byte order mark); see docs/traces.md"
    )


# Prompts beyond the context


def test_the_oldest_turns_are_left_out() -> None:
    """A call goes with its output, and system message and task stay."""
    texts = [{"role": "assistant", "content": " ".join(["said"] * 30)}, {"role": "user", "content": "and then?"}]
    messages = [*session().model_dump(exclude_none=True)["messages"][:4], *texts * 4]
    messages.append({"role": "assistant", "content": "asked for"})
    long = session(messages=messages)
    with StubServer(context=110) as stub:
        report = replay([long], stub.base_url, max_tokens=20)
    assert [turn.error for turn in report.turns] == [None] * len(long.turns)
    assert stub.tokenized and stub.tokenized[0]["tools"] == [TOOL]
    last, asked = report.turns[-1], stub.requests[-1]["messages"]
    assert last.cut_turns > 0 and not last.shortened
    assert last.prompt_tokens + 20 <= 110
    assert asked[0]["role"] == "system" and asked[-1] == texts[1]
    assert not any(message["role"] == "tool" for message in asked)  # the call was cut, so its output is too
    assert report.figures()["cut_prompts"] == sum(turn.cut_turns > 0 for turn in report.turns) > 0


def test_a_message_that_alone_is_too_long_loses_its_middle() -> None:
    long = session(words=600)
    with StubServer(context=200) as stub:
        report = replay([long], stub.base_url, max_tokens=20)
    assert [(turn.error, turn.shortened) for turn in report.turns] == [(None, True)] * 2
    assert all(turn.prompt_tokens + 20 <= 200 for turn in report.turns)
    text = stub.requests[0]["messages"][1]["content"]
    assert text.startswith("text text") and text.endswith("text text") and "characters left out" in text
    assert report.figures()["shortened_prompts"] == 2


def test_the_same_history_is_cut_in_the_same_way() -> None:
    """Texts of two policies can be compared only if they answer the same prompts."""
    asked = []
    for speculates in (True, False):
        with StubServer(context=100, speculates=speculates) as stub:
            replay([session(words=90)], stub.base_url, max_tokens=20)
        asked.append([body["messages"] for body in stub.requests])
    assert asked[0] == asked[1]


def test_a_prompt_that_cannot_fit_is_said_to() -> None:
    async def count(messages: list[dict[str, Any]]) -> int:
        return 1000

    with pytest.raises(PromptTooLong, match="1000 tokens cannot be cut to 10; serve with a larger --context-length"):
        asyncio.run(fit([{"role": "user", "content": "x" * 5000}], 10, count))
    assert "characters left out" in MARK


def test_short_prompts_are_not_counted() -> None:
    with StubServer() as stub:
        replay([session()], stub.base_url)
    assert stub.tokenized == []


# Failures


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("500", "InternalServerError: Error code: 500"),
        ("400", "BadRequestError: Error code: 400"),
        ("drop", "RemoteProtocolError"),
        ("cut", "the stream ended before the reply was complete"),
        ("error chunk", "scripted failure"),
        ("no json", "JSONDecodeError"),
    ],
)
def test_a_failed_turn_is_noted_and_the_session_goes_on(how: Any, said: str) -> None:
    seen: list[Turn] = []
    with StubServer(fail={0: how}) as stub:
        report = replay([session()], stub.base_url, progress=seen.append)
    first, second = report.turns
    assert first.error is not None and said in first.error
    assert second.error is None and second.text == ALL_WORDS
    assert report.figures()["failed"] == 1
    assert seen == [first, second]


def test_a_silent_server_is_not_waited_for() -> None:
    with StubServer(fail={0: "stall"}) as stub:
        report = replay([session()], stub.base_url, timeout_s=0.5)
    assert report.turns[0].error is not None and "imeout" in report.turns[0].error
    assert report.turns[1].error is None


def test_an_answer_that_only_trickles_in_is_not_waited_for() -> None:
    """Every piece comes within the time limit, the whole does not."""
    with StubServer(delay=0.1, answer_words=60) as stub:
        report = replay([session()], stub.base_url, timeout_s=0.25)
    assert [turn.error for turn in report.turns] == ["TimeoutError: no complete answer within 0.25 s"] * 2


def test_a_server_that_goes_away_ends_the_replay() -> None:
    """Ten thousand turns are not failed one after the other, each with its retries."""
    with StubServer() as stub:
        report = replay([session(), session("t")], stub.base_url, progress=lambda turn: stub.gone.set(), retries=1)
    assert [turn.error is None for turn in report.turns] == [True, False]
    figures = report.figures()
    assert (figures["failed"], figures["not_asked"], figures["ending"]) == (1, 2, "server gone")
    assert (figures["turns"], figures["whole_sessions"], figures["retries"]) == (2, 0, 1)
    assert report.totals is None  # nobody says what was counted meanwhile


def test_a_prompt_whose_tokens_the_server_does_not_count_is_not_asked_for() -> None:
    """The first turn's prompt is short enough without."""
    with StubServer(context=1024 + 760, counts_tokens=False) as stub:
        first, second = replay([session(words=40)], stub.base_url, max_tokens=20).turns
    assert first.error is None and second.error == "KeyError: 'count'"
    assert len(stub.requests) == 1


# The command


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(session(name).model_dump_json(exclude_none=True) + "\n" for name in ("a", "b", "c")))
    return path


def run_main(*arguments: object) -> int:
    return module.main([str(argument) for argument in arguments])


def test_the_last_line_is_json(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    with StubServer() as stub:
        flags = ("--base-url", stub.base_url, "--limit", 2, "--label", "entropy", "--json-out", out)
        assert run_main(trace, *flags) == 0
    printed = capsys.readouterr().out.rstrip("\n").splitlines()
    line = json.loads(printed[-1])
    assert line["benchmark"] == "replay"
    assert (line["arguments"]["traces"], line["arguments"]["limit"]) == ([str(trace)], 2)
    assert line["figures"]["turns"] == 4
    assert {"python", "openai", "whiflash-sglang"} <= line["versions"].keys()
    assert "commit" in line
    written = json.loads(out.read_text())
    assert written.pop("detail").keys() == {"quantiles", "views"}
    assert written == line
    assert any("entropy" in row for row in printed[:-1])


def test_failed_turns_are_named_and_the_status_is_1(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(fail={3: "500"}) as stub:
        assert run_main(trace, "--base-url", stub.base_url) == 1
    captured = capsys.readouterr()
    assert "failed: b, message 4: " in captured.err
    assert json.loads(captured.out.splitlines()[-1])["figures"]["failed"] == 1


def test_no_server_is_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as stub:
        gone = stub.base_url
    assert run_main(trace, "--base-url", gone) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --base-url {gone}: no response") and said.count("\n") == 1


def test_a_bad_trace_is_refused_or_skipped(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text(trace.read_text() + '{"schema_version": 1}\n')
    assert run_main(trace, "--base-url", "http://127.0.0.1:9") == 2
    assert f"error: {trace}, line 4, field session_id: " in capsys.readouterr().err
    with StubServer() as stub:
        assert run_main(trace, "--base-url", stub.base_url, "--skip-bad") == 0
    captured = capsys.readouterr()
    assert f"skipped: {trace}, line 4" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["figures"]["skipped"] == 1


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--base-url", "http://127.0.0.1:port", "`http://127.0.0.1:port` is not a URL"),
        ("--temperature", "-1", "`-1` is not a number of at least 0"),
        ("--temperature", "nan", "`nan` is not a number of at least 0"),
        ("--temperature", "warm", "`warm` is not a number of at least 0"),
        ("--json-out", "/", "/: is a folder"),
        ("--json-out", "/no/such/folder/a.json", "/no/such/folder/a.json: its folder does not exist"),
    ],
)
def test_other_bad_values_are_refused(flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_main("trace.jsonl", "--base-url=http://127.0.0.1:9", f"{flag}={value}")
    assert end.value.code == 2
    assert f"argument {flag}: {said}" in capsys.readouterr().err


def test_more_tokens_than_the_context_are_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(context=100) as stub:
        assert run_main(trace, "--base-url", stub.base_url, "--max-tokens", 100) == 2
    assert capsys.readouterr().err == "error: --max-tokens 100: the server's context is 100; use less\n"


def test_traces_without_a_turn_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(session(messages=[{"role": "user", "content": "Hello?"}]).model_dump_json(exclude_none=True))
    assert run_main(path, "--base-url", "http://127.0.0.1:9") == 2
    assert "no recorded assistant turn" in capsys.readouterr().err


def test_the_base_url_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_main("trace.jsonl")
    assert end.value.code == 2 and "--base-url" in capsys.readouterr().err


def test_ctrl_c_while_a_script_replays_ends_the_script() -> None:
    """A script that replays block by block must not take half a block for a whole one, and go on."""
    program = "import sys; from whiflash_workloads.replay import replay; from tests.sessions import session;"
    program += "replay([session()], sys.argv[1]); print('went on')"
    with StubServer(fail={0: "stall"}) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", program, stub.base_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not stub.requests and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=600)
    assert process.returncode != 0 and printed == ""
    assert said.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("flag", ["--concurrency", "--limit", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_below_one_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_main("trace.jsonl", "--base-url", "http://127.0.0.1:9", f"{flag}={value}")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {flag}: " in said and f"`{value}`" in said and "give" in said


def test_ctrl_c_ends_without_a_traceback(trace: Path) -> None:
    """What there is, is printed and written: here one turn of six; the next one hangs."""
    out = trace.with_name("out.json")
    with StubServer(fail=dict.fromkeys(range(1, 9), "stall")) as stub:
        command = [sys.executable, "-m", "whiflash_workloads.replay", str(trace), "--base-url", stub.base_url]
        process = subprocess.Popen(
            [*command, "--json-out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while len(stub.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "note: interrupted: 1 turns done, 5 not started; 0 sessions complete" in said
    figures = json.loads(printed.splitlines()[-1])["figures"]
    assert (figures["ending"], figures["turns"], figures["not_asked"], figures["failed"]) == ("interrupted", 1, 5, 0)
    assert json.loads(out.read_text())["figures"] == figures


def test_provenance_of_this_checkout() -> None:
    found = provenance()
    assert found["versions"]["python"].startswith("3.")
    assert found["commit"] is None or len(found["commit"]) == 40


def test_importing_the_replay_loads_neither_sglang_nor_torch() -> None:
    program = "import sys, whiflash_workloads.replay; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_bundled_traces_load_without_a_bad_record() -> None:
    path = Path(module.__file__).parent / "demo" / "traces" / "heldout.jsonl"
    assert all(len(recorded.turns) > 0 for recorded in load_traces([path]).sessions)
