"""What SGLang's own HTTP server shows of WHIFLASH.

    GET /whiflash/stats            the totals of `GET /server_info` (`observe.py`), with model, router and drafters, and
                                   `ranks` of each replica (`ranks.py`); of several replicas the sum, and each of them
    GET /whiflash/priors           what this server has learned to add to its router's score, as a file for
                                   `--whiflash-priors` (`priors.py`); `?replica=N`: each learns for itself
    GET /whiflash/requests/{id}    the figures of one of the last 1,024 finished requests; id: that of the completion

They are guarded by `--api-key` as all of SGLang's routes are, and `priors`, which names tools, by `--admin-api-key`
where there is one. What a request's figures hold comes from its `meta_info` as that arrives in the HTTP process, so
that streamed chats have them too.

No text is kept but what a request with the hint `trace` asked for, and of these the last 64 only. Who knows an id sees
its figures; so text is kept only under ids that cannot be guessed, which those are that SGLang gives. A client that
gives its own `rid` has the trace in its reply's `meta_info`.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from whiflash_sglang.bridge.replicas import together
from whiflash_sglang.core.errors import shown
from whiflash_sglang.startup.config import FLAG_PRIORS

Endpoint = Callable[..., Awaitable[Response]]

MAX_FINISHED = 1024
MAX_TRACES = 64
MAX_ID = 256  # characters: a client may give an id of its own, of any length
UNGUESSABLE = re.compile(r"[0-9a-f]{32}\Z")  # how ids end that are made of a random UUID
TRACE_FIELDS = ("first", "trace", "trace_rounds_left_out")
REPLACEMENT = "\ufffd"  # what an unfinished character is decoded to
MAX_CHARACTER_TOKENS = 4  # bytes of a character in UTF-8


class Finished:
    """Figures of the last finished requests, by id."""

    def __init__(self, max_requests: int = MAX_FINISHED, max_traces: int = MAX_TRACES):
        self.max_requests = max_requests
        self.max_traces = max_traces
        self.figures: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self.traces: OrderedDict[str, bytes] = OrderedDict()  # as JSON, which is smaller by far

    def keep(self, request_id: str, figures: Mapping[str, Any]) -> None:
        """Keep a request's figures, and forget the oldest. An id that comes again stands for its last request."""
        if len(request_id) > MAX_ID:
            return
        self.traces.pop(request_id, None)
        self.figures.pop(request_id, None)
        self.figures[request_id] = {key: value for key, value in figures.items() if key not in TRACE_FIELDS}
        if "trace" in figures and UNGUESSABLE.search(request_id):
            self.traces[request_id] = json.dumps({key: figures[key] for key in TRACE_FIELDS}).encode()
            if len(self.traces) > self.max_traces:
                self.traces.popitem(last=False)
        if len(self.figures) > self.max_requests:
            oldest, _ = self.figures.popitem(last=False)
            self.traces.pop(oldest, None)

    def get(self, request_id: str) -> dict[str, Any] | None:
        figures = self.figures.get(request_id)
        if figures is None:
            return None
        trace = self.traces.get(request_id)
        if trace is not None:
            return {**figures, **json.loads(trace)}
        if not figures["hints"].get("trace"):
            return dict(figures)
        why = "trace_forgotten" if UNGUESSABLE.search(request_id) else "trace_withheld"
        return {**figures, "trace": None, why: True}


class TokenTexts:
    """Token ids as the text that each adds. `decode` must leave special tokens and spaces as they are.

    Some tokenizers drop a space at the beginning: tokens are decoded behind another one, `anchor`. Where a character is
    made of several tokens, the last of them has it and the others have "".
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], anchor: Sequence[int]):
        self.decode = decode
        self.anchor = list(anchor)
        self.anchor_len = len(decode(self.anchor))
        self.known: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        texts: list[str] = []
        unfinished: list[int] = []
        for i, token in enumerate(tokens):
            unfinished.append(token)
            text = self._one(token) if len(unfinished) == 1 else self._several(unfinished)
            may_go_on = len(unfinished) < MAX_CHARACTER_TOKENS and i + 1 < len(tokens)
            if text.endswith(REPLACEMENT) and may_go_on:
                texts.append("")
            else:
                texts.append(text)
                unfinished = []
        return texts

    def _one(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self._several([token])
        return self.known[token]

    def _several(self, tokens: Sequence[int]) -> str:
        return self.decode([*self.anchor, *tokens])[self.anchor_len :]


def with_texts(figures: dict[str, Any], texts: TokenTexts) -> dict[str, Any]:
    """A traced request's figures with token texts in the place of token ids."""
    rounds = figures["trace"]
    ids = [token for entry in rounds for token in entry["tokens"]]
    if figures["first"] is None:  # it was ended before its prompt was whole
        committed, first = iter(texts(ids)), None
    else:
        committed = iter(texts([figures["first"], *ids]))
        first = next(committed)
    trace = [
        {**entry, "drafts": texts(entry["drafts"]), "tokens": [next(committed) for _ in entry["tokens"]]}
        for entry in rounds
    ]
    return {**figures, "first": first, "trace": trace}


def routes(
    finished: Finished,
    states: Callable[..., Awaitable[Sequence[Mapping[str, Any]]]],
    about: Mapping[str, Any],
    for_operators: Callable[[Endpoint], Endpoint],
) -> APIRouter:
    """The routes. `states` asks every replica's scheduler, with `priors=True` for its priors too; `about`: model,
    router and drafters of this server.

    `for_operators` marks an endpoint that asks for the operator's key where there is one.
    """
    router = APIRouter(prefix="/whiflash")

    @router.get("/stats")
    async def stats() -> JSONResponse:
        replicas = await states()
        each = [{**state["whiflash"], "ranks": state["whiflash_ranks"]} for state in replicas]
        if len(each) == 1:
            return JSONResponse({**about, **each[0]})
        return JSONResponse({**about, **together([state["whiflash"] for state in replicas]), "replicas": each})

    @router.get("/priors")
    @for_operators
    async def priors(replica: int = 0) -> Response:
        replicas = await states(priors=True)
        if not 0 <= replica < len(replicas):
            return not_found(f"No replica {replica}: this server has {len(replicas)}, counted from 0.")
        content = replicas[replica]["whiflash_priors"]
        if content is None:
            return not_found(f"This server has no priors; start it with {FLAG_PRIORS} learned, or with a file of them.")
        return JSONResponse(content)

    @router.get("/requests/{request_id:path}")  # a client's own id may hold slashes
    async def request(request_id: str) -> Response:
        figures = finished.get(request_id)
        if figures is not None:
            return JSONResponse(figures)
        return not_found(
            f"No figures of request {shown(request_id)}: they are kept of the last {finished.max_requests} finished "
            "requests. Use the `id` of a completion, after its end."
        )

    return router


def not_found(message: str) -> JSONResponse:
    error = {"object": "error", "message": message, "type": "NotFoundError", "param": None, "code": 404}
    return JSONResponse(error, status_code=404)
