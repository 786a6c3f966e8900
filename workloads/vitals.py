"""Resources of a running server (KV slots, queue, process memory), to detect leaks."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

IDLE_S = 60.0
MIB = 2**20


def load(base_url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """SGLang's queue and pool load, as of its last step. Raises httpx.HTTPError."""
    reply = httpx.get(f"{base_url}/v1/loads", params={"include": "core"}, headers=headers, timeout=30)
    reply.raise_for_status()
    found: dict[str, Any] = reply.json()["loads"][0]
    return found


def wait_until_free(base_url: str, seconds: float = IDLE_S) -> int:
    """Wait until the server is idle; return the number of free or evictable KV slots (the current number on
    timeout)."""
    deadline = time.monotonic() + seconds
    while True:
        now = load(base_url)
        waiting = now["num_running_reqs"] + now["num_waiting_reqs"] + now["num_used_tokens"]
        if waiting == 0 or time.monotonic() > deadline:
            return int(now["max_total_num_tokens"] - now["num_used_tokens"])
        time.sleep(0.2)


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
