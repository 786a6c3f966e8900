"""Which session a request belongs to: pure bookkeeping, without files, clocks or threads.

Every session has a tip: its last request and reply. A request goes on with a session if its messages are those of the
tip's request, then the tip's reply as the client sends it back, then more. The request takes the tip with it, so that
another one that extends the same reply finds none and begins a session of its own: a branch.

A tip that nobody has extended for a day is forgotten, and so are the oldest of more than `MAX_TIPS`: a request that
comes later begins a session with its whole history. What is kept of a session for good is its name, as names are
unique in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

Raw = dict[str, Any]

FORGET_AFTER_S = 24 * 3600.0  # time of replies
MAX_TIPS = 20_000  # each holds a reply: kilobytes


class Tip(NamedTuple):
    """Where a session can be gone on with."""

    session_id: str
    parts: int  # written so far
    reply: Raw  # the message as the server gave it
    replied: float  # when


class Opened(NamedTuple):
    """A request that has found its place."""

    affinity: str | None
    tip: Tip | None  # None: it begins a session
    found_at: bytes  # where the tip stood
    start: int  # index of the first message that is new to the session; the tip's reply, as sent back, is before it
    end: bytes  # where the tip of this request will stand


class SessionBook:
    """The tips of all sessions, by a digest of affinity, tools and messages of their last request."""

    def __init__(self, taken: Iterable[str] = ()):
        self._taken = set(taken)
        self._next = 1
        self._tips: OrderedDict[bytes, list[Tip]] = OrderedDict()  # those that were added last are at the end

    def open(self, affinity: str | None, tools: list[Any], messages: list[Raw]) -> Opened:
        """The place of a request; the tip that it extends is taken out."""
        digests = _digests(affinity, tools, messages)
        for i in range(len(messages) - 2, 0, -1):  # something has to follow the reply
            if messages[i].get("role") != "assistant":
                continue
            tips = self._tips.get(digests[i], [])
            for tip in tips:
                if is_reply_sent_back(tip.reply, messages[i]):
                    tips.remove(tip)
                    if not tips:
                        del self._tips[digests[i]]
                    return Opened(affinity, tip, digests[i], i + 1, digests[-1])
        return Opened(affinity, None, b"", 0, digests[-1])

    def place(self, opened: Opened) -> tuple[str, int]:
        """Session and part of a request that was answered."""
        if opened.tip is not None:
            return opened.tip.session_id, opened.tip.parts
        return self._unused(opened.affinity), 0

    def advance(self, opened: Opened, session_id: str, part: int, reply: Raw, replied: float) -> None:
        """The part has been written: the session can be gone on with from this reply."""
        self._add(opened.end, Tip(session_id, part + 1, reply, replied))
        while len(self._tips) > MAX_TIPS or next(iter(self._tips.values()))[-1].replied < replied - FORGET_AFTER_S:
            self._tips.popitem(last=False)

    def release(self, opened: Opened) -> None:
        """The request came to nothing: its tip can be extended by another one, as by a retry."""
        if opened.tip is not None:
            self._add(opened.found_at, opened.tip)

    def _add(self, digest: bytes, tip: Tip) -> None:
        self._tips.setdefault(digest, []).append(tip)
        self._tips.move_to_end(digest)

    def _unused(self, affinity: str | None) -> str:
        name = affinity
        number = 2
        while name is None or name in self._taken:
            if affinity is None:
                name, self._next = f"session-{self._next}", self._next + 1
            else:
                name, number = f"{affinity}.{number}", number + 1
        self._taken.add(name)
        return name


def is_reply_sent_back(reply: Raw, sent: Raw) -> bool:
    """Whether an assistant message of a request is this reply. Clients write JSON anew and drop or strip reasoning."""
    calls, sent_calls = (message.get("tool_calls") or [] for message in (reply, sent))
    if calls or sent_calls:
        return _names(calls) == _names(sent_calls)
    text, sent_text = text_of(reply), text_of(sent)
    return text == sent_text or (bool(sent_text) and text.endswith(sent_text))


def text_of(message: Raw) -> str:
    """Content as one text, without white space at its edges."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content).strip()


def as_bytes(value: Any) -> bytes:
    """JSON in which equal bytes are an equal value with equal order of keys."""
    return json.dumps(value).encode()


def _names(calls: Any) -> list[tuple[Any, Any]]:
    """Id and function of each call."""
    if not isinstance(calls, list):
        return []
    return [(call.get("id"), (call.get("function") or {}).get("name")) for call in calls if isinstance(call, dict)]


def _digests(affinity: str | None, tools: list[Any], messages: list[Raw]) -> list[bytes]:
    """Of the first i messages, for every i: digests[i] stands before message i."""
    running = hashlib.sha256(as_bytes([affinity, tools]))
    digests = [running.digest()]
    for message in messages:
        running.update(b"\n" + as_bytes(message))
        digests.append(running.digest())
    return digests
