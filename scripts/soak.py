"""Serve multi-turn sessions from a KV pool a quarter of what they need, abort some, and see what is left behind.

    python scripts/soak.py [--minutes N] [--concurrency N] [--router ROUTER] [--results FILE] [-- flags of other models]

One demo server with a random router, or one of the models that are named behind `--`; a small backlog bound and chunked
prefill. Prompts are the recorded histories of held-out sessions. An eighth of the requests are aborted and as many left
by their client, at a random place; SGLang is told to retract one now and then, besides those that it has no room for.
The run is cut into blocks: at the end of each the server has to become idle with every KV slot free or evictable
(SGLang itself ends a server that has lost one), its memory is read, and its cache is flushed. A few prompts are asked
alone before and after it all. The last line is JSON; exit status 1 if one of its `checks` is false.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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
from whiflash_workloads.pressure import LAUNCHER, MAX_BACKLOG, RETRACT, WINDOW, longest_in, pressed
from whiflash_workloads.provenance import provenance
from whiflash_workloads.tokens import Answers, TokenIds, ask, heldout_histories, totals
from whiflash_workloads.vitals import flush, resident, settled, wait_until_free

SESSIONS = 300  # in a cycle; far more than the pool can hold
MAX_TOKENS = 200
PROBES = 12
BLOCKS, MIN_BLOCK_S = 30, 10.0
REQUEST_S = 120.0
MAX_GROWTH = 0.03
MAX_FAILURES = 20  # enough to see what is wrong
FATES = {"finish": 6, "abort": 1, "leave": 1}  # weights


@dataclass
class Tally:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)  # by fate, and by how SGLang says that they ended
    failures: list[str] = field(default_factory=list)
    sessions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    retractions: int = 0

    def add(self, fate: str, meta: dict[str, Any]) -> None:
        reason = meta["finish_reason"]
        self.ended[f"{fate}: {reason['type']}"] += 1
        if reason["type"] == "abort" and fate == "finish":
            self.failures.append(f"{meta['id']}: {reason}")
        if "prompt_tokens" in meta:  # not where it was aborted in the queue
            self.prompt_tokens += meta["prompt_tokens"]
            self.cached_tokens += meta["cached_tokens"]
            self.tokens += meta["completion_tokens"]
            self.retractions += meta["num_retractions"]


class Client:
    """Sends the requests of one run, each to its fate."""

    def __init__(self, http: httpx.AsyncClient, seed: int):
        self.http = http
        self.random = random.Random(seed)
        self.tally = Tally()

    async def block(self, sessions: Iterator[list[TokenIds]], concurrency: int, until: float) -> None:
        """Sessions side by side until the time has come; turns that have begun are ended."""

        async def talk() -> None:
            while self.goes_on(until):
                self.tally.sessions += 1
                for prompt in next(sessions):
                    if self.goes_on(until):
                        await self.turn(prompt)

        await asyncio.gather(*(talk() for _ in range(concurrency)))

    def goes_on(self, until: float) -> bool:
        """Whether to send another request."""
        return time.monotonic() < until and len(self.tally.failures) < MAX_FAILURES

    async def turn(self, prompt: TokenIds) -> None:
        """Send a request, and let it finish, abort it, or leave it."""
        (fate,) = self.random.choices(list(FATES), list(FATES.values()))
        rid = f"{self.random.getrandbits(64):x}"
        body = {"rid": rid, "input_ids": prompt, "sampling_params": self.sampling(), "stream": fate != "finish"}
        try:
            if fate == "finish":
                reply = await self.http.post("/generate", json=body)
                reply.raise_for_status()
                self.tally.add(fate, reply.json()["meta_info"])
            else:
                await self.cut_short(fate, body)
        except (httpx.HTTPError, KeyError, json.JSONDecodeError) as error:
            self.tally.failures.append(f"{fate} {rid}: {error!r}")

    def sampling(self) -> dict[str, Any]:
        """Greedy or sampled, some not drafted for (penalties), with ends of every kind: the model's own, a stop
        string, the last allowed token."""
        params: dict[str, Any] = {"max_new_tokens": self.random.randint(1, MAX_TOKENS)}
        params["temperature"] = self.random.choice((0, 0, 0.8))
        if self.random.random() < 0.2:
            params["stop"] = ["."]
        if self.random.random() < 0.1:
            params["frequency_penalty"] = 0.2
        return params | {"ignore_eos": self.random.random() < 0.3}

    async def cut_short(self, fate: str, body: dict[str, Any]) -> None:
        """Abort a stream, or close it, when a few of its pieces have come, or before the first."""
        cut_at = self.random.randint(0, 6)
        meta = None
        async with self.http.stream("POST", "/generate", json=body) as reply:
            reply.raise_for_status()
            if cut_at == 0 and await self.cut(fate, body["rid"]):
                return
            pieces = 0
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                meta = json.loads(line.removeprefix("data: "))["meta_info"]
                pieces += 1
                if pieces == cut_at and await self.cut(fate, body["rid"]):
                    return
        if meta is None:
            raise KeyError("the stream ended without a word")
        self.tally.add(fate, meta)

    async def cut(self, fate: str, rid: str) -> bool:
        """Whether the stream is to be closed; a request that was aborted is read to its end."""
        if fate == "abort":
            (await self.http.post("/abort_request", json={"rid": rid})).raise_for_status()
            return False
        self.tally.ended["leave: left"] += 1
        return True


def growth(sizes: list[float]) -> float:
    """Share by which the memory has grown since the middle of the run."""
    means = settled(sizes)
    return 0.0 if means is None else means[1] / means[0] - 1  # None: the run was given up; other checks say why


def plan(concurrency: int, window: int = WINDOW) -> tuple[list[list[TokenIds]], int]:
    """Sessions, and a pool a quarter of what those need that run side by side. No prompt is too long for it."""
    sessions = heldout_histories(SESSIONS)
    working_set = concurrency * statistics.mean(len(histories[-1]) for histories in sessions)
    pool = int(working_set) // 4
    longest = longest_in(pool, window) - MAX_TOKENS
    fitting = [[prompt for prompt in histories if len(prompt) <= longest] for histories in sessions]
    return [histories for histories in fitting if len(histories) > 1], pool


async def soak(running: server.Server, sessions: list[list[TokenIds]], args: argparse.Namespace) -> dict[str, Any]:
    """Block after block; the figures of the run."""
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
    """Probe, soak, probe again; the JSON line."""
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
        # What was committed last has reached the drafter that drafted it and the other one alike.
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
