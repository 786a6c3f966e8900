"""Assign requests to sessions: pure bookkeeping, without files, clocks or threads.

Every session has a tip: its last request and reply. A request continues a session if its messages are the tip's
request, the tip's reply as the client sends it back, and at least one more. It takes the tip, so a second request that
extends the same reply finds none and starts a new session: a branch.

Tips are dropped after a day, and the oldest ones beyond `MAX_TIPS`. A later request then starts a new session with its
whole history. Session names are kept, because they are unique per file.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

Raw = dict[str, Any]

FORGET_AFTER_S = 24 * 3600.0  # since the tip's reply
MAX_TIPS = 20_000  # each holds a reply of some kilobytes


class Tip(NamedTuple):
    """The point from which a session can be continued."""

    session_id: str
    parts: int  # written so far
    reply: Raw  # the message as the server sent it
    replied: float  # Unix time


class Opened(NamedTuple):
    """A request assigned to a session."""

    affinity: str | None
    tip: Tip | None  # None: starts a new session
    found_at: bytes  # digest of the tip
    start: int  # index of the first message new to the session, right after the tip's reply
    end: bytes  # digest of this request's own tip


class SessionBook:
    """The tips of all sessions, by a digest of affinity, tools and messages of their last request."""

    def __init__(self, taken: Iterable[str] = ()):
        self._taken = set(taken)
        self._next = 1
        self._tips: OrderedDict[bytes, list[Tip]] = OrderedDict()  # least recently added first

    def open(self, affinity: str | None, tools: list[Any], messages: list[Raw]) -> Opened:
        """Find the session that a request continues, and take its tip."""
        digests = _digests(affinity, tools, messages)
        for i in range(len(messages) - 2, 0, -1):  # at least one message must follow the reply
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
        """Session id and part number of an answered request."""
        if opened.tip is not None:
            return opened.tip.session_id, opened.tip.parts
        return self._unused(opened.affinity), 0

    def advance(self, opened: Opened, session_id: str, part: int, reply: Raw, replied: float) -> None:
        """Add the tip of a written part."""
        self._add(opened.end, Tip(session_id, part + 1, reply, replied))
        while len(self._tips) > MAX_TIPS or next(iter(self._tips.values()))[-1].replied < replied - FORGET_AFTER_S:
            self._tips.popitem(last=False)

    def release(self, opened: Opened) -> None:
        """Put back the tip of a failed request, so that a retry can extend it."""
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
    """Whether an assistant message of a request is this reply. Clients re-serialize JSON and may drop reasoning."""
    calls, sent_calls = (message.get("tool_calls") or [] for message in (reply, sent))
    if calls or sent_calls:
        return _names(calls) == _names(sent_calls)
    text, sent_text = text_of(reply), text_of(sent)
    return text == sent_text or (bool(sent_text) and text.endswith(sent_text))


def text_of(message: Raw) -> str:
    """Content as one stripped text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content).strip()


def as_bytes(value: Any) -> bytes:
    """Serialized JSON: equal bytes mean equal values with the same key order."""
    return json.dumps(value).encode()


def _names(calls: Any) -> list[tuple[Any, Any]]:
    """Id and function of each call."""
    if not isinstance(calls, list):
        return []
    return [(call.get("id"), (call.get("function") or {}).get("name")) for call in calls if isinstance(call, dict)]


def _digests(affinity: str | None, tools: list[Any], messages: list[Raw]) -> list[bytes]:
    """digests[i] is the digest of the first i messages."""
    running = hashlib.sha256(as_bytes([affinity, tools]))
    digests = [running.digest()]
    for message in messages:
        running.update(b"\n" + as_bytes(message))
        digests.append(running.digest())
    return digests
