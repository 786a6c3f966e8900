"""Servers under pressure: flags for few KV slots, and the resources of a running server, to detect leaks."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

LAUNCHER = "whiflash_sglang.launch_server"
WINDOW = 8  # verify width of the demo's drafters
MAX_BACKLOG = 16
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}  # retract a request every 50 steps
IDLE_S = 60.0
MIB = 2**20


def longest_in(pool: int, window: int = WINDOW) -> int:
    """Maximum tokens of a request, including its reply, that fits into a pool of `pool` tokens."""
    return pool - 2 * window


def pressed(router: str, pool: int, models: Sequence[str] = ("--demo",)) -> list[str]:
    """Flags of a server with a pool of `pool` tokens."""
    flags = {
        "--whiflash-router": router,
        "--whiflash-max-backlog": MAX_BACKLOG,
        "--max-total-tokens": pool,
        "--chunked-prefill-size": 256,
        "--schedule-conservativeness": 0.05,  # over-admit, to force retractions
    }
    return [*models, *(str(part) for flag in flags.items() for part in flag)]


def load(base_url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """SGLang's queue and pool load, as of its last step. Raises httpx.HTTPError."""
    reply = httpx.get(f"{base_url}/v1/loads", params={"include": "core"}, headers=headers, timeout=30)
    reply.raise_for_status()
    found: dict[str, Any] = reply.json()["loads"][0]
    return found


def idle_load(base_url: str, headers: Mapping[str, str] | None = None) -> tuple[bool, int]:
    """Wait until no request runs or waits and only the cache holds KV slots, at most `IDLE_S`.

    Returns whether that happened, and the number of free or evictable KV slots.
    """
    deadline = time.monotonic() + IDLE_S
    while True:
        now = load(base_url, headers)
        is_idle = now["num_running_reqs"] + now["num_waiting_reqs"] + now["num_used_tokens"] == 0
        if is_idle or time.monotonic() > deadline:
            return is_idle, int(now["max_total_num_tokens"] - now["num_used_tokens"])
        time.sleep(0.2)


def wait_until_free(base_url: str) -> int:
    """The number of free or evictable KV slots, once the server is idle."""
    return idle_load(base_url)[1]


def flush(base_url: str) -> None:
    """Empty the radix tree."""
    httpx.post(f"{base_url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()


def resident(process_id: int) -> dict[str, float]:
    """Resident memory in MiB of each server process, by process title."""
    import psutil  # type: ignore[import-untyped]

    parent = psutil.Process(process_id)
    found: Counter[str] = Counter()
    for process in (parent, *parent.children(recursive=True)):
        title = " ".join(process.cmdline()[:1])
        found[title.partition("::")[2] or "server"] += process.memory_info().rss
    return {name: size / MIB for name, size in found.items()}


def settled(sizes: Sequence[float]) -> tuple[float, float] | None:
    """Means of the middle and last third; the first third is warm-up. None with fewer than three values."""
    third = len(sizes) // 3
    if third == 0:
        return None
    return statistics.mean(sizes[third:-third]), statistics.mean(sizes[-third:])
