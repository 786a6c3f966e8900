"""Shared by the readers of foreign formats: error locations, conversion to OpenAI's messages, inferred tools.

If a format does not record tool schemas, called tools are declared by name and the arguments seen, because servers
render tool calls only with declared tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_workloads.adapted import adapted
from whiflash_workloads.formats import Item
from whiflash_workloads.schema import SCHEMA_VERSION, SKIP, Session, TraceError, parse_session

Raw = dict[str, Any]


class Place(NamedTuple):
    """The location of a record: file, line, field prefix, and its index in the file."""

    path: Path
    line: int
    where: str
    number: int

    def error(self, field: str, problem: str) -> TraceError:
        """An error at `field` of this record."""
        return TraceError(self.path, self.line, self.where + field, problem, f"fix the record, {SKIP}")


def each(path: Path, items: Iterable[Item], convert: Callable[[Any, Place], Raw]) -> Iterator[Session | TraceError]:
    """Convert each record to our format with `convert`, and parse it as a session."""
    for number, item in enumerate(items):
        try:
            if isinstance(item, TraceError):
                raise item
            record = convert(item.value, Place(path, item.line, item.where, number))
            yield parse_session(record, path, item.line, item.where)
        except TraceError as error:
            yield error


def own_record(name: str, source: str, messages: list[Raw], tools: list[Raw] | None = None) -> Raw:
    """A record in our format. Without `tools`, they are inferred from the calls."""
    messages = list(map(adapted, messages))
    declared = tools_seen(messages) if tools is None else tools
    return dict(schema_version=SCHEMA_VERSION, session_id=name, source=source, tools=declared, messages=messages)


def message(raw: Any, place: Place, field: str, answered: str | None = None) -> Raw:
    """Convert a foreign message to OpenAI's fields. `answered`: the call id of a tool output. Raises TraceError."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise place.error(f"{field}.role", "a message needs a role")
    raw = adapted(raw)
    role, content = raw["role"], text(raw.get("content"), place, field)
    changed = {"changed": raw["changed"]} if "changed" in raw else {}
    if role == "assistant":
        made: Raw = {"role": role, "content": content, **changed}
        if calls := raw.get("tool_calls"):
            if not isinstance(calls, list):
                raise place.error(f"{field}.tool_calls", "not a list of calls")
            made["tool_calls"] = [call(each_call, place, field) for each_call in calls]
        return made
    if role == "tool":
        return {"role": role, "content": content or "", "tool_call_id": raw.get("tool_call_id") or answered, **changed}
    return {"role": role, "content": content or ""}


def call(raw: Any, place: Place, field: str) -> Raw:
    """Convert a foreign tool call. Raises TraceError."""
    try:
        function = {"name": raw["function"]["name"], "arguments": raw["function"]["arguments"]}
        if not isinstance(function["name"], str):
            raise TypeError("the name is not a string")
        return {"id": raw["id"], "type": "function", "function": function}
    except (KeyError, TypeError) as error:
        raise place.error(f"{field}.tool_calls", f"a call lacks id, name or arguments ({error})") from error


def text(content: Any, place: Place, field: str) -> str | None:
    """Content as one text, with parts joined. Raises TraceError."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise place.error(f"{field}.content", "neither a string nor a list of text parts")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def tools_seen(messages: list[Raw]) -> list[Raw]:
    """A schema for each called tool, from its name and the argument names seen."""
    seen: dict[str, Raw] = {}
    for function in (function for made in messages for function in _functions(made)):
        seen.setdefault(function["name"], {}).update({key: {} for key in _argument_names(function)})
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in seen.items()
    ]


def _functions(made: Raw) -> list[Raw]:
    """The functions that a message calls. Malformed calls are skipped; the schema rejects them later."""
    calls = made.get("tool_calls")
    functions = [one.get("function") for one in calls if isinstance(one, dict)] if isinstance(calls, list) else []
    return [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]


def _argument_names(function: Raw) -> list[str]:
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, TypeError, KeyError, RecursionError):  # model output, may be anything
        return []
    return list(arguments) if isinstance(arguments, dict) else []
