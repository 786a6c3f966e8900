"""An OpenAI server without a socket: an httpx transport that replies to chat completions like SGLang.

    server = FakeOpenAI([{"content": "hi", "reasoning_content": "greet"}], figures={"rounds": 3})
    model = ChatWhiFlash(model="fake", base_url=BASE_URL, api_key="none", **server.clients())

Replies are returned in order, whole or streamed as requested. `figures` are returned for every reply; None simulates a
server without WhiFlash. `failure` is raised, or returned as a response, when figures are requested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

BASE_URL = "http://127.0.0.1:9/v1"
Json = dict[str, Any]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class FakeOpenAI:
    def __init__(
        self,
        replies: list[Json],
        *,
        figures: Json | None = None,
        failure: Json | Exception | None = None,
        usage: Json = USAGE,
    ):
        self.replies = list(replies)
        self.figures = figures
        self.failure = failure
        self.usage = usage
        self.refusal: Json | None = None  # response to completions instead of a reply
        self.bodies: list[Json] = []
        self.headers: list[httpx.Headers] = []
        self.asked: list[str] = []  # URLs of requests for figures

    def clients(self) -> dict[str, Any]:
        """ChatOpenAI arguments that connect to this server."""
        transport = httpx.MockTransport(self.answer)
        whole, concurrent = httpx.Client(transport=transport), httpx.AsyncClient(transport=transport)
        return {"http_client": whole, "http_async_client": concurrent}

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return self.answer_figures(request)
        body = json.loads(request.content)
        self.bodies.append(body)
        self.headers.append(request.headers)
        if self.refusal is not None:
            return httpx.Response(**self.refusal)
        number = len(self.bodies)
        message = {"role": "assistant", **self.replies[number - 1]}
        head = {"id": f"chatcmpl-{number}", "created": 1, "model": "fake"}
        finish = message.pop("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
        if body.get("stream"):
            events = [
                json.dumps(head | {"object": "chat.completion.chunk"} | part)
                for part in _parts(message, finish, self.usage)
            ]
            content = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=content)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return httpx.Response(200, json=head | {"object": "chat.completion", "choices": [choice], "usage": self.usage})

    def answer_figures(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(str(request.url))
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return httpx.Response(**self.failure)
        if self.figures is None:
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json=self.figures)


def _parts(message: Json, finish: str, usage: Json) -> Iterator[Json]:
    """A reply as chunks: texts in two halves, calls in one chunk each, then finish reason and usage."""
    for field in ("reasoning_content", "content"):
        text = message.get(field) or ""
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            if half:
                yield _chunk({"role": "assistant", field: half})
    for index, call in enumerate(message.get("tool_calls") or []):
        yield _chunk({"role": "assistant", "tool_calls": [{"index": index, **call}]})
    yield _chunk({}, finish)
    yield {"choices": [], "usage": usage}


def _chunk(delta: Json, finish: str | None = None) -> Json:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
