"""Mooncake's traces, and AIPerf's `mooncake_trace`, which adds sessions and messages. JSON lines, one per request:

    {"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [46, 47]}
    {"session_id": "s", "timestamp": 0, "messages": [...], "tools": [...], "output_length": 52, "extra": {...}}
    {"session_id": "s", "delay": 200, "messages": [...]}

Times are in milliseconds. Lines with the same `session_id` are the turns of one session; a line without one is a
separate session. The prompt is in exactly one field: `messages`, the whole history or, with `"message_mode": "delta"`,
the messages since the line before; `text_input`, one user message; `payload`, a whole request body; `input_length`, the
number of tokens.

Replies are known only if a later line has them in its history. The last reply is unknown. After deltas or lengths, the
server's own replies go into the history. A history that does not extend the line before (a shortened context, other
tools) begins a session `ID.2`, `ID.3`, ... A delay becomes the duration of the tools whose outputs are in that line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whiflash_workloads.adapted import tools_of
from whiflash_workloads.formats import Item
from whiflash_workloads.formats.agentic_trace import UNKNOWN_REPLY
from whiflash_workloads.formats.foreign import Place, Raw, own_record
from whiflash_workloads.formats.openai_messages import checked
from whiflash_workloads.schema import Session, TraceError, parse_session

MS = 1000.0


class Row(BaseModel):
    """One line. Fields that only AIPerf's workers need are ignored."""

    model_config = ConfigDict(frozen=True)

    input_length: int | None = Field(default=None, gt=0)
    text_input: str | None = None
    messages: list[Raw] | None = Field(default=None, min_length=1)
    payload: Raw | None = None
    tools: list[Raw] = []
    message_mode: Literal["history", "delta"] = "history"
    output_length: int | None = Field(default=None, ge=0)
    hash_ids: list[int] = []
    timestamp: float | None = Field(default=None, allow_inf_nan=False)
    delay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    session_id: str | None = None
    extra: Raw | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Row:
        given = [
            name for name in ("input_length", "text_input", "messages", "payload") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of input_length, text_input, messages, payload; has {given or 'none'}")
        return self


class Request(NamedTuple):
    """A row as a chat completion. `messages` is the whole history (`whole`) or only the new messages."""

    place: Place
    row: Row
    whole: bool
    messages: list[Raw]
    tools: list[Raw]
    options: Raw | None


def read(path: Path, items: Iterable[Item]) -> Iterator[Session | TraceError]:
    """The reader of this format; see `formats`."""
    sessions: dict[str, list[Request]] = {}
    refused: dict[str, TraceError] = {}  # one bad line invalidates its session
    for index, item in enumerate(items):
        if isinstance(item, TraceError):
            yield item
            continue
        name = _session_id(item.value) or f"{path.stem}-{index + 1}"
        turns = sessions.setdefault(name, [])
        try:
            turns.append(_request(item.value, Place(path, item.line, item.where, index)))
        except TraceError as error:
            refused.setdefault(name, error)
    for name, turns in sessions.items():
        yield from [refused[name]] if name in refused else _sessions(name, turns)


def _session_id(value: Any) -> str | None:
    found = value.get("session_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _request(value: Any, place: Place) -> Request:
    try:
        row = Row.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(whole record)"
        raise place.error(field, first["msg"]) from error
    if row.input_length is not None:
        lengths = {"input_tokens": row.input_length, "hash_ids": row.hash_ids}
        return Request(place, row, False, [{"role": "user", "content": "", "lengths": lengths}], [], row.extra)
    if row.text_input is not None:
        return Request(place, row, False, [{"role": "user", "content": row.text_input}], [], row.extra)
    if row.payload is not None:
        return _payload(place, row, row.payload)
    messages = [checked(raw, place, f"messages.{i}") for i, raw in enumerate(row.messages or ())]
    return Request(place, row, row.message_mode == "history", messages, row.tools, row.extra)


def _payload(place: Place, row: Row, payload: Raw) -> Request:
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(payload.get("tools") or [], list):
        raise place.error("payload.messages", "only chat completions are supported: needs a list of messages")
    options = {key: value for key, value in payload.items() if key not in ("messages", "tools", "functions")}
    wires = [checked(raw, place, f"payload.messages.{i}") for i, raw in enumerate(messages)]
    tools, wires = tools_of(payload, wires)
    return Request(place, row, True, wires, tools or [], options | (row.extra or {}))


def _sessions(name: str, requests: list[Request]) -> Iterator[Session | TraceError]:
    """One session per run of requests in which each extends the one before."""
    stretches: list[list[Request]] = []
    for request in requests:
        if stretches and _extends(request, stretches[-1][-1]):
            stretches[-1].append(request)
        else:
            stretches.append([request])
    for number, stretch in enumerate(stretches, start=1):
        place = stretch[0].place
        record = _record(name if number == 1 else f"{name}.{number}", stretch)
        try:
            yield parse_session(record, place.path, place.line, place.where)
        except TraceError as error:
            yield error


def _extends(request: Request, before: Request) -> bool:
    if request.whole != before.whole:
        return False
    if not request.whole:
        return not request.tools or request.tools == before.tools  # a delta without tools keeps them
    start = len(before.messages)
    return (
        request.tools == before.tools
        and request.messages[:start] == before.messages
        and len(request.messages) > start + 1
        and request.messages[start].get("role") == "assistant"
    )


def _record(name: str, requests: list[Request]) -> Raw:
    messages: list[Raw] = []
    for request in requests:
        if request.whole and messages:
            reply = messages.pop()  # its text is in this history
            new = request.messages[len(messages) :]
            messages.append({**new.pop(0), **_asked(reply)})
        else:
            new = request.messages
        first = not messages
        messages += [_timed(wire, request.row, first) for wire in new]
        messages.append({**UNKNOWN_REPLY, **_notes(request)})
    return own_record(name, "mooncake", messages, requests[0].tools or None)


def _asked(reply: Raw) -> Raw:
    return {key: value for key, value in reply.items() if key in ("options", "output_tokens")}


def _notes(request: Request) -> Raw:
    notes = {"options": request.options, "output_tokens": request.row.output_length}
    return {key: value for key, value in notes.items() if value is not None}


def _timed(wire: Raw, row: Row, first: bool) -> Raw:
    notes: Raw = {}
    if row.timestamp is not None:
        notes["timestamp_s"] = row.timestamp / MS
    if wire.get("role") == "assistant":
        notes["asked"] = False
    if row.delay is not None and wire.get("role") == "tool" and not first:
        notes["tool_duration_s"] = row.delay / MS
    return wire | notes
