"""Messages as older and other clients write them: the same in every format, and every change is named and counted."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from whiflash_workloads.adapted import adapted
from whiflash_workloads.export import rows
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.schema import Session, to_openai

Json = dict[str, Any]

ASK: Json = {"role": "user", "content": "Where is parcel 5?"}
ANSWER: Json = {"role": "assistant", "content": "On its way."}
SCHEMA: Json = {"name": "track", "parameters": {"type": "object", "properties": {"parcel": {"type": "integer"}}}}
FUNCTION: Json = {"name": "track", "arguments": '{"parcel": 5}'}
OLD: list[Json] = [
    ASK,
    {"role": "assistant", "content": None, "function_call": FUNCTION},
    {"role": "function", "name": "track", "content": "on its way"},
    ANSWER,
]
CALL: Json = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": {"parcel": 5}}}
OBJECTS: list[Json] = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "on its way"},
    ANSWER,
]
OF_OLD = {"function_call": 1, "function role": 1}
OF_OBJECTS = {"arguments as an object": 1}


def ours(messages: list[Json]) -> str:
    record = {"schema_version": 2, "session_id": "s", "source": "x", "messages": messages}
    return json.dumps(record)


def ours_in_parts(messages: list[Json]) -> str:
    parts = [messages[:2], messages[2:]]
    records = [
        {"schema_version": 2, "session_id": "s", "part": i, "messages": part, **({"resent": messages[1]} if i else {})}
        for i, part in enumerate(parts)
    ]
    return "\n".join(map(json.dumps, records))


def lines_of_mooncake(messages: list[Json]) -> str:
    """The second request extends the first, reply and all."""
    requests = [messages[:1], messages[:3], [*messages, ASK]]
    return "\n".join(json.dumps({"session_id": "s", "delay": 1, "messages": request}) for request in requests)


FORMATS = {
    "ours": ours,
    "in parts": ours_in_parts,
    "openai": lambda messages: json.dumps({"messages": messages}),
    "a plain list": json.dumps,
    "tau-bench": lambda messages: json.dumps([{"task_id": 1, "trial": 0, "traj": messages}]),
    "swe-agent": lambda messages: json.dumps({"history": messages, "trajectory": []}),
    "mooncake": lines_of_mooncake,
    "payloads": lambda messages: json.dumps({"payload": {"messages": [*messages, ASK]}}),
    "agentic-trace": lambda messages: json.dumps({"conversations": [[{"messages": [*messages, ASK]}]]}),
}


def one(path: Path, text: str) -> tuple[Session, dict[str, int]]:
    path.write_text(text, encoding="utf-8")
    loaded = load_traces([path])
    (session,) = loaded.sessions
    return session, dict(loaded.changed)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("messages", "changed"), [(OLD, OF_OLD), (OBJECTS, OF_OBJECTS)])
def test_every_format_is_asked_with_tool_calls(
    tmp_path: Path, name: str, messages: list[Json], changed: dict[str, int]
) -> None:
    session, counted = one(tmp_path / "a", FORMATS[name](messages))
    asked = [to_openai(message) for message in session.messages]
    (call,) = asked[1]["tool_calls"]
    assert call["function"]["name"] == "track" and json.loads(call["function"]["arguments"]) == {"parcel": 5}
    assert isinstance(call["function"]["arguments"], str) and "function_call" not in asked[1]
    assert (asked[2]["role"], asked[2]["tool_call_id"], asked[2]["content"]) == ("tool", call["id"], "on its way")
    assert not any("changed" in message for message in asked)
    assert counted == changed


def test_what_was_changed_is_kept_when_a_session_is_written_again(tmp_path: Path) -> None:
    session, _ = one(tmp_path / "a", FORMATS["openai"](OLD))
    again, counted = one(tmp_path / "b", session.model_dump_json())
    assert again == session and counted == OF_OLD


def test_an_export_is_of_the_changed_messages(tmp_path: Path) -> None:
    session, _ = one(tmp_path / "a", FORMATS["openai"](OLD))
    exported = [message for row in rows([session]) for message in row["messages"]]
    assert not any("function_call" in message or "changed" in message for message in exported)


@pytest.mark.parametrize("name", ["openai", "payloads"])
def test_functions_are_tools(tmp_path: Path, name: str) -> None:
    record = json.loads(FORMATS[name]([ASK, ANSWER]))
    (record.get("payload") or record)["functions"] = [SCHEMA]
    session, counted = one(tmp_path / "a", json.dumps(record))
    assert session.tools == [{"type": "function", "function": SCHEMA}] and counted == {"functions": 1}


def test_a_called_function_is_declared_where_there_are_no_schemas(tmp_path: Path) -> None:
    for messages in (OLD, OBJECTS):
        session, _ = one(tmp_path / "a", FORMATS["tau-bench"](messages))
        (tool,) = session.tools
        assert tool["function"]["name"] == "track" and list(tool["function"]["parameters"]["properties"]) == ["parcel"]


@pytest.mark.parametrize(
    "message",
    [
        ASK,
        {"role": "assistant", "content": "x", "function_call": None},  # as clients write that there is none
        {"role": "assistant", "content": "x", "tool_calls": None},
        {"role": "assistant", "tool_calls": [CALL | {"function": FUNCTION}], "function_call": FUNCTION},  # said twice
        "no message",
    ],
)
def test_what_a_server_reads_is_left_as_it_is(message: Any) -> None:
    assert adapted(message) is message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    path = tmp_path / "a"
    path.write_bytes((mark + json.dumps({"messages": [{**ASK, "content": "É"}, ANSWER]})).encode(encoding))
    loaded = load_traces([path])
    assert [message.content for message in loaded.sessions[0].messages] == ["É", "On its way."]
    assert loaded.changed == {"byte order mark": 1}


def test_marks_of_files_that_were_joined(tmp_path: Path) -> None:
    line = codecs.BOM_UTF8 + json.dumps({"messages": [ASK, ANSWER]}).encode() + b"\r\n"
    (tmp_path / "a").write_bytes(line * 3)
    loaded = load_traces([tmp_path / "a"], limit=2)
    assert len(loaded.sessions) == 2 and loaded.changed == {"byte order mark": 3}


def test_only_what_is_replayed_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("\n".join(json.dumps({"messages": OLD}) for _ in range(3)))
    assert load_traces([tmp_path / "a"], limit=1).changed == OF_OLD
