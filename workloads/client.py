"""The server under test: its OpenAI API, two of SGLang's own routes, and what WhiFlash tells of a request.

Behind a gateway (SGLang's: `GET /workers` names them) stand several servers. Requests go to the gateway; what only
servers know, their context, tokens and figures, is asked of them, so that they must be reachable from here.

A connection that fails before anything of an answer has come is tried again, `retries` times, with growing pauses;
whatever fails later, or for another reason, is the turn's error at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
from openai import APIConnectionError, APITimeoutError, AsyncOpenAI, OpenAIError
from pydantic import ValidationError

from whiflash_workloads.fitting import Message, Prompt, fit, upper_bound
from whiflash_workloads.report import Totals, sum_of
from whiflash_workloads.speculation import RequestFigures
from whiflash_workloads.streaming import Incoming

RETRY_SECONDS = 0.25  # before the first retry; twice as long before each further one
PROBE_SECONDS = 10.0  # for a question that a living server answers at once
TRACE = {"custom_params": {"whiflash": {"trace": True}}}
IGNORE_EOS = {"ignore_eos": True}  # SGLang's: the reply ends at max_tokens, and nowhere else

Tools = list[dict[str, Any]]


class ServerUnreachable(ConnectionError):
    """No server answers at the base URL."""


class ServerGone(ConnectionError):
    """The server stopped answering while it was measured."""


class Sampling(NamedTuple):
    """What every request carries."""

    max_tokens: int
    temperature: float


class Answer(NamedTuple):
    """A whole answer, or the error that stands in its place."""

    incoming: Incoming
    retries: int
    error: Exception | None


class Server:
    """`speculates` and `is_whiflash` are known once `totals` has been asked for.

    `behind`: base URLs of the servers behind a gateway; "", the base URL itself, where there is none.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        base_url: str,
        model: str,
        context: int,
        retries: int,
        sampling: Sampling,
        behind: Sequence[str] = ("",),
    ):
        self.http = http
        self.base_url = base_url
        self.model = model
        self.context = context
        self.retries = retries
        self.sampling = sampling
        self.behind = tuple(behind)
        self.speculates = self.is_whiflash = False
        self.client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=http.timeout.read)

    @classmethod
    async def connect(cls, http: httpx.AsyncClient, base_url: str, retries: int, sampling: Sampling) -> Server:
        """Ask the server what it serves; raises ServerUnreachable, or ValueError for options that it cannot meet."""
        try:
            model, behind = await served(http), [""]
            if "max_model_len" not in model:  # a gateway does not say it
                behind = await workers(http)
                model = await served(http, behind[0])
            name, context = model["id"], int(model["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(
                f"--base-url {base_url}: no server answers /v1/models there ({type(error).__name__}: {error}); "
                "start one, e.g. with `make serve`, and give its address without /v1"
            ) from error
        if sampling.max_tokens >= context:
            raise ValueError(f"--max-tokens {sampling.max_tokens}: the server's context is {context}; give less")
        return cls(http, base_url.rstrip("/"), name, context, retries, sampling, behind)

    async def totals(self) -> Totals | None:
        """The counters of WHIFLASH, of all servers together; None where they have none, or one is gone."""
        found = []
        for server in self.behind:
            try:
                reply = await self.http.get(f"{server}/server_info", timeout=PROBE_SECONDS)
            except httpx.HTTPError:  # gone in the meantime: its turns have failed, and are the report
                return None
            if reply.status_code != 200:
                return None
            info = reply.json()
            self.speculates = info.get("speculative_algorithm") is not None
            states = info.get("internal_states") or [{}]
            found += [state["whiflash"] for state in states if "whiflash" in state]  # one of each replica
        self.is_whiflash = bool(found)
        return sum_of(found) if found else None

    async def is_there(self) -> bool:
        try:
            await self.http.get("/v1/models", timeout=PROBE_SECONDS)
        except httpx.HTTPError:
            return False
        return True

    def surely_fits(self, history: list[Message], tools: Tools) -> bool:
        """Whether a prompt fits without asking the server for its tokens."""
        return upper_bound(history, tools) <= self.room

    @property
    def room(self) -> int:
        return self.context - self.sampling.max_tokens - 1

    async def fit(self, history: list[Message], tools: Tools) -> Prompt | Exception:
        """The prompt, cut to the context where it has to be, or why there is none."""
        if self.surely_fits(history, tools):
            return Prompt(history, 0, False)

        async def count(messages: list[Message]) -> int:
            body = {"model": self.model, "messages": messages} | ({"tools": tools} if tools else {})
            reply = await self.http.post(f"{self.behind[0]}/v1/tokenize", json=body)
            reply.raise_for_status()
            return int(reply.json()["count"])

        try:
            return await fit(history, self.room, count)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:  # also PromptTooLong
            return error

    async def num_tokens(self, text: str) -> int:
        """How many tokens the server makes of a text; raises ValueError where it does not say."""
        try:
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            reply = await self.http.post(f"{self.behind[0]}/v1/tokenize", json=body)
            reply.raise_for_status()
            return int(reply.json()["count"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--base-url {self.base_url}: prompts for traces of lengths need the server's tokens, and /v1/tokenize "
                f"does not count them ({type(error).__name__}: {error}); replay an SGLang server, or traces with texts"
            ) from error

    async def ask(
        self, messages: list[Message], tools: Tools, trace: bool = False, length: int | None = None
    ) -> Answer:
        """One request, with retries; only WhiFlash is asked to trace its rounds.

        The reply ends by itself, or with a `length` where it has so many tokens, but at most those of the sampling.
        """
        extra = (TRACE if trace and self.is_whiflash else {}) | ({} if length is None else IGNORE_EOS)
        max_tokens = self.sampling.max_tokens if length is None else min(length, self.sampling.max_tokens)
        for attempt in itertools.count():
            incoming = Incoming()
            error = await self._stream(incoming, messages, tools, max_tokens, extra)
            nothing_came = not incoming.pieces
            if attempt == self.retries or not (nothing_came and is_connection_failure(error)):
                break
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        return Answer(incoming, attempt, error)

    async def _stream(
        self, incoming: Incoming, messages: list[Message], tools: Tools, max_tokens: int, extra: dict[str, Any]
    ) -> Exception | None:
        try:
            async with asyncio.timeout(self.http.timeout.read):  # of the whole answer
                stream = await self.client.chat.completions.create(  # type: ignore[call-overload]
                    model=self.model,
                    messages=messages,
                    tools=tools or None,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=extra or None,
                    max_tokens=max_tokens,
                    temperature=self.sampling.temperature,
                )
                async for chunk in stream:
                    incoming.take(chunk)
                incoming.end()
        except TimeoutError:
            return TimeoutError(f"no whole answer in {self.http.timeout.read:g} s")
        except (OpenAIError, httpx.HTTPError, ValueError) as error:  # ValueError: an event that is no JSON
            return error
        if not incoming.finished or incoming.usage is None:
            return ConnectionError("the stream ended before the text did")
        return None

    async def speculation(self, request_id: str) -> RequestFigures | str:
        """What WhiFlash says of a request that has ended, or in a few words why it says nothing."""
        try:
            for server in self.behind:
                reply = await self.http.get(f"{server}/whiflash/requests/{request_id}", timeout=PROBE_SECONDS)
                if reply.status_code == 200:
                    return RequestFigures.model_validate_json(reply.content)
            return f"HTTP {reply.status_code}"
        except httpx.HTTPError as error:
            return type(error).__name__
        except ValidationError as error:
            first = error.errors()[0]
            return f"field {'.'.join(map(str, first['loc'])) or '(whole)'}: {first['msg']}"


async def served(http: httpx.AsyncClient, server: str = "") -> dict[str, Any]:
    """What a server says of its model."""
    reply = await http.get(f"{server}/v1/models")
    reply.raise_for_status()
    model: dict[str, Any] = reply.json()["data"][0]
    return model


async def workers(http: httpx.AsyncClient) -> list[str]:
    """Base URLs of the servers behind a gateway."""
    reply = await http.get("/workers")
    reply.raise_for_status()
    return [worker["url"] for worker in reply.json()["workers"]]


def is_connection_failure(error: Exception | None) -> bool:
    """Refused, reset or closed; a server that is merely slow or says no has been reached."""
    slow = isinstance(error, (APITimeoutError, httpx.TimeoutException))
    return isinstance(error, (APIConnectionError, httpx.TransportError)) and not slow
