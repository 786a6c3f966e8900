"""A recording reverse proxy: forwards requests to the upstream unchanged, and replies back as they arrive.

Events are forwarded one by one. An unreachable upstream is a 502 with an error in OpenAI's format. Only failed
connection attempts are retried; a request that may have been received is never sent twice. When the client disconnects,
the upstream's reply is closed too, so the server stops working on it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from whiflash_workloads.record.recorder import Recorder
from whiflash_workloads.record.reply import EVENT_STREAM
from whiflash_workloads.record.transport import AsyncRecordingTransport

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
# Connection-level headers (RFC 9110, 7.6.1), which httpx and the server set themselves.
HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"}
CONNECT_SECONDS = 10.0
CONNECT_RETRIES = 2
# Below the 5 s after which servers close idle connections (uvicorn's default), to not lose a request to a closing one.
IDLE_SECONDS = 2.0
CLIENT_GONE = 499


def upstream_transport() -> httpx.AsyncHTTPTransport:
    """The default transport to the upstream, without connection limits."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
    return httpx.AsyncHTTPTransport(retries=CONNECT_RETRIES, limits=limits)


def build_app(upstream: httpx.URL, recorder: Recorder, inner: httpx.AsyncBaseTransport | None = None) -> Starlette:
    """The proxy application. `upstream` has no `/v1`, which is part of the clients' paths."""
    transport = AsyncRecordingTransport(recorder, inner or upstream_transport())

    async def handle(request: Request) -> Response:
        outgoing = await _outgoing(request, upstream)
        try:
            return await _unless_gone(request, _answer(transport, outgoing))
        except httpx.HTTPError as error:
            return JSONResponse(upstream_error(upstream, error), status_code=502)
        except _ClientGone:
            return Response(status_code=CLIENT_GONE)

    return Starlette(routes=[Route("/{path:path}", handle, methods=METHODS)])


def upstream_error(upstream: httpx.URL, error: Exception) -> dict[str, Any]:
    """An error object in OpenAI's format."""
    said = f"the upstream {shown(upstream)} sent no complete reply ({type(error).__name__}: {error}); is it running?"
    return {"error": {"message": said, "type": "upstream_error", "param": None, "code": 502}}


def shown(url: httpx.URL) -> str:
    """The URL without credentials and query."""
    return str(url.copy_with(username=None, password=None, query=None)).rstrip("/")


async def _outgoing(request: Request, upstream: httpx.URL) -> httpx.Request:
    url = upstream.copy_with(
        raw_path=upstream.raw_path.rstrip(b"/") + request.scope["raw_path"] + _query(request.scope["query_string"])
    )
    drop = HOP_BY_HOP | _named_by_connection(request.headers.raw) | {b"host", b"content-length"}
    headers = [(name, value) for name, value in request.headers.raw if name not in drop]
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS).as_dict()  # the client limits the reply's time
    body = await request.body()
    return httpx.Request(request.method, url, headers=headers, content=body, extensions={"timeout": timeout})


async def _answer(transport: httpx.AsyncBaseTransport, outgoing: httpx.Request) -> Response:
    """Forward event streams as they arrive. Buffer other replies, so that an incomplete one can become an error."""
    reply = await transport.handle_async_request(outgoing)
    assert isinstance(reply.stream, httpx.AsyncByteStream)
    if reply.headers.get("content-type", "").startswith(EVENT_STREAM):
        response: Response = _PassedOn(reply.stream, reply.status_code, outgoing.url)
    else:
        try:
            content = b"".join([chunk async for chunk in reply.stream])
        finally:
            await reply.stream.aclose()
        response = Response(content, reply.status_code)
    headers = [(name.lower(), value) for name, value in reply.headers.raw]
    drop = HOP_BY_HOP | _named_by_connection(headers) | {b"content-length"}
    own = [(name, value) for name, value in response.raw_headers if name == b"content-length"]
    response.raw_headers = own + [(name, value) for name, value in headers if name not in drop]
    return response


class _PassedOn(StreamingResponse):
    """A forwarded event stream."""

    def __init__(self, stream: httpx.AsyncByteStream, status_code: int, upstream: httpx.URL):
        super().__init__(_chunks(stream, upstream), status_code)
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the client disconnects, which cancels this task
            await asyncio.shield(asyncio.ensure_future(self.stream.aclose()))


async def _chunks(stream: httpx.AsyncByteStream, upstream: httpx.URL) -> AsyncIterator[bytes]:
    try:
        async for chunk in stream:
            yield chunk
    except httpx.HTTPError as error:
        yield b"data: " + json.dumps(upstream_error(upstream, error)).encode() + b"\n\n"


class _ClientGone(Exception):
    """The client has disconnected."""


async def _unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The result of `work`. Cancels it and raises _ClientGone if the client disconnects first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _named_by_connection(headers: list[tuple[bytes, bytes]]) -> set[bytes]:
    """Header names listed in `Connection`."""
    values = [value for name, value in headers if name == b"connection"]
    return {token.strip().lower() for value in values for token in value.split(b",")}


def _query(query: bytes) -> bytes:
    return b"?" + query if query else b""
