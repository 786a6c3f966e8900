"""Write exchanges (request and reply) to a trace file as they end. Thread-safe, usable from async code.

`Recorder.begin` finds a request's session, `Exchange.feed` collects the reply's bytes, and the exchange is written once
the reply is complete. Nothing here raises in the agent's path; unrecordable requests are counted.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from whiflash_workloads.record.reply import END_OF_STREAM, EVENT_STREAM, NotWhole, Reply, read_reply
from whiflash_workloads.record.sessions import Opened, SessionBook, as_bytes
from whiflash_workloads.schema import NOTED, SCHEMA_VERSION, Part

Raw = dict[str, Any]
log = logging.getLogger("whiflash_workloads.record")

SECRET_NAMES = ("apikey", "authorization", "accesstoken", "authtoken", "password", "secret", "cookie", "credential")


class RecordError(ValueError):
    """A file that cannot be recorded to. The message includes the fix."""


class Unrecordable(ValueError):
    """A request that the trace format cannot represent."""


@dataclass(frozen=True)
class Summary:
    """Counts of what has been recorded so far."""

    path: Path
    sessions: int
    turns: int
    unrecorded: dict[str, int]  # reason -> requests
    passed_on: int  # requests to other routes

    def __str__(self) -> str:
        lines = [f"recorded {self.turns} turns of {self.sessions} sessions in {self.path}"]
        lines += [f"not recorded: {count} x {reason}" for reason, count in sorted(self.unrecorded.items())]
        if self.passed_on:
            lines.append(f"passed through: {self.passed_on} requests that are not chat completions")
        return "\n".join(lines)


class Recorder:
    """Appends to `path`, which it locks. Raises RecordError."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file, taken = _open(self.path)
        self._book = SessionBook(taken)
        self._sessions = self._turns = self._passed_on = 0
        self._unrecorded: Counter[str] = Counter()

    def begin(self, body: bytes, affinity: str | None) -> Exchange | None:
        """Start an exchange for a chat completion's body; None if it cannot be recorded."""
        now = time.time()
        try:
            request = _parsed(body)
        except Unrecordable as error:
            self.count_unrecorded(str(error))
            return None
        tools, messages = request.get("tools") or [], request["messages"]
        with self._lock:
            opened = self._book.open(affinity, tools, messages)
        return Exchange(self, opened, request, now)

    def finish(self, exchange: Exchange, reply: Reply) -> None:
        """Write the exchange; called by `Exchange`."""
        now = time.time()
        with self._lock:
            session_id, part = self._book.place(exchange.opened)
            record = _part(session_id, part, exchange, reply, now)
            try:
                Part.model_validate(record)  # ensure that it can be read back
                _append(self._file, record)
            except (ValidationError, OSError, ValueError) as error:
                # The session ends here: a later request finds no tip and starts a new one with its whole history.
                self._unrecorded[_reason(error)] += 1
                log.error("not recorded: a turn of session %s: %s", session_id, error)
                return
            self._book.advance(exchange.opened, session_id, part, reply.message, now)
            self._turns += 1
            self._sessions += part == 0

    def abandon(self, exchange: Exchange, reason: str) -> None:
        """Count a failed exchange; called by `Exchange`."""
        with self._lock:
            self._book.release(exchange.opened)
        self.count_unrecorded(reason)

    def count_unrecorded(self, reason: str) -> None:
        """Count a request that is not recorded."""
        with self._lock:
            self._unrecorded[reason] += 1

    def count_passed_on(self) -> None:
        """Count a request that is not a chat completion."""
        with self._lock:
            self._passed_on += 1

    def summary(self) -> Summary:
        """The counts so far."""
        with self._lock:
            return Summary(self.path, self._sessions, self._turns, dict(self._unrecorded), self._passed_on)

    def close(self) -> None:
        """Close the file. Exchanges that end later are counted as not recorded."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Exchange:
    """A request in flight. Ends exactly once: written, or abandoned with a reason."""

    def __init__(self, recorder: Recorder, opened: Opened, request: Raw, requested: float):
        self.opened, self.request, self.requested = opened, request, requested
        self._recorder = recorder
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._tail = b""
        self._ended = False

    def respond(self, headers: httpx.Headers) -> None:
        """Store the reply's headers."""
        self._headers = {name: headers[name] for name in ("content-type", "content-encoding") if name in headers}

    def feed(self, chunk: bytes) -> None:
        """Add bytes of the reply. Call it before passing them to the client, which may then send its next request."""
        self._chunks.append(chunk)
        self._tail = (self._tail + chunk)[-2 * len(END_OF_STREAM) - len(chunk) :]
        if END_OF_STREAM in self._tail and self._content_type.startswith(EVENT_STREAM):
            self.end()

    def end(self) -> None:
        """Finish the exchange: parse and write the reply."""
        if self._ended:
            return
        try:
            # httpx decodes the content encoding, if any.
            body = httpx.Response(200, headers=self._headers, content=b"".join(self._chunks)).content
            reply = read_reply(self._content_type, body)
        except (NotWhole, httpx.DecodingError) as error:
            self.abandon(str(error))
            return
        self._ended = True
        self._chunks.clear()
        self._recorder.finish(self, reply)

    def abandon(self, reason: str) -> None:
        """End the exchange without recording it."""
        if not self._ended:
            self._ended = True
            self._chunks.clear()
            self._recorder.abandon(self, reason)

    @property
    def _content_type(self) -> str:
        return self._headers.get("content-type", "")


def without_secrets(value: Any) -> Any:
    """`value` without strings whose key is named like a credential, at any depth. Other types, such as a schema's
    `password` object, are kept."""
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items() if not _is_secret(key, part)}
    return [without_secrets(part) for part in value] if isinstance(value, list) else value


def _is_secret(name: str, value: Any) -> bool:
    plain = "".join(filter(str.isalnum, name)).lower()
    return isinstance(value, str) and any(secret in plain for secret in SECRET_NAMES)


def _parsed(body: bytes) -> Raw:
    """The body of a chat completion; raises Unrecordable."""
    try:
        request: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unrecordable("the request is not JSON") from error
    if not isinstance(request, dict):
        raise Unrecordable("the request has no list of messages")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Unrecordable("the request has no list of messages")
    if clash := sorted({key for message in messages for key in message} & NOTED):
        raise Unrecordable(f"a message has the field {clash[0]}, which is reserved by the trace format")
    return request


def _part(session_id: str, part: int, exchange: Exchange, reply: Reply, replied: float) -> Raw:
    """The line of an exchange."""
    opened, request = exchange.opened, exchange.request
    head: Raw = {"schema_version": SCHEMA_VERSION, "session_id": session_id, "part": part}
    duration = None
    if opened.tip is None:
        head |= {"source": "recorded", "tools": request.get("tools") or []}
    else:
        duration = max(0.0, exchange.requested - opened.tip.replied)
        sent = request["messages"][opened.start - 1]
        if as_bytes(sent) != as_bytes(opened.tip.reply):
            head["resent"] = sent
    new = [_noted(message, exchange.requested, duration) for message in request["messages"][opened.start :]]
    options = without_secrets({key: value for key, value in request.items() if key not in ("messages", "tools")})
    notes = {"timestamp_s": replied, "options": options, "output_tokens": reply.output_tokens}
    answer = reply.message | {key: value for key, value in notes.items() if value is not None}
    return head | {"messages": [*new, answer]}


def _noted(message: Raw, requested: float, duration: float | None) -> Raw:
    notes: Raw = {"timestamp_s": requested}
    if message.get("role") == "assistant":
        notes["asked"] = False
    if message.get("role") == "tool" and duration is not None:
        notes["tool_duration_s"] = round(duration, 6)
    return message | notes


def _append(file: int, record: Raw) -> None:
    """Append a line with a single write, so that a crash leaves only whole lines."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    written = os.write(file, line)
    if written != len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(f"only {written} of {len(line)} bytes could be written")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"the trace format cannot represent it ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    return f"the file could not be written ({error})"


def _open(path: Path) -> tuple[int, set[str]]:
    """Open and lock the file for appending; returns it with its session names. Raises RecordError."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)  # prompts may be private
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror}); give a file in an existing folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file, _session_ids(path, file)
    except OSError as error:
        os.close(file)
        raise RecordError(f"{path}: is locked by another recorder; share one Recorder, or give another file") from error
    except RecordError:
        os.close(file)
        raise


def _session_ids(path: Path, file: int) -> set[str]:
    """The session names in the file. Truncates an incomplete last line left by a crash."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        log.warning("%s: truncated an incomplete last line", path)
        os.ftruncate(file, len(whole))
    found = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.add(str(json.loads(line)["session_id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}, line {number}: is not a recorded session; give a new file") from error
    return found
