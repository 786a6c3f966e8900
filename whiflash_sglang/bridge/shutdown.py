"""A server that is told to end (SIGTERM) ends soon: running requests may finish, for a while; new ones are refused.

SGLang by itself waits for its requests as long as they take, looks only every five seconds whether they have ended,
and takes new ones meanwhile, so that under load it never ends. Whoever stops servers (systemd, Kubernetes, a script)
kills what does not end, and then streams break off without a word.

Imports the standard library only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

LOOK_SECONDS = 0.1
FINISH_SECONDS = 4.0  # that running requests have
ABORT_SECONDS = 1.5  # that they then have to be gone
WRITE_SECONDS = 0.3  # for the last pieces to reach the clients
REFUSAL = {
    "object": "error",
    "message": "the server is ending and takes no new requests; send it to another one, or again later",
    "type": "ServiceUnavailable",
    "param": None,
    "code": 503,
}
STILL_TAKEN = ("/abort_request",)

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class Manager(Protocol):
    """Of SGLang's tokenizer manager, what is needed to end its requests."""

    gracefully_exit: bool
    rid_to_state: dict[str, Any]

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None: ...


async def requests_have_ended(manager: Manager) -> bool:
    """Wait until the server is told to end and its requests are gone; False if some are still there."""
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
    """ASGI: whatever is posted to a server that is ending gets a 503 that says so."""

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
