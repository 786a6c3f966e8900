"""What the server is doing while it starts, one line each, from whichever of its processes does it.

Printed, not logged: SGLang's log level is `warning` unless the operator says otherwise.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

ASK_EVERY = 0.5  # seconds


def say(doing: str) -> None:
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] WHIFLASH: {doing}", flush=True)


def say_when_ready(server_args: Any, request: str) -> None:
    """Wait until the server answers, then say so, and how to ask it something (`request`)."""
    import httpx

    url = f"{server_args.url()}/model_info"
    with httpx.Client(verify=server_args.ssl_verify(), timeout=5, trust_env=False) as client:
        while not _answers(client, url):
            time.sleep(ASK_EVERY)
    say(f"ready; ask it something:\n  {request}")


def _answers(client: httpx.Client, url: str) -> bool:
    import httpx

    try:
        return client.get(url).status_code in (200, 401)  # 401: it wants its API key
    except httpx.TransportError:
        return False
