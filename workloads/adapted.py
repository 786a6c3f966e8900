"""Convert messages of older or other clients to today's chat completion format.

Servers accept some of the old forms but silently drop others (`function_call`), so a replay would differ from the
recording. Every change is listed in the message's `changed` field, and counted by the replay.

    {"function_call": {...}}                    `tool_calls` with one call; its id is derived from the function's name
    {"role": "function", "name": "f", ...}      {"role": "tool", "tool_call_id": "call_f", ...}
    {"arguments": {"a": 1}} of a call           arguments as JSON text
    {"functions": [...]} of a record            `tools`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Raw = dict[str, Any]

FUNCTION_CALL = "function_call"
FUNCTION_ROLE = "function role"
OBJECT_ARGUMENTS = "arguments as an object"
FUNCTIONS = "functions"
BYTE_ORDER_MARK = "byte order mark"


def adapted(message: Any) -> Any:
    """Convert a message. Returns `message` itself if nothing changes, else a copy with `changed`."""
    if not isinstance(message, dict):
        return message
    made, changed = dict(message), list(message.get("changed") or ())
    if made.get("role") == "function":
        made |= {"role": "tool", "content": made.get("content") or ""}
        if isinstance(made.get("name"), str):
            made["tool_call_id"] = _call_id(made["name"])
        changed.append(FUNCTION_ROLE)
    if isinstance(function := made.get("function_call"), dict) and not made.get("tool_calls"):
        del made["function_call"]
        made["tool_calls"] = [{"id": _call_id(function.get("name")), "type": "function", "function": function}]
        changed.append(FUNCTION_CALL)
    if isinstance(calls := made.get("tool_calls"), list):
        made["tool_calls"] = [_with_text(call) for call in calls]
        changed += [OBJECT_ARGUMENTS for call, text in zip(calls, made["tool_calls"], strict=True) if text is not call]
    return made | {"changed": changed} if changed else message


def wire(message: Any) -> Any:
    """Like `adapted`, without the `changed` field."""
    made = adapted(message)
    return made if made is message else {key: value for key, value in made.items() if key != "changed"}


def tools_of(record: Mapping[str, Any], messages: list[Raw]) -> tuple[list[Raw] | None, list[Raw]]:
    """A record's tool schemas and messages. Converts `functions`, which is noted in the first message."""
    functions = record.get("functions")
    if record.get("tools") or not isinstance(functions, list) or not functions:
        return record.get("tools") or None, messages
    tools = [{"type": "function", "function": function} for function in functions]
    first = [message | {"changed": [*message.get("changed", ()), FUNCTIONS]} for message in messages[:1]]
    return tools, first + messages[1:]


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _call_id(name: object) -> str:
    """A call id derived from the name, because function outputs refer to a function, not a call."""
    return f"call_{name}"
