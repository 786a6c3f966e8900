"""WhiFlash's routes in SGLang's HTTP server.

    GET /whiflash/stats            the totals of `GET /server_info` (`totals.py`), model, router, drafters, and each
                                   replica's `ranks` (`ranks.py`); with several replicas their sum, and each of them
    GET /whiflash/priors           the learned priors, as a file for `--whiflash-priors` (`priors.py`); `?replica=N`
                                   picks a replica, as each learns separately
    GET /whiflash/requests/{id}    the figures of one of the last 1,024 finished requests; id: the completion's id

They require `--api-key` like SGLang's own routes; `priors`, which contains tool names, requires `--admin-api-key` if
one is set. Request figures are taken from `meta_info` as it arrives in the HTTP process, so streamed chats have them.

Text is kept only for requests with the hint `trace`, the last 64 of them. Anyone who knows an id can read its figures.
Text is therefore kept only under unguessable ids, such as SGLang's. A client that sets its own `rid` finds the trace
in its reply's `meta_info`.
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
MAX_ID = 256  # characters; a client's own id may have any length
UNGUESSABLE = re.compile(r"[0-9a-f]{32}\Z")  # ids that end with a random UUID
TRACE_FIELDS = ("first", "trace", "trace_rounds_left_out")
REPLACEMENT = "\ufffd"  # result of decoding an incomplete character
MAX_CHARACTER_TOKENS = 4  # max bytes per character in UTF-8


class Finished:
    """Figures of the last finished requests, by id."""

    def __init__(self, max_requests: int = MAX_FINISHED, max_traces: int = MAX_TRACES):
        self.max_requests = max_requests
        self.max_traces = max_traces
        self.figures: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self.traces: OrderedDict[str, bytes] = OrderedDict()  # as JSON, which is much smaller

    def keep(self, request_id: str, figures: Mapping[str, Any]) -> None:
        """Keep a request's figures and drop the oldest. A reused id overwrites the earlier request."""
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
        """A request's figures, or None. A dropped trace is None, with `trace_forgotten` or `trace_withheld`."""
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
    """Maps token ids to the text that each adds. `decode` must keep special tokens and spaces.

    Some tokenizers drop a leading space, so tokens are decoded after `anchor`. If several tokens form one character,
    the last one gets it and the others get "".
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
    """A traced request's figures, with texts instead of token ids."""
    rounds = figures["trace"]
    ids = [token for entry in rounds for token in entry["tokens"]]
    if figures["first"] is None:  # aborted during prefill
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
    """Create the routes.

    `states` returns every replica's scheduler state, including priors with `priors=True`. `about`: this server's model,
    router and drafters. `for_operators` marks an endpoint that requires the admin key if one is set.
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
            return not_found(f"This server has no priors; start it with {FLAG_PRIORS} learned or a priors file.")
        return JSONResponse(content)

    @router.get("/requests/{request_id:path}")  # a client's own id may contain slashes
    async def request(request_id: str) -> Response:
        figures = finished.get(request_id)
        if figures is not None:
            return JSONResponse(figures)
        return not_found(
            f"No figures for request {shown(request_id)}: only the last {finished.max_requests} finished requests are "
            "kept. Use the `id` of a finished completion."
        )

    return router


def not_found(message: str) -> JSONResponse:
    """HTTP 404 with an error object in OpenAI's format."""
    error = {"object": "error", "message": message, "type": "NotFoundError", "param": None, "code": 404}
    return JSONResponse(error, status_code=404)
