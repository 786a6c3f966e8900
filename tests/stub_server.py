"""A server in a thread with the part of SGLang's API that a replay needs, and configurable failures.

    with StubServer(fail={2: "drop"}) as stub:
        replay(sessions, stub.base_url)
    assert len(stub.requests) == 5

Tokens are words. Each answer is "word-1 word-2 ..." in chunks of three, and each chunk counts as a round with two
accepted drafts in the totals of `/server_info`, if there are any. In `/whiflash/requests/ID`, the first word of an
answer is from the prefill and the others from rounds of up to three words, alternating df and e3. With `ignore_eos` an
answer has `max_tokens` words.
"""

from __future__ import annotations

import copy
import itertools
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
    "seconds": {
        "draft": 0.0,
        "verify": 0.0,
        "catch_up": 0.0,
        "prefill_drafters": 0.0,
        "prefill": 0.0,
        "read": 0.0,
        "round": 0.0,
    },
}
STALL_SECONDS = 30.0


class StubServer:
    """`requests`: bodies of chat completions in order of arrival; `most_in_flight`: how many overlapped."""

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
        says: str | None = None,
        forgets: bool = False,
        tokens_per_word: int = 1,
    ):
        self.context = context
        self.deltas = deltas or _deltas(answer_words)
        self.answer_words = answer_words
        self.fail = fail or {}  # index of the chat completion -> how it fails
        self.algorithm = algorithm or ("WHIFLASH" if speculates else None)
        self.cache_report = cache_report
        self.counts_tokens = counts_tokens
        self.delay = delay  # seconds before each chunk
        self.says = says  # returned instead of a request's figures
        self.forgets = forgets  # drop the figures of every request
        self.tokens_per_word = tokens_per_word  # of prompts
        self.traced: dict[str, bool] = {}  # completion id -> whether its rounds are traced
        self.asked_figures: list[str] = []
        self.refuse: set[int] = set()  # indices of completion connections that are closed without a reply
        self.connections = 0
        self.gone_after: int | None = None  # number of completions after which the server disappears
        self.totals: Json | None = copy.deepcopy(NO_TOTALS) if speculates else None
        self.requests: list[Json] = []
        self.tokenized: list[Json] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.gone = threading.Event()  # once set, connections are closed without a reply

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
        """Record a chat completion; returns its index."""
        with self.lock:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            number = len(self.requests) - 1
            whiflash = (body.get("custom_params") or {}).get("whiflash") or {}
            if self.totals is not None and not self.forgets:
                self.traced[f"answer-{number}"] = whiflash.get("trace", False)
            return number

    def refuses(self) -> bool:
        """Whether to close this completion's connection without a reply."""
        with self.lock:
            self.connections += 1
            return self.connections - 1 in self.refuse

    def request_figures(self, name: str) -> Json:
        """WhiFlash's figures of a request, with the trace if requested."""
        words = [f"word-{i} " for i in range(1, self.answer_words + 1)]
        rounds = []
        for number, start in enumerate(range(1, len(words), 3)):
            tokens = words[start : start + 3]
            drafter = ("df", "e3")[number % 2]
            scores = {"entropy": 0.25 + number, "score": 3.5, "span": ("reasoning", "answer")[number % 2]}
            drafts = [*tokens[:-1], "wrong ", "worse "]
            rounds.append(
                {"drafter": drafter, "drafts": drafts, "accepted": len(tokens) - 1, "tokens": tokens, **scores}
            )
        return figures_of(rounds, words[0] if words else None) | ({"trace": rounds} if self.traced[name] else {})

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


def figures_of(rounds: list[Json], first: str | None) -> Json:
    """The figures of a request with these rounds."""
    by: dict[str, dict[str, int]] = {"rounds": {}, "accepted": {}, "drafted": {}}
    spans: dict[str, dict[str, int]] = {}
    for each in rounds:
        for kind, n in {"rounds": 1, "accepted": each["accepted"], "drafted": len(each["drafts"])}.items():
            by[kind][each["drafter"]] = by[kind].get(each["drafter"], 0) + n
        span = spans.setdefault(each["span"], {"rounds": 0, "tokens": 0})
        span["rounds"] += 1
        span["tokens"] += len(each["tokens"])
    drafters = [each["drafter"] for each in rounds]
    return {
        "rounds": len(rounds),
        **{f"{kind}_by_drafter": counts for kind, counts in by.items()},
        "switches": sum(a != b for a, b in itertools.pairwise(drafters)),
        "by_span": spans,
        "context_kind": "user",
        "tool": None,
        "catch_up": {},
        "first": first,
    }


def num_tokens(body: Json) -> int:
    if "prompt" in body:
        return len(body["prompt"].split())
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
        elif (name := self.path.removeprefix("/whiflash/requests/")) in self.server_state.traced:
            self.server_state.asked_figures.append(name)
            self.reply_text(self.server_state.says or json.dumps(self.server_state.request_figures(name)))
        else:
            self.reply({"error": "no such route"}, 404)

    def do_POST(self) -> None:
        stub, body = self.server_state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if stub.gone.is_set():
            self.close_connection = True
            return
        if self.path in ("/tokenize", "/v1/tokenize"):
            stub.tokenized.append(body)
            count = stub.tokens_per_word * num_tokens(body)
            self.reply({"count": count, "max_model_len": -1} if stub.counts_tokens else {})
            return
        if stub.refuses():
            self.close_connection = True
            return
        number = stub.begin(body)
        try:
            self.complete(body, stub.fail.get(number), f"answer-{number}")
        except ConnectionError:  # the client has disconnected
            self.close_connection = True
        finally:
            stub.end()
            if len(stub.requests) == stub.gone_after:
                stub.gone.set()

    def complete(self, body: Json, failure: Failure | None, name: str) -> None:
        stub = self.server_state
        prompt_tokens = stub.tokens_per_word * num_tokens(body)
        words, deltas = stub.answer_words, stub.deltas
        if body.get("ignore_eos"):
            words, deltas = body["max_tokens"], _deltas(body["max_tokens"])
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
        self.event(_chunk(name, [_choice({"role": "assistant", "content": ""})]))
        if failure == "stall":
            stub.stopping.wait(STALL_SECONDS)
        for i, delta in enumerate(deltas):
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
            self.event(_chunk(name, [_choice(delta)]))
        else:
            if failure != "cut":
                stub.count_rounds()
                self.event(_chunk(name, [_choice({}, "stop")]))
                self.event(_chunk(name, [], self.usage(prompt_tokens, words)))
        self.write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def usage(self, prompt_tokens: int, completion: int) -> Json:
        details = {"cached_tokens": prompt_tokens // 2} if self.server_state.cache_report else None
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
            "prompt_tokens_details": details,
        }

    def reply(self, body: Json, status: int = 200) -> None:
        self.reply_text(json.dumps(body), status)

    def reply_text(self, text: str, status: int = 200) -> None:
        content = text.encode()
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


def _chunk(name: str, choices: list[Json], usage: Json | None = None) -> Json:
    return {"id": name, "object": "chat.completion.chunk", "model": "stub", "choices": choices, "usage": usage}


def _choice(delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}
