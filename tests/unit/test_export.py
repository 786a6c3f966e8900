"""Export to AIPerf's format: what it says of a session, and that reading it again gives the same requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_formats import AGENTIC, ANSWER, ASK, CALLING, OUTPUT, TALK, TOOLS, requests, write
from whiflash_workloads.export import main, rows
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.schema import AssistantMessage, Session, ToolMessage

Json = dict[str, Any]
BUNDLED = Path(__file__).parents[2] / "workloads" / "demo" / "traces" / "heldout.jsonl"


def session(*messages: Json, name: str = "s", tools: list[Json] = TOOLS) -> Session:
    record = {"schema_version": 2, "session_id": name, "source": "test", "tools": tools, "messages": list(messages)}
    return Session.model_validate(record)


def again(tmp_path: Path, *sessions: Session) -> tuple[Session, ...]:
    return load_traces([write(tmp_path / "export.jsonl", *rows(sessions))]).sessions


TIMED = session(
    ASK | {"timestamp_s": 100.0},
    CALLING | {"timestamp_s": 101.0, "output_tokens": 9, "options": {"model": "m", "stream": True, "temperature": 0}},
    OUTPUT | {"timestamp_s": 101.5, "tool_duration_s": 0.5},
    ANSWER | {"timestamp_s": 102.0, "output_tokens": 4},
    ASK | {"timestamp_s": 110.0},
    ANSWER | {"timestamp_s": 111.0},
)


def test_a_line_for_each_turn() -> None:
    """Fields as `aiperf.dataset.loader.models.MooncakeTrace` has them; times are milliseconds."""
    common = {"type": "mooncake_trace", "session_id": "s"}
    assert list(rows([TIMED])) == [
        common | {"timestamp": 0.0, "messages": [ASK], "tools": TOOLS, "output_length": 9, "extra": {"temperature": 0}},
        common | {"delay": 500.0, "messages": TALK[:3], "tools": TOOLS, "output_length": 4},
        common | {"delay": 8000.0, "messages": [*TALK, ASK], "tools": TOOLS},
    ]


def test_times_start_at_the_first_session_and_need_all() -> None:
    later = session(ASK | {"timestamp_s": 103.5}, ANSWER, name="t")
    assert [row.get("timestamp") for row in rows([later, TIMED])] == [3500.0, 0.0, None, None]
    assert [row.get("timestamp") for row in rows([session(ASK, ANSWER, name="t"), TIMED])] == [None] * 4


def test_a_round_trip_asks_the_same(tmp_path: Path) -> None:
    other = session(*TALK, name="t", tools=[])
    (first, second) = again(tmp_path, TIMED, other)
    assert requests(first) == requests(TIMED)
    assert [messages for messages, _ in requests(second)] == [messages for messages, _ in requests(other)]
    (first,) = again(tmp_path, TIMED)
    assert list(rows([first]))[:2] == list(rows([TIMED]))[:2]
    calling, output = first.messages[1:3]
    assert isinstance(calling, AssistantMessage) and isinstance(output, ToolMessage)
    assert (calling.output_tokens, calling.options, output.tool_duration_s) == (9, {"temperature": 0}, 0.5)


def test_the_bundled_traces_make_the_round_trip(tmp_path: Path) -> None:
    recorded = load_traces([BUNDLED]).sessions
    found = again(tmp_path, *recorded)
    assert [one.session_id for one in found] == [one.session_id for one in recorded]
    assert [json.dumps(requests(one)) for one in found] == [json.dumps(requests(one)) for one in recorded]


def test_sessions_without_replies_become_deltas(tmp_path: Path) -> None:
    """AIPerf then puts the server's own replies between them."""
    recorded = load_traces([write(tmp_path / "agents.json", AGENTIC)]).sessions
    lines = list(rows(recorded))
    assert [(line.get("message_mode"), len(line["messages"])) for line in lines] == [
        ("delta", 1),
        ("delta", 1),
        (None, 1),
    ]
    assert [one.messages for one in again(tmp_path, *recorded)] == [one.messages for one in recorded]


def test_lengths_stay_lengths(tmp_path: Path) -> None:
    given = [
        {"timestamp": 0.0, "input_length": 600, "hash_ids": [1, 2], "output_length": 5},
        {"session_id": "s", "timestamp": 7.0, "input_length": 9},
        {"session_id": "s", "input_length": 8},
    ]
    recorded = load_traces([write(tmp_path / "m.jsonl", *given)]).sessions
    found = [{key: value for key, value in row.items() if key not in ("type", "session_id")} for row in rows(recorded)]
    assert found == [{key: value for key, value in row.items() if key != "session_id"} for row in given]
    assert [one.messages for one in again(tmp_path, *recorded)] == [one.messages for one in recorded]


def test_a_client_that_changed_a_reply_is_exported_with_what_it_sent(tmp_path: Path) -> None:
    resent = {"role": "assistant", "content": "There."}
    made = session(ASK, ANSWER | {"reasoning_content": "hm", "resent": resent}, ASK, ANSWER)
    assert list(rows([made]))[1]["messages"] == [ASK, resent, ASK]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main([str(BUNDLED), "--out", str(out)]) == 0
    turns = sum(len(one.turns) for one in load_traces([BUNDLED]).sessions)
    assert capsys.readouterr().out == f"{turns} turns of 40 sessions in {out}, without times\n"
    assert len(out.read_text().splitlines()) == turns


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad", {"schema_version": 9})
    assert main([str(bad), "--out", str(tmp_path / "out")]) == 2
    assert f"error: {bad}, line 1, field schema_version" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(bad), "--out", str(tmp_path / "out"), "--skip-bad"]) == 2
    assert "no recorded turn to export" in capsys.readouterr().err
    assert main([str(bad), str(BUNDLED), "--out", str(tmp_path / "out"), "--skip-bad"]) == 0
    assert f"skipped: {bad}, line 1" in capsys.readouterr().err
    assert main([str(BUNDLED), "--out", "/no/such/folder/a"]) == 2
    assert "error: --out /no/such/folder/a: cannot be written" in capsys.readouterr().err
