"""Reading traces: files and their records, tau-bench, SWE-agent, and a bad record named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whiflash_workloads.loaders import load_traces
from whiflash_workloads.schema import Session, TraceError, to_openai

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"

CALL = {"id": "call-1", "type": "function", "function": {"name": "find_order", "arguments": '{"order": 7}'}}
OURS: dict[str, Any] = {
    "schema_version": 1,
    "session_id": "desk-1",
    "source": "demo",
    "tools": [],
    "messages": [
        {"role": "system", "content": "You work at an order desk."},
        {"role": "user", "content": "Where is order 7?"},
        {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call-1", "content": "shipped"},
        {"role": "assistant", "content": "It was shipped."},
    ],
}
NAMELESS = {"id": "1", "function": {"name": ["find_order"], "arguments": "{}"}}
FOREIGN_CALL = {key: CALL[key] for key in ("id", "function")}
TAU_BENCH: list[dict[str, Any]] = [
    {
        "task_id": task,
        "reward": 1.0,
        "trial": 0,
        "traj": [
            {"role": "system", "content": "Policy."},
            {"role": "user", "content": "Where is order 7?"},
            {"role": "assistant", "content": None, "tool_calls": [{**FOREIGN_CALL, "type": "function"}]},
            {"role": "tool", "tool_call_id": "call-1", "name": "find_order", "content": "shipped"},
            {"role": "assistant", "content": "It was shipped."},
        ],
    }
    for task in (3, 4)
]
SWE_AGENT: dict[str, Any] = {
    "environment": "swe_main",
    "trajectory": [],
    "history": [
        {"role": "system", "content": "You are a programmer.", "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": [{"type": "text", "text": "Mend "}, {"type": "text", "text": "it."}]},
        {
            "role": "assistant",
            "content": "Look first.",
            "thought": "Look first.",
            "action": "open a.py",
            "tool_calls": [{**FOREIGN_CALL, "function": {"name": "open", "arguments": '{"path": "a.py"}'}}],
        },
        {"role": "tool", "content": "[File: a.py]", "tool_call_ids": ["call-1"]},
        {"role": "assistant", "content": "Done."},
    ],
    "info": {"exit_status": "submitted"},
}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def one(path: Path) -> Session:
    (session,) = load_traces([path]).sessions
    return session


def test_our_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "any.name", OURS, "", {**OURS, "session_id": "desk-2"})
    loaded = load_traces([path])
    assert [session.session_id for session in loaded.sessions] == ["desk-1", "desk-2"]
    assert loaded.sessions[0].turns == (2, 4)
    assert loaded.skipped == ()


def test_a_message_goes_back_as_openai_writes_it(tmp_path: Path) -> None:
    session = one(write(tmp_path / "a.jsonl", OURS))
    assert [to_openai(message) for message in session.messages] == OURS["messages"]


def test_an_opening_assistant_message_is_no_turn(tmp_path: Path) -> None:
    """There is nothing before it to ask with."""
    messages = [{"role": "assistant", "content": "Hello?"}, *OURS["messages"][1:]]
    assert one(write(tmp_path / "a.jsonl", {**OURS, "messages": messages})).turns == (2, 4)


def test_tau_bench(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(TAU_BENCH, indent=1))
    first, second = load_traces([path]).sessions
    assert (first.session_id, second.session_id) == ("tau-bench-3-0", "tau-bench-4-0")
    assert [message.role for message in first.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert to_openai(first.messages[2])["tool_calls"] == [CALL]
    assert to_openai(first.messages[3]) == {"role": "tool", "tool_call_id": "call-1", "content": "shipped"}


def test_swe_agent(tmp_path: Path) -> None:
    """Text parts are joined, and `tool_call_ids` says which call a tool output answers."""
    path = tmp_path / "run.traj"
    path.write_text(json.dumps(SWE_AGENT, indent=1))
    session = one(path)
    assert session.session_id == "swe-agent-run"
    assert to_openai(session.messages[1]) == {"role": "user", "content": "Mend it."}
    assert to_openai(session.messages[3]) == {"role": "tool", "tool_call_id": "call-1", "content": "[File: a.py]"}
    assert session.turns == (2, 4)


def test_foreign_sessions_declare_the_tools_that_they_called(tmp_path: Path) -> None:
    (function,) = (tool["function"] for tool in one(write(tmp_path / "run.traj", SWE_AGENT)).tools)
    assert function == {"name": "open", "parameters": {"type": "object", "properties": {"path": {}}}}


def test_arguments_that_are_not_json_declare_a_tool_without_arguments(tmp_path: Path) -> None:
    entry = json.loads(json.dumps(TAU_BENCH[0]).replace('{\\"order\\": 7}', "order 7"))
    (tool,) = one(write(tmp_path / "a.json", [entry])).tools
    assert tool["function"]["parameters"]["properties"] == {}


def test_several_files_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / "1", SWE_AGENT), write(tmp_path / "2", OURS), write(tmp_path / "3", TAU_BENCH)]
    sources = [session.source for session in load_traces(paths).sessions]
    assert sources == ["swe-agent", "demo", "tau-bench", "tau-bench"]


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (without(OURS, "session_id"), "session_id"),
        ({**OURS, "schema_version": 3}, "schema_version"),
        ({**OURS, "messages": []}, "messages"),
        ({**OURS, "messages": [{"role": "user", "content": 7}]}, "messages.0.user.content"),
        ({**OURS, "messages": [{"role": "judge", "content": "x"}]}, "messages.0"),
        ({**OURS, "extra": 1}, "extra"),
        ('{"schema_version": 1,', "(column 22)"),
        ([1], "(whole record)"),
        ("9" * 5000, "(line)"),
        ("[" * 100_000, "(line)"),
    ],
)
def test_a_malformed_line_is_named_and_can_be_skipped(tmp_path: Path, bad: object, field: str) -> None:
    path = write(tmp_path / "a.jsonl", OURS, bad, {**OURS, "session_id": "desk-3"})
    with pytest.raises(TraceError) as refusal:
        load_traces([path])
    assert (refusal.value.path, refusal.value.line, refusal.value.field) == (path, 2, field)
    assert str(refusal.value).startswith(f"{path}, line 2, field {field}: ")
    assert "--skip-bad" in str(refusal.value)

    loaded = load_traces([path], skip_bad=True)
    assert [session.session_id for session in loaded.sessions] == ["desk-1", "desk-3"]
    assert len(loaded.skipped) == 1 and f"{path}, line 2" in loaded.skipped[0]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("text", "[1].traj[0].role"),
        ({"content": "x"}, "[1].traj[0].role"),
        ({"role": "user", "content": 7}, "[1].traj[0].content"),
        ({"role": "user", "content": [{"type": "image"}]}, "[1].traj[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "[1].traj[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 7}]}, "[1].traj[0].content"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "[1].traj[0].tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": 7}, "[1].traj[0].tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": [NAMELESS]}, "[1].traj[0].tool_calls"),
        ({"role": "tool", "content": "an output of no call"}, "[1].messages.0.tool.tool_call_id"),
    ],
)
def test_a_malformed_tau_bench_entry_leaves_the_others(tmp_path: Path, message: object, field: str) -> None:
    path = write(tmp_path / "a.json", [TAU_BENCH[0], {"task_id": 9, "traj": [message]}])
    with pytest.raises(TraceError) as refusal:
        load_traces([path])
    assert refusal.value.field == field
    loaded = load_traces([path], skip_bad=True)
    assert (len(loaded.sessions), len(loaded.skipped)) == (1, 1)


def test_a_tau_bench_entry_without_messages(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"field \[0\]\.traj: tau-bench needs a list of messages"):
        load_traces([write(tmp_path / "a.json", [{"task_id": 1}])])


def test_a_swe_agent_file_without_messages(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="field history: SWE-agent needs a list of messages"):
        load_traces([write(tmp_path / "a.traj", {"history": "none"})])


@pytest.mark.parametrize("ids", [7, {"a": 1}, []])
def test_a_swe_agent_output_that_answers_no_call(tmp_path: Path, ids: object) -> None:
    history = [{"role": "user", "content": "Mend it."}, {"role": "tool", "content": "x", "tool_call_ids": ids}]
    with pytest.raises(TraceError, match=r"line 1, field messages\.1\.tool\.tool_call_id: "):
        load_traces([write(tmp_path / "a.traj", {"history": history})])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"a\.jsonl, line 1, field \(file\): contains no sessions"),
        (b" \n\n", r"a\.jsonl, line 1, field \(file\): contains no sessions"),
        (b"[]", r"a\.jsonl, line 1, field \(file\): contains no sessions"),
        (b"\xff\xff", r"a\.jsonl, line 0, field \(file\): is not UTF-8"),
        (b"\xff\xfe\x00", r"a\.jsonl, line 0, field \(file\): is not UTF-16-LE"),
    ],
)
def test_a_file_that_holds_no_traces(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=said):
        load_traces([path])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        load_traces([tmp_path / "nothing.jsonl"])
    assert len(load_traces([tmp_path / "nothing.jsonl"], skip_bad=True).skipped) == 1


@pytest.mark.parametrize(
    ("name", "sessions", "turns"),
    [("tau_bench_airline_gpt4o.json", 60, 851), ("swe_agent_marshmallow_1867.traj", 1, 11)],
)
def test_recorded_traces_of_others(name: str, sessions: int, turns: int) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"others' recorded traces are no part of this project: put {name} into ../shared/traces")
    loaded = load_traces([SHARED / name])
    assert len(loaded.sessions) == sessions
    assert sum(len(session.turns) for session in loaded.sessions) == turns


def test_an_indented_session_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(OURS, indent=1))
    assert one(path).session_id == OURS["session_id"]


def test_a_document_that_breaks_off_is_one_error_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    lines = json.dumps(SWE_AGENT, indent=1).split("\n")
    path.write_text("\n".join(lines[:-3]))
    loaded = load_traces([path], skip_bad=True)
    assert not loaded.sessions
    assert len(loaded.skipped) == 1
    assert f"line {len(lines) - 3}," in str(loaded.skipped[0])


def test_a_broken_first_line_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"schema_version": 1,\n' + json.dumps(OURS) + "\n")
    loaded = load_traces([path], skip_bad=True)
    assert len(loaded.sessions) == len(loaded.skipped) == 1


@pytest.mark.parametrize("arguments", ["[" * 100_000, "1" * 5000])
def test_arguments_beyond_what_can_be_read(tmp_path: Path, arguments: str) -> None:
    entry = json.loads(json.dumps(TAU_BENCH[0]))
    for message in entry["traj"]:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = arguments
    (tool,) = one(write(tmp_path / "a.json", [entry])).tools
    assert tool["function"]["parameters"]["properties"] == {}
