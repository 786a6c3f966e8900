"""The stress kit's HTTP client. Sends requests with a time limit, and aborts or leaves those whose fate it is.

heard = await hear(http, request, deadline_s=60)                    one request
client = Client(http, expected, deadline_s=60)
await client.load(draw, clients=32, until=time.monotonic() + 60)    many; `client.tally` has the verdicts
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import httpx

from whiflash_workloads.stress.answers import Ear, Heard
from whiflash_workloads.stress.requests import Draw, Request
from whiflash_workloads.stress.verdicts import FAULTS, Expected, Tally

JSON = {"Content-Type": "application/json"}
STREAM = "text/event-stream"
MAX_FAULTS = 20  # enough to see what is wrong; then the load ends
TENTH = 0.1  # seconds per step of `cut_at` for answers that are not streamed


@dataclass
class Client:
    """Sends requests and counts the verdicts."""

    http: httpx.AsyncClient
    expected: Expected
    deadline_s: float
    tally: Tally = field(default_factory=Tally)

    async def load(self, draw: Draw, clients: int, until: float) -> None:
        """Keep `clients` requests in flight. Requests that have begun are finished."""

        async def ask_on() -> None:
            while time.monotonic() < until and self.tally.count(*FAULTS) < MAX_FAULTS:
                await self.ask(draw.request())

        await asyncio.gather(*(ask_on() for _ in range(clients)))

    async def ask(self, request: Request) -> Heard:
        """Send one request and count its verdict."""
        heard = await hear(self.http, request, self.deadline_s)
        self.tally.add(request, heard, self.expected)
        return heard


async def hear_all(
    http: httpx.AsyncClient, requests: Iterable[Request], at_a_time: int, deadline_s: float
) -> list[Heard]:
    """Send all requests, `at_a_time` in flight."""
    turnstile = asyncio.Semaphore(at_a_time)

    async def one(request: Request) -> Heard:
        async with turnstile:
            return await hear(http, request, deadline_s)

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def hear(http: httpx.AsyncClient, request: Request, deadline_s: float) -> Heard:
    """Send one request, and abort or leave it if that is its fate. Whatever the server does is in the result."""
    ear = Ear(request.path, request.replies)
    try:
        async with asyncio.timeout(deadline_s):
            left = await _exchange(http, request, ear)
    except TimeoutError:
        return ear.heard(late=True)
    except httpx.HTTPError as error:
        ear.error = f"{type(error).__name__}: {error}"
        left = False
    return ear.heard(left=left)


async def _exchange(http: httpx.AsyncClient, request: Request, ear: Ear) -> bool:
    """Whether the client left."""
    sending = http.stream(request.method, request.path, content=_content(request), headers=JSON)
    async with _cut_by_the_clock(http, request) as leaving, sending as reply:
        if reply.status_code != 200 or not reply.headers.get("content-type", "").startswith(STREAM):
            ear.whole(reply.status_code, await reply.aread())
            return False
        return await _listen(http, request, ear, reply)
    return leaving.expired()


async def _listen(http: httpx.AsyncClient, request: Request, ear: Ear, reply: httpx.Response) -> bool:
    """Read a stream up to the event at which it is cut. Returns whether the client left."""
    if request.cut_at == 0 and await _cut(http, request):
        return True
    async for line in _lines(reply):
        before = ear.pieces
        ear.line(line)
        if before < request.cut_at == ear.pieces and await _cut(http, request):
            return True
    return False


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Lines that end with a line feed. httpx also splits at characters that JSON does not escape, such as U+2028."""
    rest = b""
    async for chunk in reply.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    yield rest.decode(errors="replace")


async def _cut(http: httpx.AsyncClient, request: Request) -> bool:
    """Abort the request if that is its fate. Returns whether to close the stream; an aborted one is read to its end."""
    if request.fate == "abort":
        await _abort(http, request)
    return request.fate == "leave"


async def _abort(http: httpx.AsyncClient, request: Request) -> None:
    (await http.post("/abort_request", json={"rid": request.rid})).raise_for_status()


@contextlib.asynccontextmanager
async def _cut_by_the_clock(http: httpx.AsyncClient, request: Request) -> AsyncIterator[asyncio.Timeout]:
    """Without events to count, abort or leave after some tenths of a second."""
    counted = request.streamed or request.fate == "finish"
    seconds = TENTH * request.cut_at
    aborting = None
    if not counted and request.fate == "abort":
        aborting = asyncio.create_task(_abort_later(http, request, seconds))
    try:
        async with asyncio.timeout(seconds if not counted and request.fate == "leave" else None) as leaving:
            yield leaving
    except TimeoutError:
        if not leaving.expired():
            raise
    finally:
        if aborting is not None:
            aborting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await aborting


async def _abort_later(http: httpx.AsyncClient, request: Request, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await _abort(http, request)


def _content(request: Request) -> bytes | None:
    if isinstance(request.body, bytes):
        return request.body or None
    return json.dumps(request.body).encode()
