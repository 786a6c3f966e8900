"""Graceful shutdown on SIGTERM: running requests may finish within a time limit, new ones are rejected.

SGLang waits for its requests without a limit, polls only every five seconds, and keeps accepting new ones. Under load
it never exits, so systemd or Kubernetes kill it and streams break off.

Imports the standard library only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

LOOK_SECONDS = 0.1
FINISH_SECONDS = 4.0  # for running requests to finish
ABORT_SECONDS = 1.5  # for aborted requests to end
WRITE_SECONDS = 0.3  # for the last chunks to reach the clients
REFUSAL = {
    "object": "error",
    "message": "the server is shutting down and accepts no new requests; retry later or use another server",
    "type": "ServiceUnavailable",
    "param": None,
    "code": 503,
}
STILL_TAKEN = ("/abort_request",)

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class Manager(Protocol):
    """The part of SGLang's tokenizer manager that shutdown needs."""

    gracefully_exit: bool
    rid_to_state: dict[str, Any]

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None: ...


async def requests_have_ended(manager: Manager) -> bool:
    """Wait for SIGTERM, then for all requests to end, aborting them after a while. False if some did not end."""
    while not manager.gracefully_exit:
        await asyncio.sleep(LOOK_SECONDS)
    if not await _gone(manager, FINISH_SECONDS):
        manager.abort_request(abort_all=True)
        if not await _gone(manager, ABORT_SECONDS):
            return False
    await asyncio.sleep(WRITE_SECONDS)
    return True


async def _gone(manager: Manager, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while manager.rid_to_state and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_SECONDS)
    return not manager.rid_to_state


class RefuseWhenEnding:
    """ASGI middleware: answers POST requests with 503 during shutdown."""

    def __init__(self, app: App, is_ending: Callable[[], bool]):
        self.app = app
        self.is_ending = is_ending

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        is_request = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] not in STILL_TAKEN
        if not (is_request and self.is_ending()):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(REFUSAL).encode()})
