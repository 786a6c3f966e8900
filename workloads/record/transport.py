"""httpx transports that record chat completions and pass everything else through.

Requests ask for uncompressed replies. Bytes are forwarded as they arrive.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import httpx

from whiflash_workloads.record.recorder import Exchange, Recorder

SESSION_HEADER = "X-Session-Affinity"
ROUTE = "/chat/completions"


def is_chat_completion(request: httpx.Request) -> bool:
    """Whether a request is a chat completion."""
    return request.method == "POST" and request.url.path.endswith(ROUTE)


class RecordingTransport(httpx.BaseTransport):
    """For `httpx.Client(transport=...)`. `recorder` may also be a file path; it is then closed with the client."""

    def __init__(self, recorder: Recorder | str | os.PathLike[str], inner: httpx.BaseTransport | None = None):
        self.recorder, self._owned = _recorder(recorder)
        self.inner = inner or httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not is_chat_completion(request):
            self.recorder.count_passed_on()
            return self.inner.handle_request(request)
        request.read()
        exchange = _begin(self.recorder, request)
        try:
            response = self.inner.handle_request(request)
        except BaseException as error:
            _abandon(exchange, error)
            raise
        if exchange is not None and _is_answered(exchange, response):
            assert isinstance(response.stream, httpx.SyncByteStream)
            return _with_stream(response, _Tapped(response.stream, exchange))
        return response

    def close(self) -> None:
        self.inner.close()
        if self._owned:
            self.recorder.close()


class AsyncRecordingTransport(httpx.AsyncBaseTransport):
    """For `httpx.AsyncClient(transport=...)`."""

    def __init__(self, recorder: Recorder | str | os.PathLike[str], inner: httpx.AsyncBaseTransport | None = None):
        self.recorder, self._owned = _recorder(recorder)
        self.inner = inner or httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not is_chat_completion(request):
            self.recorder.count_passed_on()
            return await self.inner.handle_async_request(request)
        await request.aread()
        exchange = _begin(self.recorder, request)
        try:
            response = await self.inner.handle_async_request(request)
        except BaseException as error:
            _abandon(exchange, error)
            raise
        if exchange is not None and _is_answered(exchange, response):
            assert isinstance(response.stream, httpx.AsyncByteStream)
            return _with_stream(response, _AsyncTapped(response.stream, exchange))
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()
        if self._owned:
            self.recorder.close()


class _Tapped(httpx.SyncByteStream):
    """A reply's stream that feeds each chunk to the exchange before the client sees it."""

    def __init__(self, inner: httpx.SyncByteStream, exchange: Exchange):
        self.inner, self.exchange = inner, exchange

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.inner:
                self.exchange.feed(chunk)
                yield chunk
        except httpx.HTTPError as error:
            _abandon(self.exchange, error)
            raise
        self.exchange.end()

    def close(self) -> None:
        self.exchange.end()  # clients may stop reading before the end of the stream
        self.inner.close()


class _AsyncTapped(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, exchange: Exchange):
        self.inner, self.exchange = inner, exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.inner:
                self.exchange.feed(chunk)
                yield chunk
        except httpx.HTTPError as error:
            _abandon(self.exchange, error)
            raise
        self.exchange.end()

    async def aclose(self) -> None:
        self.exchange.end()
        await self.inner.aclose()


def _recorder(given: Recorder | str | os.PathLike[str]) -> tuple[Recorder, bool]:
    """A recorder, and whether it was made here."""
    return (given, False) if isinstance(given, Recorder) else (Recorder(given), True)


def _begin(recorder: Recorder, request: httpx.Request) -> Exchange | None:
    request.headers["Accept-Encoding"] = "identity"
    return recorder.begin(request.content, request.headers.get(SESSION_HEADER))


def _abandon(exchange: Exchange | None, error: BaseException) -> None:
    if exchange is not None:
        failed = isinstance(error, httpx.HTTPError)
        exchange.abandon(f"the upstream failed ({type(error).__name__})" if failed else "the client disconnected")


def _is_answered(exchange: Exchange, response: httpx.Response) -> bool:
    if response.status_code != httpx.codes.OK:
        exchange.abandon(f"HTTP status {response.status_code}")
        return False
    exchange.respond(response.headers)
    return True


def _with_stream(response: httpx.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    return httpx.Response(response.status_code, headers=response.headers, stream=stream, extensions=response.extensions)
