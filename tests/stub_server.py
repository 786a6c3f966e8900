"""A server in a thread that speaks as much of SGLang's API as a replay needs, and fails where it is told to.

    with StubServer(fail={2: "drop"}) as stub:
        replay(sessions, stub.base_url)
    assert len(stub.requests) == 5

A token is a word of a message's text. Each answer is "word-1 word-2 ..." in chunks of three, and each chunk counts as a
round with two accepted drafts in the totals of `/server_info`, if there are any.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Failure = Literal["500", "400", "drop", "cut", "stall", "error chunk", "no json"]
Json = dict[str, Any]

NO_TOTALS: Json = {
    "rounds": 0,
    "rounds_by_drafter": {},
    "accepted_drafts": 0,
    "drafted": 0,
    "switches": 0,
    "steps": 0,
    "seconds": {"draft": 0.0, "verify": 0.0, "catch_up": 0.0, "prefill_drafters": 0.0, "prefill": 0.0, "round": 0.0},
}
STALL_SECONDS = 30.0


class StubServer:
    """`requests` holds the body of each chat completion in order of arrival, `most_in_flight` how many overlapped."""

    def __init__(
        self,
        *,
        context: int = 10_000,
        answer_words: int = 6,
        fail: dict[int, Failure] | None = None,
        deltas: list[Json] | None = None,
        speculates: bool = True,
        algorithm: str | None = None,
        cache_report: bool = True,
        counts_tokens: bool = True,
        delay: float = 0.0,
    ):
        self.context = context
        self.deltas = deltas or _deltas(answer_words)
        self.answer_words = answer_words
        self.fail = fail or {}  # number of the chat completion, from 0 -> how it fails
        self.algorithm = algorithm or ("WHIFLASH" if speculates else None)
        self.cache_report = cache_report
        self.counts_tokens = counts_tokens
        self.delay = delay  # seconds before each chunk
        self.totals: Json | None = copy.deepcopy(NO_TOTALS) if speculates else None
        self.requests: list[Json] = []
        self.tokenized: list[Json] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.gone = threading.Event()  # set it, and connections end without a reply from then on

    def __enter__(self) -> StubServer:
        stub = self

        class Handler(_Handler):
            server_state = stub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def info(self) -> Json:
        state = {} if self.totals is None else {"whiflash": self.totals}
        return {"version": "0.5.17", "speculative_algorithm": self.algorithm, "internal_states": [state]}

    def begin(self, body: Json) -> int:
        """Note a chat completion; its number."""
        with self.lock:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return len(self.requests) - 1

    def end(self) -> None:
        with self.lock:
            self.in_flight -= 1

    def count_rounds(self) -> None:
        if self.totals is None:
            return
        with self.lock:
            rounds = self.answer_words // 3
            by_drafter = self.totals["rounds_by_drafter"]
            self.totals["rounds"] += rounds
            by_drafter["df"] = by_drafter.get("df", 0) + rounds
            self.totals["accepted_drafts"] += 2 * rounds
            self.totals["switches"] += 1
            for part, seconds in {"draft": 0.1, "verify": 0.2, "catch_up": 0.1, "round": 0.5}.items():
                self.totals["seconds"][part] += seconds


def num_tokens(body: Json) -> int:
    return sum(len((message.get("content") or "").split()) for message in body["messages"])


def _deltas(words: int) -> list[Json]:
    texts = [f"word-{i} " for i in range(1, words + 1)]
    return [{"content": "".join(texts[i : i + 3])} for i in range(0, words, 3)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: StubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.server_state.gone.is_set():
            self.close_connection = True
        elif self.path == "/v1/models":
            self.reply({"data": [{"id": "stub", "max_model_len": self.server_state.context}]})
        elif self.path == "/server_info":
            self.reply(self.server_state.info())
        else:
            self.reply({"error": "no such route"}, 404)

    def do_POST(self) -> None:
        stub, body = self.server_state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if stub.gone.is_set():
            self.close_connection = True
            return
        if self.path in ("/tokenize", "/v1/tokenize"):
            stub.tokenized.append(body)
            self.reply({"count": num_tokens(body), "max_model_len": -1} if stub.counts_tokens else {})
            return
        number = stub.begin(body)
        try:
            self.complete(body, stub.fail.get(number))
        except ConnectionError:  # the client has gone
            self.close_connection = True
        finally:
            stub.end()

    def complete(self, body: Json, failure: Failure | None) -> None:
        stub, prompt_tokens = self.server_state, num_tokens(body)
        if failure in ("400", "500"):
            self.reply({"message": "scripted failure", "code": int(failure)}, int(failure))
            return
        if prompt_tokens + body["max_tokens"] > stub.context:
            said = f"Requested token count exceeds the model's maximum context length of {stub.context} tokens."
            self.reply({"object": "error", "message": said, "code": 400}, 400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event(_chunk([_choice({"role": "assistant", "content": ""})]))
        if failure == "stall":
            stub.stopping.wait(STALL_SECONDS)
        for i, delta in enumerate(stub.deltas):
            if i and failure == "drop":
                self.connection.close()
                self.close_connection = True
                return
            if i and failure == "no json":
                self.write(b"data: {scripted failure\n\n")
                break
            if i and failure == "error chunk":
                self.event({"error": {"message": "scripted failure", "code": 400}})
                break
            time.sleep(stub.delay)
            self.event(_chunk([_choice(delta)]))
        else:
            if failure != "cut":
                stub.count_rounds()
                self.event(_chunk([_choice({}, "stop")]))
                self.event(_chunk([], self.usage(prompt_tokens)))
        self.write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def usage(self, prompt_tokens: int) -> Json:
        details = {"cached_tokens": prompt_tokens // 2} if self.server_state.cache_report else None
        completion = self.server_state.answer_words
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
            "prompt_tokens_details": details,
        }

    def reply(self, body: Json, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, body: Json) -> None:
        self.write(f"data: {json.dumps(body)}\n\n".encode())

    def write(self, content: bytes) -> None:
        """One chunk of a chunked reply."""
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def _chunk(choices: list[Json], usage: Json | None = None) -> Json:
    return {"id": "1", "object": "chat.completion.chunk", "model": "stub", "choices": choices, "usage": usage}


def _choice(delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}
