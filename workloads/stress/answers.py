"""Reads answers of any endpoint, whole or as event streams.

ear = Ear(request.path, request.replies)
ear.whole(status, body)            or, for a stream, ear.line(line) for each line
heard = ear.heard()
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from whiflash_workloads.history import Reply
from whiflash_workloads.stress.requests import CHAT, GENERATE

DONE = "[DONE]"
MAX_ERROR = 300  # characters of a message that are kept


class Heard(NamedTuple):
    """What a client knows of its request at the end."""

    status: int | None = None  # None: no response
    replies: tuple[Reply, ...] = ()  # as far as they came
    ends: tuple[str | None, ...] = ()  # finish reasons
    error: str | None = None  # from the server or the connection
    code: int = 0  # highest code of the stream's error events, whose status is 200
    whole: bool = False  # everything came: each reply's end and the stream's
    left: bool = False  # the client closed the connection
    late: bool = False  # the time limit passed
    meta: Mapping[str, Any] = MappingProxyType({})  # `meta_info` of /generate


class _Parts:
    """One reply as it grows."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.content = ""
        self.calls: dict[int, list[str]] = {}  # name and arguments
        self.end: str | None = None

    def call(self, number: int, function: dict[str, Any]) -> None:
        parts = self.calls.setdefault(number, ["", ""])
        parts[0] += function.get("name") or ""
        parts[1] += function.get("arguments") or ""

    def reply(self) -> Reply:
        return Reply(self.reasoning, self.content, tuple(("", *parts) for parts in self.calls.values()))  # type: ignore[misc]


class Ear:
    """Reads one answer with this number of replies; with 0, only its status and errors. `pieces` counts events."""

    def __init__(self, path: str, replies: int):
        self.path = path
        self.parts = [_Parts() for _ in range(replies)]
        self.status: int | None = None
        self.error: str | None = None
        self.done = False
        self.code = 0
        self.pieces = 0
        self.meta: Mapping[str, Any] = {}

    def whole(self, status: int, body: bytes) -> None:
        """A response that is not a stream."""
        self.status = status
        try:
            content = json.loads(body)
        except ValueError:
            content = body.decode(errors="replace")
        if status != 200:
            self.error = message_of(content)
            return
        self.done = True
        if not self.parts:
            return
        if not isinstance(content, dict):
            self.error = f"not an object: {content!r}"[:MAX_ERROR]
            return
        self._take(content)

    def line(self, line: str) -> None:
        """A line of a stream with status 200."""
        self.status = 200
        if not line.startswith("data:"):
            return
        text = line.removeprefix("data:").strip()
        if text == DONE:
            self.done = True
            return
        self.pieces += 1
        try:
            content = json.loads(text)
        except ValueError:
            self.error = f"an event that is not JSON: {text}"[:MAX_ERROR]
            return
        self._take(content)

    def heard(self, left: bool = False, late: bool = False) -> Heard:
        """What came so far."""
        replies = tuple(parts.reply() for parts in self.parts)
        ends = tuple(parts.end for parts in self.parts)
        whole = self.done and self.error is None and None not in ends
        return Heard(self.status, replies, ends, self.error, self.code, whole, left, late, self.meta)

    def _take(self, content: dict[str, Any]) -> None:
        if error := content.get("error"):
            self.error = message_of(content)
            code = error.get("code") if isinstance(error, dict) else None
            self.code = max(self.code, code if isinstance(code, int) else 500)
        elif not self.parts:
            return
        elif self.path == GENERATE:
            self._take_generated(content)
        else:
            for choice in content.get("choices", ()):
                parts = self.parts[choice["index"]]
                parts.end = choice.get("finish_reason") or parts.end
                if self.path == CHAT:
                    self._take_message(parts, choice.get("delta") or choice.get("message") or {})
                else:
                    parts.content += choice.get("text") or ""

    def _take_generated(self, content: dict[str, Any]) -> None:
        """SGLang's own endpoint: each event has the whole text so far."""
        (parts,) = self.parts
        parts.content = content["text"]
        self.meta = content["meta_info"]
        if (reason := self.meta["finish_reason"]) is None:
            return
        parts.end = reason["type"]
        # A refusal has a status code; an abort by the client has none.
        if reason["type"] == "abort" and reason.get("status_code"):
            self.error = str(reason["message"])[:MAX_ERROR]

    @staticmethod
    def _take_message(parts: _Parts, message: dict[str, Any]) -> None:
        parts.reasoning += message.get("reasoning_content") or ""
        parts.content += message.get("content") or ""
        for place, call in enumerate(message.get("tool_calls") or ()):
            number = call.get("index")
            parts.call(place if number is None else number, call.get("function") or {})


def message_of(content: Any) -> str | None:
    """The message of an error's body, if it has one."""
    if isinstance(content, dict):
        found = content.get("error") or content.get("message") or content.get("detail")
        return message_of(found) if isinstance(found, dict) else message_of(str(found or ""))
    return str(content).strip()[:MAX_ERROR] or None
