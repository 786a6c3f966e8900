"""Parse a chat completion's reply from its raw bytes: a JSON document or server-sent events.

Only the first choice is used. A reply is complete if it has a `finish_reason`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

Raw = dict[str, Any]

EVENT_STREAM = "text/event-stream"
END_OF_STREAM = b"data: [DONE]"


class NotWhole(ValueError):
    """The reply is incomplete or invalid; the message has the reason."""


class Reply(NamedTuple):
    """The assistant message, and its length if the server reported it."""

    message: Raw
    output_tokens: int | None


def read_reply(content_type: str, body: bytes) -> Reply:
    """Parse a reply. Raises NotWhole."""
    try:
        if content_type.startswith(EVENT_STREAM):
            return _from_events(_events(body))
        return _from_document(json.loads(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, NotWhole) else f"cannot be parsed ({type(error).__name__}: {error})"
        raise NotWhole(f"the reply {reason}") from error


def _from_document(document: Raw) -> Reply:
    choices = document.get("choices")
    if not choices:
        raise NotWhole("has no choices")
    # Servers set unused fields to null; most clients omit them when they send the message back.
    given = {key: value for key, value in choices[0]["message"].items() if value is not None or key == "content"}
    return Reply({"role": "assistant", "content": None, **given}, _output_tokens(document))


def _from_events(events: Iterator[Raw]) -> Reply:
    message: Raw = {"role": "assistant", "content": ""}
    calls: dict[int, Raw] = {}
    tokens, finished = None, False
    for event in events:
        if "error" in event:
            raise NotWhole("ended with a server error")
        tokens = _output_tokens(event) if event.get("usage") else tokens
        for choice in event.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            finished = finished or choice.get("finish_reason") is not None
            _add(choice.get("delta") or {}, message, calls)
    if not finished:
        raise NotWhole("is incomplete")
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
        message["content"] = message["content"] or None
    return Reply(message, tokens)


def _add(delta: Raw, message: Raw, calls: dict[int, Raw]) -> None:
    """Merge a delta. Texts and call arguments arrive in pieces, a call's other fields in its first piece."""
    for key, piece in delta.items():
        if key == "tool_calls":
            for call in piece or ():
                _add_call(call, calls.setdefault(call.get("index") or 0, _empty_call()))
        elif key != "role" and isinstance(piece, str):
            message[key] = message.get(key, "") + piece


def _empty_call() -> Raw:
    return {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}


def _add_call(piece: Raw, call: Raw) -> None:
    function = piece.get("function") or {}
    call["id"] = call["id"] or piece.get("id") or ""
    call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _events(body: bytes) -> Iterator[Raw]:
    """The JSON of each event up to [DONE]. Events are separated by empty lines, with LF or CRLF."""
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if data == b"[DONE]":
            return
        if data:
            yield json.loads(data)


def _output_tokens(document: Raw) -> int | None:
    count = (document.get("usage") or {}).get("completion_tokens")
    return count if isinstance(count, int) else None
