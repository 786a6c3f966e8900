"""The trace schema: messages as they were written, parts put together, and refusals that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whiflash_workloads.fitting import shorten
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.schema import AssistantMessage, Session, ToolMessage, TraceError, UserMessage, to_openai

Json = dict[str, Any]

CALL = {"function": {"arguments": "{}", "name": "find"}, "index": 0, "id": "c1", "type": "function"}


def session(*messages: Json, **changes: Any) -> Session:
    record = {"schema_version": 2, "session_id": "s", "source": "test", "messages": list(messages)}
    return Session.model_validate(record | changes)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


WIRES: list[Json] = [
    {"content": "s", "role": "developer", "name": "x"},
    {"role": "user", "content": [{"text": "a", "type": "text", "cache_control": {"type": "ephemeral"}}]},
    {"tool_calls": [CALL], "refusal": None, "role": "assistant", "content": None, "annotations": []},
    {"tool_call_id": "c1", "role": "tool", "name": "find", "content": [{"type": "text", "text": "b"}]},
    {"role": "assistant", "tool_calls": [CALL]},
]
NOTES: list[Json] = [
    {"timestamp_s": 1.5},
    {},
    {"options": {"seed": 1}, "output_tokens": 3, "asked": False},
    {"tool_duration_s": 0.25},
    {"reply_known": False},
]


def test_messages_stay_as_they_were_written() -> None:
    """Order of keys, nulls, absent fields and unknown ones; what is noted beside them is not sent."""
    made = session(*[wire | notes for wire, notes in zip(WIRES, NOTES, strict=True)])
    assert [json.dumps(to_openai(message)) for message in made.messages] == [json.dumps(wire) for wire in WIRES]


def test_a_session_is_written_as_it_was_read() -> None:
    made = session(*[wire | notes for wire, notes in zip(WIRES, NOTES, strict=True)])
    for text in (made.model_dump_json(), made.model_dump_json(exclude_none=True)):
        again = Session.model_validate_json(text)
        assert again == made
        assert [json.dumps(to_openai(message)) for message in again.messages] == [json.dumps(wire) for wire in WIRES]


def test_notes_have_types() -> None:
    made = session(*[wire | notes for wire, notes in zip(WIRES, NOTES, strict=True)])
    system, _, reply, output, last = made.messages
    assert (
        isinstance(reply, AssistantMessage) and isinstance(output, ToolMessage) and isinstance(last, AssistantMessage)
    )
    assert (system.timestamp_s, output.tool_duration_s) == (1.5, 0.25)
    assert (reply.options, reply.output_tokens, reply.asked) == ({"seed": 1}, 3, False)
    assert not last.reply_known


def test_a_copy_with_another_note_is_written_with_it() -> None:
    message = UserMessage(role="user", content="x").model_copy(update={"timestamp_s": 2.0})
    assert message.model_dump() == {"role": "user", "content": "x", "timestamp_s": 2.0}


def test_turns_are_what_was_asked_for() -> None:
    reply = {"role": "assistant", "content": "x"}
    made = session(reply, {"role": "user", "content": "u"}, reply | {"asked": False}, WIRES[1], reply, reply)
    assert made.turns == (4, 5)


def test_a_reply_in_the_history_is_what_the_client_made_of_it() -> None:
    reply = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    made = session(WIRES[1], reply | {"resent": {"content": "x", "role": "assistant"}}, WIRES[1])
    assert json.dumps(to_openai(made.messages[1])) == '{"content": "x", "role": "assistant"}'
    assert isinstance(made.messages[1], AssistantMessage) and made.messages[1].reasoning_content == "hm"


def test_whether_live_history_is_needed() -> None:
    unknown = {"role": "assistant", "content": "", "reply_known": False}
    assert not session(WIRES[1], unknown).needs_live_history  # only the last reply is not known
    assert session(WIRES[1], unknown, WIRES[1], unknown).needs_live_history


# Parts


def part(number: int, *messages: Json, name: str = "s", **changes: Any) -> Json:
    return {"schema_version": 2, "session_id": name, "part": number, "messages": list(messages)} | changes


USER = {"role": "user", "content": "u"}
REPLY = {"role": "assistant", "content": "r", "reasoning_content": "hm"}
TOOLS = [{"type": "function", "function": {"name": "find"}}]


def test_parts_of_sessions_side_by_side(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a",
        part(0, USER, REPLY, tools=TOOLS),
        part(0, USER, REPLY, name="t"),
        part(1, USER, REPLY, resent={"role": "assistant", "content": "r"}),
        {"schema_version": 1, "session_id": "whole", "source": "x", "messages": [USER, REPLY]},
        part(1, USER, REPLY, name="t"),
    )
    first, second, whole = load_traces([path]).sessions
    assert [one.session_id for one in (first, second, whole)] == ["s", "t", "whole"]
    assert (first.tools, first.source, first.turns) == (TOOLS, "recorded", (1, 3))
    assert to_openai(first.messages[1]) == {"role": "assistant", "content": "r"}
    assert to_openai(second.messages[1]) == REPLY
    assert Session.model_validate_json(first.model_dump_json()) == first


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        (part(2, USER, REPLY), "part", "is 2, but the next part of session `s` is 1; keep the lines of a session in"),
        (part(0, USER, REPLY), "part", "is 0, but the next part of session `s` is 1"),
        (part(1, USER, REPLY, name="t"), "part", "is 1, but the next part of session `t` is 0"),
        (part(1, REPLY, USER), "messages", "does not end with the reply"),
        (part(-1, USER, REPLY), "part", "greater than or equal to 0"),
        (part(1, USER, REPLY, surprise=1), "surprise", "Extra inputs are not permitted"),
        (part(1, USER, REPLY, schema_version=9), "schema_version", "use the release that wrote it"),
        ('{"schema_version": 2, "session_id": "s", "part": 1, "mess', "(column 53)", "not JSON: Unterminated string"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, line: object, field: str, said: str) -> None:
    path = write(tmp_path / "a", part(0, USER, REPLY), line)
    with pytest.raises(TraceError) as refusal:
        load_traces([path])
    assert (refusal.value.line, refusal.value.field) == (2, field)
    assert said in str(refusal.value) and "--skip-bad" in str(refusal.value)
    loaded = load_traces([path], skip_bad=True)
    assert [one.turns for one in loaded.sessions] == [(1,)] and len(loaded.skipped) == 1


# Refusals


@pytest.mark.parametrize(
    ("message", "field", "said"),
    [
        ({"role": "tool", "content": "x"}, "tool.tool_call_id", "give every tool call an id, and its output the same"),
        ({"role": "tool", "content": "x", "tool_call_id": ""}, "tool.tool_call_id", "give every tool call an id"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "assistant.tool_calls.0.id",
            "give every tool call an id",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": [1]}}]},
            "assistant.tool_calls.0.function.arguments",
            "valid string",
        ),
        ({"role": "user", "content": None}, "user.content", "is neither a string nor a list of content parts"),
        ({"role": "user", "content": ["x"]}, "user.content", "is neither a string nor a list of content parts"),
        ({"role": "user"}, "user.content", "Field required"),
        ({"role": "function", "content": "x"}, "tool.tool_call_id", "give every tool call an id"),
        ({"role": "judge", "content": "x"}, "", "does not match any of the expected tags"),
        ({"role": "user", "content": "x", "timestamp_s": "soon"}, "user.timestamp_s", "valid number"),
        ({"role": "tool", "tool_call_id": "1", "content": "", "tool_duration_s": -1}, "tool.tool_duration_s", "0"),
    ],
)
def test_messages_that_do_not_fit(tmp_path: Path, message: Json, field: str, said: str) -> None:
    record = {"schema_version": 2, "session_id": "s", "source": "x", "messages": [USER, message]}
    with pytest.raises(TraceError) as refusal:
        load_traces([write(tmp_path / "a", record)])
    assert refusal.value.field == f"messages.1.{field}".rstrip(".")
    assert said in str(refusal.value)


@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_times_are_numbers(tmp_path: Path, text: str) -> None:
    line = '{"schema_version": 2, "session_id": "s", "source": "x", "messages": [{"role": "user", "content": "x", '
    with pytest.raises(TraceError, match="finite number"):
        load_traces([write(tmp_path / "a", line + f'"timestamp_s": {text}}}]}}')])


@pytest.mark.parametrize("record", [{"a": 1}, [[1]], [7]])
def test_files_in_no_format(tmp_path: Path, record: object) -> None:
    with pytest.raises(TraceError, match=r"line 1, field \(file\): has an unknown format; see docs/traces\.md"):
        load_traces([write(tmp_path / "a", record)])


def test_content_parts_are_shortened_as_text() -> None:
    """The cut used to add text to a list."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, {"type": "image_url"}]}]
    (short,) = shorten(messages, 0.5)
    assert short["content"].startswith("x" * 100 + "\n[... 200 characters left out")
