"""A chat completion server for testing proxies and recorders: it replies like an agent's model.

    with ChatUpstream() as upstream:
        ...
    assert upstream.bodies[0]["messages"] == ...

It calls the tool `look_up`, with a new id, until the prompt has `num_calls` outputs after the last user message, then
replies with text. Streams on request. `fail`: request number -> how it fails.
"""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Json = dict[str, Any]
Failure = Literal["500", "drop", "drop at half"]

SECRET_HEADERS = {"Set-Cookie": "session=secret-of-the-server"}


class ChatUpstream:
    """`bodies` and `headers` are those of each chat completion, in order of arrival."""

    def __init__(self, *, num_calls: int = 2, fail: dict[int, Failure] | None = None):
        self.num_calls = num_calls
        self.fail = fail or {}
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.others: list[str] = []  # requests to other routes
        self.half: list[threading.Event] = []  # per stream: set to release its second half
        self.hold = False
        self.broken_pipes = 0
        self.ids = itertools.count(1)
        self.lock = threading.Lock()

    def __enter__(self) -> ChatUpstream:
        handler = type("Handler", (_Handler,), {"upstream": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for event in self.half:
            event.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def begin(self, body: Json, headers: dict[str, str]) -> tuple[int, threading.Event]:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.half.append(threading.Event())
            if not self.hold:
                self.half[-1].set()
            return len(self.bodies) - 1, self.half[-1]

    def answer(self, messages: list[Json]) -> Json:
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        outputs = [message for message in messages[last_user:] if message["role"] == "tool"]
        if len(outputs) < self.num_calls:
            arguments = json.dumps({"order": len(messages), "why": "größer"}, separators=(",", ":"))
            call = {"id": f"call-{next(self.ids)}", "type": "function"}
            call["function"] = {"name": "look_up", "arguments": arguments}  # type: ignore[assignment]
            return {"role": "assistant", "content": None, "reasoning_content": "Look it up. ", "tool_calls": [call]}
        return {"role": "assistant", "content": f"\n\nDone: {outputs[-1]['content']}", "tool_calls": None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream: ChatUpstream

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.upstream.others.append(self.path)
        self.reply({"data": [{"id": "stub", "max_model_len": 100_000}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.startswith("/v1/chat/completions"):
            self.upstream.others.append(self.path)
            self.reply({"object": "other"})
            return
        number, half = self.upstream.begin(body, dict(self.headers))
        failure = self.upstream.fail.get(number)
        if failure == "drop":
            self.close_connection = True
        elif failure == "500":
            self.reply({"error": {"message": "scripted failure"}}, 500)
        elif body.get("stream"):
            self.stream(number, half, failure)
        else:
            message = self.upstream.answer(body["messages"])
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply({"id": str(number), "object": "chat.completion", "choices": [choice], "usage": usage()})

    def stream(self, number: int, half: threading.Event, failure: Failure | None) -> None:
        message = self.upstream.answer(self.upstream.bodies[number]["messages"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for i, delta in enumerate(deltas(message)):
                if i == 2:
                    half.wait(10)
                    if failure == "drop at half":
                        self.connection.close()
                        self.close_connection = True
                        return
                self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.event({"choices": [], "usage": usage()})
            self.write(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has disconnected
            self.upstream.broken_pipes += 1
            self.close_connection = True

    def reply(self, body: Json, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in SECRET_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, body: Json) -> None:
        self.write(b"data: " + json.dumps({"id": "1", "object": "chat.completion.chunk"} | body).encode() + b"\n\n")

    def write(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def usage() -> Json:
    return {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def deltas(message: Json) -> list[Json]:
    """The message as deltas of a few characters. A call's id and name are in its first delta."""
    found: list[Json] = [{"role": "assistant", "content": ""}]
    for key in ("reasoning_content", "content"):
        found += [{key: piece} for piece in pieces(message.get(key) or "")]
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call["function"]
        head = {"index": index, "id": call["id"], "type": "function"}
        found.append({"tool_calls": [head | {"function": {"name": function["name"], "arguments": ""}}]})
        for piece in pieces(function["arguments"]):
            found.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    return found


def pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(0, len(text), 5)]
