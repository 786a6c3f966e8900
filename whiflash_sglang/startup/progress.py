"""Startup progress, one line per step, from any process of the server.

Printed, not logged, because our default log level is `warning`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx
    from sglang.srt.server_args import ServerArgs

ASK_EVERY = 0.5  # seconds


def say(doing: str) -> None:
    """Print one progress line with a timestamp."""
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] WHIFLASH: {doing}", flush=True)


def say_when_ready(server_args: ServerArgs, request: str) -> None:
    """Wait until the server responds, then print that it is ready, with an example `request`."""
    import httpx

    url = f"{server_args.url()}/model_info"
    with httpx.Client(verify=server_args.ssl_verify(), timeout=5, trust_env=False) as client:
        while not _answers(client, url):
            time.sleep(ASK_EVERY)
    say(f"ready; try a request:\n  {request}")


def _answers(client: httpx.Client, url: str) -> bool:
    import httpx

    try:
        return client.get(url).status_code in (200, 401)  # 401: needs the API key
    except httpx.TransportError:
        return False
