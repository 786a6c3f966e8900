"""Traces of others: OpenAI messages, SGLang's agentic traces, Mooncake's and AIPerf's lines, SWE-agent's times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_loaders import SWE_AGENT
from whiflash_workloads.formats import format_of
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.schema import (
    AssistantMessage,
    Lengths,
    Session,
    ToolMessage,
    TraceError,
    UserMessage,
    to_openai,
)

Json = dict[str, Any]

CALL = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
ASK: Json = {"content": "Where?", "role": "user"}
CALLING: Json = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OUTPUT: Json = {"role": "tool", "tool_call_id": "c1", "content": "here"}
ANSWER: Json = {"role": "assistant", "content": "There."}
TALK = [ASK, CALLING, OUTPUT, ANSWER]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def load(path: Path, *records: object) -> tuple[Session, ...]:
    return load_traces([write(path, *records)]).sessions


def wires(session: Session) -> list[str]:
    return [json.dumps(to_openai(message)) for message in session.messages]


def requests(session: Session) -> list[tuple[list[Json], list[Json]]]:
    """What a replay with forced history asks."""
    messages = [to_openai(message) for message in session.messages]
    return [(messages[:index], session.tools) for index in session.turns]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"schema_version": 9}, "ours"),
        ({"session_id": "s", "source": "x", "messages": []}, "ours"),
        ({"messages": [], "tools": []}, "openai"),
        ({"messages": [], "session_id": "s"}, "openai"),
        ({"traj": []}, "tau-bench"),
        ({"history": [], "trajectory": []}, "swe-agent"),
        ({"metadata": {}, "conversations": []}, "agentic-trace"),
        ({"input_length": 1}, "mooncake"),
        ({"messages": [], "timestamp": 0}, "mooncake"),
        ({"messages": [], "type": "mooncake_trace"}, "mooncake"),
        ({"payload": {}}, "mooncake"),
        ({"a": 1}, None),
    ],
)
def test_formats_are_told_apart(record: Json, name: str | None) -> None:
    assert format_of(record) == name


def test_readers_are_imported_when_a_file_needs_them() -> None:
    readers = "[name for name in sys.modules if name.startswith('whiflash_workloads.formats.')]"
    program = f"import sys, whiflash_workloads.loaders; print({readers})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# OpenAI messages


def test_openai_messages_as_lines(tmp_path: Path) -> None:
    """Messages and tools stay as they are; sessions are named by the file unless they say."""
    first, second = load(
        tmp_path / "chats.jsonl",
        {"messages": TALK, "tools": TOOLS, "parallel_tool_calls": False},
        {"id": "x", "messages": TALK},
    )
    assert (first.session_id, second.session_id) == ("chats-1", "x")
    assert (first.source, first.turns, first.tools) == ("openai", (1, 3), TOOLS)
    assert wires(first) == [json.dumps(message) for message in TALK]
    assert second.tools[0]["function"] == {"name": "find", "parameters": {"type": "object", "properties": {"a": {}}}}


def test_openai_messages_as_documents(tmp_path: Path) -> None:
    for number, document in enumerate(({"messages": TALK}, [{"messages": TALK}], TALK)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document, indent=1))
        (session,) = load_traces([path]).sessions
        assert wires(session) == [json.dumps(message) for message in TALK]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": 7}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [7]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "asked": True}]}, "messages.0.asked"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "messages.1.tool.tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages.0.assistant.tool_calls.0.function",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "messages.0.assistant.tool_calls"),
    ],
)
def test_openai_messages_that_do_not_fit(tmp_path: Path, record: Json, field: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, record)
    with pytest.raises(TraceError) as refusal:
        load_traces([path])
    assert (refusal.value.line, refusal.value.field) == (2, field)
    assert len(load_traces([path], skip_bad=True).sessions) == 1


# SWE-agent


def test_execution_times_are_the_tools(tmp_path: Path) -> None:
    steps = [{"execution_time": 0.5}, {"execution_time": 0.7}]
    (session,) = load(tmp_path / "a.traj", SWE_AGENT | {"trajectory": steps})
    output = session.messages[3]
    assert isinstance(output, ToolMessage) and output.tool_duration_s == 0.5


def test_steps_that_are_not_those_of_the_replies_time_nothing(tmp_path: Path) -> None:
    (session,) = load(tmp_path / "a.traj", SWE_AGENT | {"trajectory": [{"execution_time": 0.5}]})
    output = session.messages[3]
    assert isinstance(output, ToolMessage) and output.tool_duration_s is None


def test_demonstrations_were_not_asked_for(tmp_path: Path) -> None:
    history = [ASK, ANSWER | {"is_demo": True}, ASK, ANSWER]
    (session,) = load(tmp_path / "a.traj", {"history": history})
    assert session.turns == (3,)


# SGLang's agentic traces


AGENTIC: Json = {
    "metadata": {"model": "x"},
    "conversations": [
        [{"messages": [ASK], "prompt_tokens": 9}, {"messages": []}, {"messages": [ASK | {"content": "And?"}]}],
        [{"messages": [ASK]}],
    ],
}


def test_agentic_traces(tmp_path: Path) -> None:
    """Turns bring new messages only; what was answered is for the server under test to say."""
    first, second = load(tmp_path / "agents.json", AGENTIC)
    assert (first.session_id, second.session_id) == ("agents-1", "agents-2")
    assert [message.role for message in first.messages] == ["user", "assistant", "user", "assistant"]
    assert first.turns == (1, 3)
    assert (first.needs_live_history, second.needs_live_history) == (True, False)


@pytest.mark.parametrize(
    ("conversations", "field"),
    [
        ([], "conversations"),
        (7, "conversations"),
        ([7], "conversations.0.(whole)"),
        ([[{}]], "conversations.0.0.messages"),
        ([[{"messages": [7]}]], "conversations.0.0.messages.0"),
        ([[{"messages": [{"role": "judge"}]}]], "conversations.0.messages.0"),
        ([[]], "conversations.0.messages"),
    ],
)
def test_agentic_traces_that_do_not_fit(tmp_path: Path, conversations: object, field: str) -> None:
    with pytest.raises(TraceError) as refusal:
        load(tmp_path / "a", {"conversations": conversations})
    assert refusal.value.field == field


# Mooncake and AIPerf


def test_lengths_and_hashes(tmp_path: Path) -> None:
    first, second = load(
        tmp_path / "m.jsonl",
        {"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 1500, "input_length": 100},
    )
    assert (first.session_id, second.session_id) == ("m-1", "m-2")
    user, reply = first.messages
    assert isinstance(user, UserMessage) and isinstance(reply, AssistantMessage)
    assert user.lengths == Lengths(input_tokens=655, hash_ids=[46, 47], block_tokens=512)
    assert (reply.output_tokens, reply.reply_known, first.turns) == (52, False, (1,))
    assert first.length_only and second.length_only and not first.needs_live_history
    assert second.messages[0].timestamp_s == 1.5


def test_lines_of_a_session_with_whole_histories(tmp_path: Path) -> None:
    (session,) = load(
        tmp_path / "m.jsonl",
        {
            "session_id": "s",
            "timestamp": 2000,
            "messages": [ASK],
            "tools": TOOLS,
            "output_length": 9,
            "extra": {"a": 1},
        },
        {"session_id": "s", "delay": 250, "messages": [ASK, CALLING, OUTPUT], "tools": TOOLS},
    )
    assert session.session_id == "s"
    assert requests(session) == [([ASK], TOOLS), ([ASK, CALLING, OUTPUT], TOOLS)]
    _, calling, output, last = session.messages
    assert isinstance(calling, AssistantMessage) and isinstance(output, ToolMessage)
    assert isinstance(last, AssistantMessage)
    assert (calling.reply_known, calling.output_tokens, calling.options) == (True, 9, {"a": 1})
    assert (session.messages[0].timestamp_s, output.tool_duration_s, last.reply_known) == (2.0, 0.25, False)
    assert not session.needs_live_history and not session.length_only


def test_a_changed_history_is_another_session(tmp_path: Path) -> None:
    sessions = load(
        tmp_path / "m.jsonl",
        {"session_id": "s", "timestamp": 0, "messages": [ASK]},
        {"session_id": "s", "messages": [ASK, CALLING, OUTPUT]},
        {"session_id": "s", "messages": [{"role": "user", "content": "In short: where?"}]},
        {"session_id": "s", "messages": [ASK], "tools": TOOLS},
    )
    assert [(one.session_id, one.turns) for one in sessions] == [("s", (1, 3)), ("s.2", (1,)), ("s.3", (1,))]


def test_replies_in_a_first_history_were_not_asked_for(tmp_path: Path) -> None:
    (session,) = load(tmp_path / "m.jsonl", {"timestamp": 0, "messages": [ASK, CALLING, OUTPUT]})
    assert session.turns == (3,)


def test_deltas(tmp_path: Path) -> None:
    (session,) = load(
        tmp_path / "m.jsonl",
        {"session_id": "s", "message_mode": "delta", "messages": [ASK], "tools": TOOLS},
        {"session_id": "s", "message_mode": "delta", "messages": [ASK], "delay": 5},
    )
    assert [message.role for message in session.messages] == ["user", "assistant", "user", "assistant"]
    assert session.needs_live_history and session.tools == TOOLS


def test_texts_and_payloads(tmp_path: Path) -> None:
    payload = {"model": "m", "messages": [ASK], "tools": TOOLS, "temperature": 0}
    text, whole = load(tmp_path / "m.jsonl", {"text_input": "Where?"}, {"payload": payload})
    assert requests(text) == [([{"role": "user", "content": "Where?"}], [])]
    assert requests(whole) == [([ASK], TOOLS)]
    reply = whole.messages[-1]
    assert isinstance(reply, AssistantMessage) and reply.options == {"model": "m", "temperature": 0}


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"timestamp": 0}, "(whole record)", "exactly one of input_length, text_input, messages, payload; has none"),
        ({"input_length": 1, "text_input": "x"}, "(whole record)", "has ['input_length', 'text_input']"),
        ({"input_length": 0}, "input_length", "greater than 0"),
        ({"input_length": 300, "hash_ids": [1, 2]}, "messages.0.user.lengths", "2 hash ids of 512 tokens are too many"),
        ({"input_length": 300, "hash_ids": ["x"]}, "hash_ids.0", "valid integer"),
        ({"messages": [], "timestamp": 0}, "messages", "at least 1 item"),
        ({"messages": [{"role": "judge"}], "timestamp": 0}, "messages.0", "does not match"),
        ({"payload": {"prompt": "x"}}, "payload.messages", "only chat completions are supported"),
        ({"text_input": "x", "delay": -1}, "delay", "greater than or equal to 0"),
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, row: Json, field: str, said: str) -> None:
    path = write(tmp_path / "a", {"input_length": 5}, row)
    with pytest.raises(TraceError) as refusal:
        load_traces([path])
    assert (refusal.value.line, refusal.value.field) == (2, field)
    assert said in str(refusal.value) and "--skip-bad" in str(refusal.value)
    assert len(load_traces([path], skip_bad=True).sessions) == 1


def test_a_session_with_a_bad_line_is_left_out_whole(tmp_path: Path) -> None:
    delta = {"session_id": "s", "message_mode": "delta", "messages": [ASK]}
    path = write(tmp_path / "a", delta, delta | {"messages": []}, delta, delta | {"session_id": "t"})
    loaded = load_traces([path], skip_bad=True)
    assert [session.session_id for session in loaded.sessions] == ["t"]
    assert len(loaded.skipped) == 1 and "line 2" in loaded.skipped[0]
