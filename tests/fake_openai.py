"""An OpenAI server without a socket: an httpx transport that answers chat completions as SGLang does.

    server = FakeOpenAI([{"content": "hi", "reasoning_content": "greet"}], figures={"rounds": 3})
    model = ChatWhiFlash(model="fake", base_url=BASE_URL, api_key="none", **server.clients())

Replies are given in order, whole or streamed as the request asks. `figures` are those of every reply; None: the server
is no WhiFlash server. `failure` is raised, or answered if it is an answer, when figures are asked for.
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
        self.refusal: Json | None = None  # what completions are answered with instead
        self.bodies: list[Json] = []
        self.headers: list[httpx.Headers] = []
        self.asked: list[str] = []  # URLs that figures were asked of

    def clients(self) -> dict[str, Any]:
        """What makes ChatOpenAI talk to this server."""
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
    """A reply as chunks: each text in two halves, each call in one chunk, then the end and the token counts."""
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
