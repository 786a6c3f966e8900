"""Serve multi-turn sessions from a small KV pool, abort some requests, and check for leaks.

    python scripts/soak.py [--minutes N] [--concurrency N] [--router ROUTER] [--results FILE] [-- flags of other models]

One demo server (or one of the models given after `--`) with a random router, a small backlog, chunked prefill and a KV
pool of a quarter of what the sessions need. Prompts are the histories of held-out sessions. An eighth of the requests
are aborted, and as many are left by their client, at random. SGLang also retracts requests at intervals. At the end of
each block of time, the server must become idle with every KV slot free or evictable; its memory is read and its cache
flushed. A few prompts are sent before and after the run. The last line is JSON; exit status 1 if one of its `checks` is
false.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import httpx

from whiflash_workloads import server
from whiflash_workloads.bench import finish
from whiflash_workloads.provenance import provenance
from whiflash_workloads.stress.answers import Heard
from whiflash_workloads.stress.client import hear
from whiflash_workloads.stress.requests import FATES, GENERATE, Request
from whiflash_workloads.stress.servers import (
    LAUNCHER,
    MAX_BACKLOG,
    RETRACT,
    WINDOW,
    flush,
    longest_in,
    pressed,
    resident,
    settled,
    wait_until_free,
)
from whiflash_workloads.tokens import Answers, TokenIds, ask, heldout_histories, totals

SESSIONS = 300  # in a cycle; far more than the pool can hold
MAX_TOKENS = 200
PROBES = 12
BLOCKS, MIN_BLOCK_S = 30, 10.0
REQUEST_S = 120.0
MAX_GROWTH = 0.03
MAX_FAILURES = 20  # enough to see what is wrong


@dataclass
class Tally:
    """The outcomes of all requests."""

    ended: Counter[str] = field(default_factory=Counter)  # by fate and finish reason
    failures: list[str] = field(default_factory=list)
    sessions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    retractions: int = 0

    def add(self, request: Request, heard: Heard) -> None:
        """Count an answer."""
        (end,) = heard.ends
        if heard.left:
            self.ended["leave: left"] += 1
            return
        if (
            heard.late
            or heard.status != 200
            or heard.error
            or end is None
            or (end, request.fate) == ("abort", "finish")
        ):
            self.failures.append(
                f"{request.fate} {request.rid}: {heard.status} {end}, late {heard.late}: {heard.error}"
            )
            return
        self.ended[f"{request.fate}: {end}"] += 1
        if "prompt_tokens" in heard.meta:  # missing if it was aborted in the queue
            self.prompt_tokens += heard.meta["prompt_tokens"]
            self.cached_tokens += heard.meta["cached_tokens"]
            self.tokens += heard.meta["completion_tokens"]
            self.retractions += heard.meta["num_retractions"]


class Client:
    """Sends the requests of one run."""

    def __init__(self, http: httpx.AsyncClient, seed: int):
        self.http = http
        self.random = random.Random(seed)
        self.tally = Tally()

    async def block(self, sessions: Iterator[list[TokenIds]], concurrency: int, until: float) -> None:
        """Run concurrent sessions until the time `until`. Turns that have begun are finished."""

        async def talk() -> None:
            while self.goes_on(until):
                self.tally.sessions += 1
                for prompt in next(sessions):
                    if self.goes_on(until):
                        request = self.request(prompt)
                        self.tally.add(request, await hear(self.http, request, REQUEST_S))

        await asyncio.gather(*(talk() for _ in range(concurrency)))

    def goes_on(self, until: float) -> bool:
        """Whether to send another request."""
        return time.monotonic() < until and len(self.tally.failures) < MAX_FAILURES

    def request(self, prompt: TokenIds) -> Request:
        """A random request for a prompt. Those that are cut short are streamed."""
        (fate,) = self.random.choices(list(FATES), list(FATES.values()))
        rid = f"{self.random.getrandbits(64):016x}"
        body = {"rid": rid, "input_ids": prompt, "sampling_params": self.sampling(), "stream": fate != "finish"}
        return Request("soak", GENERATE, body, fate=fate, cut_at=self.random.randint(0, 6))

    def sampling(self) -> dict[str, Any]:
        """Greedy or sampled, some with penalties; ends of every kind: end token, stop string, maximum length."""
        params: dict[str, Any] = {"max_new_tokens": self.random.randint(1, MAX_TOKENS)}
        params["temperature"] = self.random.choice((0, 0, 0.8))
        if self.random.random() < 0.2:
            params["stop"] = ["."]
        if self.random.random() < 0.1:
            params["frequency_penalty"] = 0.2
        return params | {"ignore_eos": self.random.random() < 0.3}


def growth(sizes: list[float]) -> float:
    """Relative growth of memory since the middle of the run."""
    means = settled(sizes)
    return 0.0 if means is None else means[1] / means[0] - 1  # None: too short; other checks tell why


def plan(concurrency: int, window: int = WINDOW) -> tuple[list[list[TokenIds]], int]:
    """Sessions whose prompts fit, and a pool of a quarter of what concurrent sessions need."""
    sessions = heldout_histories(SESSIONS)
    working_set = concurrency * statistics.mean(len(histories[-1]) for histories in sessions)
    pool = int(working_set) // 4
    longest = longest_in(pool, window) - MAX_TOKENS
    fitting = [[prompt for prompt in histories if len(prompt) <= longest] for histories in sessions]
    return [histories for histories in fitting if len(histories) > 1], pool


async def soak(running: server.Server, sessions: list[list[TokenIds]], args: argparse.Namespace) -> dict[str, Any]:
    """Run all blocks. Returns tally, memory and free slots."""
    block_s = max(MIN_BLOCK_S, 60 * args.minutes / BLOCKS)
    end = time.monotonic() + 60 * args.minutes
    memory: list[dict[str, float]] = []
    free: list[int] = []
    endless = cycle(sessions)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.base_url, timeout=REQUEST_S, limits=limits) as http:
        client = Client(http, args.seed)
        while (now := time.monotonic()) < end - MIN_BLOCK_S / 2 and len(client.tally.failures) < MAX_FAILURES:
            await client.block(endless, args.concurrency, min(end, now + block_s))
            free.append(wait_until_free(running.base_url))
            memory.append(resident(running.process.pid))
            flush(running.base_url)
            print(f"block {len(free)}: {client.tally.sessions} sessions, {free[-1]} slots free", file=sys.stderr)
    return {"tally": client.tally, "memory": memory, "free": free}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=8, help="sessions at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the router and of what is aborted")
    parser.add_argument("--router", help="default: random:SEED")
    parser.add_argument("--window", type=int, default=WINDOW, help="verify width of the models (default: %(default)s)")
    parser.add_argument("--start-seconds", type=float, default=server.START_SECONDS, help="of the server, at most")
    parser.add_argument("--results", type=Path, help="write the JSON line to this file too")
    own, models = server.split_flags(argv)
    args = parser.parse_args(own)
    args.models = models or ["--demo"]
    args.router = args.router or f"random:{args.seed}"
    if args.minutes * 60 < 3 * MIN_BLOCK_S:
        parser.error(f"argument --minutes: give {3 * MIN_BLOCK_S / 60} or more")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    server.stop_on_signals()
    log = Path(tempfile.mkdtemp(prefix="whiflash-soak-")) / "server.log"
    sessions, pool = plan(args.concurrency, args.window)
    os.environ.update(RETRACT)
    running = server.start(LAUNCHER, *pressed(args.router, pool, args.models), "--enable-metrics", log=log)
    try:
        running.wait_until_ready(args.start_seconds)
        line = judge(running, sessions, pool, args)
    except (server.ServerError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error!r}; see {log}") from error
    finally:
        running.stop()
    finish(line, args.results, None if all(line["checks"].values()) else f"a check is false; see {log}")


def judge(
    running: server.Server, sessions: list[list[TokenIds]], pool: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Probe, soak, probe again. Returns the JSON line."""
    url = running.base_url
    probes = list(chain(*sessions))[:PROBES]
    before = ask(url, probes, MAX_TOKENS)
    flush(url)
    free_at_start = wait_until_free(url)
    found = asyncio.run(soak(running, sessions, args))
    tally: Tally = found["tally"]
    free_at_end = wait_until_free(url)
    healthy = httpx.get(f"{url}/health_generate", timeout=60).status_code == 200
    after = ask(url, probes, MAX_TOKENS)
    counted = totals(url)
    assert counted is not None
    sizes = [sum(processes.values()) for processes in found["memory"]]
    ingested = after.totals["ingested_by_drafter"] if after.totals else {}
    checks = {
        "every_slot_free_after_each_block": set(found["free"]) == {free_at_start},
        "free_slots_as_at_start": free_at_end == free_at_start == pool,
        # Both drafters have ingested the last committed tokens.
        "no_backlog_left": ingested["df"] == ingested["e3"] and counted["backlog_max"] <= MAX_BACKLOG,
        "no_request_failed": not tally.failures,
        "healthy": healthy,
        "same_texts_as_before": after.texts == before.texts,
        "requests_were_retracted": tally.retractions > 0,
        "memory_flat": growth(sizes) < MAX_GROWTH,
    }
    return {
        "benchmark": "soak",
        "arguments": {name: value for name, value in vars(args).items() if name != "results"},
        "checks": checks,
        "sessions": tally.sessions,
        "requests": sum(tally.ended.values()),
        "ended": dict(sorted(tally.ended.items())),
        "failures": tally.failures[:10],
        "tokens": tally.tokens,
        "cached_share_of_prompts": round(tally.cached_tokens / tally.prompt_tokens, 4),
        "retractions": tally.retractions,
        "kv_slots": {"pool": pool, "free_at_start": free_at_start, "free_at_end": free_at_end},
        "rss_mib": {
            "blocks": len(sizes),
            "growth": round(growth(sizes), 4),
            "at_first": shown(found["memory"][0]),
            "at_last": shown(found["memory"][-1]),
        },
        "acceptance_length": {"before": al(before), "after": al(after)},
        "whiflash": {name: counted[name] for name in ("rounds_by_drafter", "switches", "catch_up", "backlog_max")},
        **provenance(),
    }


def shown(sizes: dict[str, float]) -> dict[str, float]:
    """Sizes in MiB, rounded."""
    return {name: round(size, 1) for name, size in sizes.items()}


def al(answers: Answers) -> float:
    """Acceptance length, rounded."""
    return round(answers.acceptance_length, 3)


if __name__ == "__main__":
    main()
