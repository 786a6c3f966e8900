"""Client for the server under test: its OpenAI API, two of SGLang's own routes, and WhiFlash's request figures.

With SGLang's gateway (`GET /workers`), requests go to the gateway. Context length, token counts and figures are read
from the servers themselves, which must be reachable.

A connection that fails before any output is retried up to `retries` times, with exponential backoff. All other failures
are errors of the turn.
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

RETRY_SECONDS = 0.25  # before the first retry, then doubled
PROBE_SECONDS = 10.0  # timeout of requests that a live server answers immediately
TRACE = {"custom_params": {"whiflash": {"trace": True}}}
IGNORE_EOS = {"ignore_eos": True}  # SGLang's: the reply ends only at max_tokens

Tools = list[dict[str, Any]]


class ServerUnreachable(ConnectionError):
    """No server answers at the base URL."""


class ServerGone(ConnectionError):
    """The server stopped responding during the replay."""


class Sampling(NamedTuple):
    """Sampling options of every request."""

    max_tokens: int
    temperature: float


class Answer(NamedTuple):
    """A complete answer or an error."""

    incoming: Incoming
    retries: int
    error: Exception | None


class Server:
    """The server under test. `speculates` and `is_whiflash` are set by `totals`.

    `behind`: base URLs of the gateway's servers, or "" for the base URL itself.
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
        """Connect and read model and context length. Raises ServerUnreachable, or ValueError if `sampling` exceeds the
        context."""
        try:
            model, behind = await served(http), [""]
            if "max_model_len" not in model:  # a gateway
                behind = await workers(http)
                model = await served(http, behind[0])
            name, context = model["id"], int(model["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(
                f"--base-url {base_url}: no response to /v1/models ({type(error).__name__}: {error}); "
                "start a server, e.g. with `make serve`, and give its address without /v1"
            ) from error
        if sampling.max_tokens >= context:
            raise ValueError(f"--max-tokens {sampling.max_tokens}: the server's context is {context}; use less")
        return cls(http, base_url.rstrip("/"), name, context, retries, sampling, behind)

    async def totals(self) -> Totals | None:
        """WHIFLASH's counters, summed over all servers. None if they have none or one is unreachable."""
        found = []
        for server in self.behind:
            try:
                reply = await self.http.get(f"{server}/server_info", timeout=PROBE_SECONDS)
            except httpx.HTTPError:  # gone; its failed turns are reported
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
        """Whether the server responds."""
        try:
            await self.http.get("/v1/models", timeout=PROBE_SECONDS)
        except httpx.HTTPError:
            return False
        return True

    def surely_fits(self, history: list[Message], tools: Tools) -> bool:
        """Whether a prompt fits by an upper bound, without counting tokens on the server."""
        return upper_bound(history, tools) <= self.room

    @property
    def room(self) -> int:
        """Maximum prompt length in tokens."""
        return self.context - self.sampling.max_tokens - 1

    async def fit(self, history: list[Message], tools: Tools) -> Prompt | Exception:
        """The prompt, cut to the context if necessary. Returns the error if that fails."""
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
        """The number of tokens in `text`, counted by the server. Raises ValueError if the server cannot."""
        try:
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            reply = await self.http.post(f"{self.behind[0]}/v1/tokenize", json=body)
            reply.raise_for_status()
            return int(reply.json()["count"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--base-url {self.base_url}: length-only traces need token counts from the server, but /v1/tokenize "
                f"failed ({type(error).__name__}: {error}); use an SGLang server, or traces with texts"
            ) from error

    async def ask(
        self, messages: list[Message], tools: Tools, trace: bool = False, length: int | None = None
    ) -> Answer:
        """Send one request, with retries. `trace` only affects WhiFlash servers.

        The reply ends by itself or, if `length` is given, after that many tokens; never beyond the sampling's maximum.
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
            async with asyncio.timeout(self.http.timeout.read):  # for the whole answer
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
            return TimeoutError(f"no complete answer within {self.http.timeout.read:g} s")
        except (OpenAIError, httpx.HTTPError, ValueError) as error:  # ValueError: an event is not JSON
            return error
        if not incoming.finished or incoming.usage is None:
            return ConnectionError("the stream ended before the reply was complete")
        return None

    async def speculation(self, request_id: str) -> RequestFigures | str:
        """WhiFlash's figures of a finished request, or a short reason why there are none."""
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
    """The server's first model, from /v1/models. Raises httpx.HTTPError."""
    reply = await http.get(f"{server}/v1/models")
    reply.raise_for_status()
    model: dict[str, Any] = reply.json()["data"][0]
    return model


async def workers(http: httpx.AsyncClient) -> list[str]:
    """Base URLs of a gateway's servers. Raises httpx.HTTPError."""
    reply = await http.get("/workers")
    reply.raise_for_status()
    return [worker["url"] for worker in reply.json()["workers"]]


def is_connection_failure(error: Exception | None) -> bool:
    """Whether a connection was refused, reset or closed. Timeouts and error responses are not connection failures."""
    slow = isinstance(error, (APITimeoutError, httpx.TimeoutException))
    return isinstance(error, (APIConnectionError, httpx.TransportError)) and not slow
