"""Clients that put a mix of requests to one server, each with a time limit, and cut short those that are to be.

client = Client(http, expected, deadline_s=60)
await client.load(draw, clients=32, until=time.monotonic() + 60)
client.tally
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import httpx

from whiflash_workloads.chaos.hearing import Ear, Heard
from whiflash_workloads.chaos.mix import Draw, Request
from whiflash_workloads.chaos.verdicts import FAULTS, Expected, Tally

JSON = {"Content-Type": "application/json"}
MAX_FAULTS = 20  # enough to see what is wrong; a server that is gone is not asked a thousand times
TENTH = 0.1  # seconds for each step of `cut_at` where there are no pieces to count


@dataclass
class Client:
    """Sends requests and tallies what becomes of them."""

    http: httpx.AsyncClient
    expected: Expected
    deadline_s: float
    tally: Tally = field(default_factory=Tally)

    async def load(self, draw: Draw, clients: int, until: float) -> None:
        """As many requests at a time as there are clients; those that have begun are ended."""

        async def ask_on() -> None:
            while time.monotonic() < until and self.tally.count(*FAULTS) < MAX_FAULTS:
                await self.ask(draw.request())

        await asyncio.gather(*(ask_on() for _ in range(clients)))

    async def ask(self, request: Request) -> Heard:
        heard = await hear(self.http, request, self.deadline_s)
        self.tally.add(request, heard, self.expected)
        return heard


async def hear_all(
    http: httpx.AsyncClient, requests: Iterable[Request], at_a_time: int, deadline_s: float
) -> list[Heard]:
    turnstile = asyncio.Semaphore(at_a_time)

    async def one(request: Request) -> Heard:
        async with turnstile:
            return await hear(http, request, deadline_s)

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def hear(http: httpx.AsyncClient, request: Request, deadline_s: float) -> Heard:
    """Send one request to its fate. Nothing that a server can do raises here."""
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
        if reply.status_code != 200 or not request.streamed:
            ear.whole(reply.status_code, await reply.aread())
            return False
        return await _listen(http, request, ear, reply)
    return leaving.expired()


async def _listen(http: httpx.AsyncClient, request: Request, ear: Ear, reply: httpx.Response) -> bool:
    """Take a stream in, up to the piece at which it is cut. Whether the client left it there."""
    if request.cut_at == 0 and await _cut(http, request):
        return True
    async for line in reply.aiter_lines():
        before = ear.pieces
        ear.line(line)
        if before < request.cut_at == ear.pieces and await _cut(http, request):
            return True
    return False


async def _cut(http: httpx.AsyncClient, request: Request) -> bool:
    """Whether the stream is to be closed; a request that was aborted is read to its end."""
    if request.fate == "abort":
        await _abort(http, request)
    return request.fate == "leave"


async def _abort(http: httpx.AsyncClient, request: Request) -> None:
    (await http.post("/abort_request", json={"rid": request.rid})).raise_for_status()


@contextlib.asynccontextmanager
async def _cut_by_the_clock(http: httpx.AsyncClient, request: Request) -> AsyncIterator[asyncio.Timeout]:
    """What is not streamed shows no pieces: it is aborted, or left, after some tenths of a second."""
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
