"""Read recorded sessions from files: our own JSON lines, tau-bench results, SWE-agent trajectories.

The format is told by the content, not by the file's name:

    JSON lines, each with `messages`              our own (workloads/schema.py)
    a JSON list of {task_id, trial, traj}         tau-bench
    a JSON object with `history`                  SWE-agent (.traj)

Neither foreign format records tool schemas, so their sessions have none unless the calls show them: a tool that was
called is declared by its name and the arguments seen, because a server renders tool calls only with declared tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads.schema import SCHEMA_VERSION, Session, TraceError, parse_session

MEND = "mend the file, or go on without the record by --skip-bad"


@dataclass(frozen=True)
class Loaded:
    """Sessions in file order, and a line for each record that was skipped."""

    sessions: tuple[Session, ...]
    skipped: tuple[str, ...] = ()


def load_traces(paths: Sequence[Path | str], skip_bad: bool = False) -> Loaded:
    """All sessions of all files. A bad record raises TraceError, or with `skip_bad` is left out and counted."""
    sessions: list[Session] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        for item in _read(path):
            if isinstance(item, Session):
                sessions.append(item)
            elif skip_bad:
                skipped.append(str(item))
            else:
                raise item
    return Loaded(tuple(sessions), tuple(skipped))


def _read(path: Path) -> Iterator[Session | TraceError]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        yield TraceError(path, 0, "(file)", f"cannot be read ({error.strerror})", "give the path of a trace file")
        return
    except UnicodeDecodeError as error:
        yield TraceError(path, 0, "(file)", f"is not UTF-8 ({error.reason})", "give a trace file in UTF-8")
        return
    document = _whole_document(text)
    if document == []:
        yield TraceError(path, 1, "(file)", "holds no session", "give a file with at least one session")
    elif isinstance(document, list):
        yield from _sessions(path, ((f"[{i}].", i, entry) for i, entry in enumerate(document)), _from_tau_bench)
    elif isinstance(document, dict) and "history" in document:
        yield from _sessions(path, [("", 0, document)], _from_swe_agent)
    elif isinstance(document, dict):
        yield from _sessions(path, [("", 0, document)], lambda entry, *_: entry)
    elif text.strip() and not any(isinstance(_whole_document(line), dict) for line in text.split("\n")):
        yield _unreadable(path, text)
    else:
        yield from _json_lines(path, text)


def _unreadable(path: Path, text: str) -> TraceError:
    """A file without a single line that is a record: one document, broken where JSON says."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return TraceError(path, error.lineno, f"(column {error.colno})", f"not JSON: {error.msg}", MEND)
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what can be read
        return TraceError(path, 1, "(file)", f"not read: {error}", MEND)
    return TraceError(path, 1, "(file)", "is neither a session nor a list of them", MEND)


def _whole_document(text: str) -> Any:
    """The file as one JSON value, or None where it is several lines of them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_lines(path: Path, text: str) -> Iterator[Session | TraceError]:
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = True
        try:
            yield parse_session(json.loads(line), path, number)
        except json.JSONDecodeError as error:
            yield TraceError(path, number, f"(column {error.colno})", f"not JSON: {error.msg}", MEND)
        except TraceError as error:
            yield error
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond what can be read
            yield TraceError(path, number, "(line)", f"not read: {error}", MEND)
    if not found:
        yield TraceError(path, 1, "(file)", "holds no session", "give a file with at least one session")


def _sessions(path: Path, entries: Iterable[tuple[str, int, Any]], convert: Any) -> Iterator[Session | TraceError]:
    for where, index, entry in entries:
        try:
            yield parse_session(convert(entry, path, index), path, 1, where)
        except TraceError as error:
            yield error


def _from_tau_bench(entry: Any, path: Path, index: int) -> dict[str, Any]:
    where = f"[{index}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("traj"), list):
        raise TraceError(path, 1, f"{where}.traj", "tau-bench needs a list of messages here", MEND)
    messages = [_message(m, path, f"{where}.traj[{i}]", None) for i, m in enumerate(entry["traj"])]
    name = f"tau-bench-{entry.get('task_id', index)}-{entry.get('trial', 0)}"
    return _record(name, "tau-bench", messages)


def _from_swe_agent(document: dict[str, Any], path: Path, index: int) -> dict[str, Any]:
    if not isinstance(document["history"], list):
        raise TraceError(path, 1, "history", "SWE-agent needs a list of messages here", MEND)
    messages = []
    for i, raw in enumerate(document["history"]):
        ids = raw.get("tool_call_ids") if isinstance(raw, dict) else None
        messages.append(_message(raw, path, f"history[{i}]", ids[0] if isinstance(ids, list) and ids else None))
    return _record(f"swe-agent-{path.stem}", "swe-agent", messages)


def _message(raw: Any, path: Path, where: str, answered: str | None) -> dict[str, Any]:
    """The parts of a foreign message that a chat completion knows; `answered`: the call that a tool output answers."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise TraceError(path, 1, f"{where}.role", "a message needs a role", MEND)
    role, content = raw["role"], _text(raw.get("content"), path, where)
    if role == "assistant":
        message = {"role": role, "content": content}
        if calls := raw.get("tool_calls"):
            if not isinstance(calls, list):
                raise TraceError(path, 1, f"{where}.tool_calls", "not a list of calls", MEND)
            message["tool_calls"] = [_call(call, path, where) for call in calls]
        return message
    if role == "tool":
        return {"role": role, "content": content or "", "tool_call_id": raw.get("tool_call_id") or answered}
    return {"role": role, "content": content or ""}


def _call(raw: Any, path: Path, where: str) -> dict[str, Any]:
    try:
        function = {"name": raw["function"]["name"], "arguments": raw["function"]["arguments"]}
        if not isinstance(function["name"], str):
            raise TypeError("the name is no text")
        return {"id": raw["id"], "type": "function", "function": function}
    except (KeyError, TypeError) as error:
        raise TraceError(
            path, 1, f"{where}.tool_calls", f"a call lacks id, name or arguments ({error})", MEND
        ) from error


def _text(content: Any, path: Path, where: str) -> str | None:
    """Content as one text: a list of parts is joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise TraceError(path, 1, f"{where}.content", "neither text nor a list of text parts", MEND)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _record(name: str, source: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    tools = _tools_seen(messages)
    return dict(schema_version=SCHEMA_VERSION, session_id=name, source=source, tools=tools, messages=messages)


def _tools_seen(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A schema for each tool that was called: its name and the names of the arguments it was given."""
    seen: dict[str, dict[str, Any]] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            seen.setdefault(call["function"]["name"], {}).update({key: {} for key in _argument_names(call)})
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in seen.items()
    ]


def _argument_names(call: dict[str, Any]) -> list[str]:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, TypeError, RecursionError):  # recorded from a model, which may have written anything
        return []
    return list(arguments) if isinstance(arguments, dict) else []
