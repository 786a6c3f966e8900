"""All kinds of load and faults at once, on a server short of memory: no wrong text, and no request waits without end.

    python scripts/chaos.py [--minutes N] [--clients N] [--seed N] [--router ROUTER] [--poison {e3,df}] [--results FILE]
    python scripts/chaos.py --minutes 2 --clients 8 --questions 12      # short

Three demo servers, one after the other:

    reference   without speculation: the expected texts of greedy asks
    load        a KV pool of a quarter of what the clients need, and requests of all kinds: one in ten is bad, some are
                sampled, aborted or left; then SIGTERM while it streams to every client
    poisoned    the same with a drafter that produces NaN; then SIGTERM to all of its processes at once

Each request has a time limit. Each greedy text is compared with the reference's, or its prefix if it was cut short.
After SIGTERM, a server has ten seconds, and each stream must get an end or an error. The last line is JSON; exit status
1 if one of its `checks` is false.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import httpx

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads import server
from whiflash_workloads.bench import finish
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.provenance import provenance
from whiflash_workloads.report import difference
from whiflash_workloads.stress.client import Client, hear
from whiflash_workloads.stress.poison import FLAGS, with_nan
from whiflash_workloads.stress.reference import Reference, collect
from whiflash_workloads.stress.requests import Draw, Question, Request, as_stream, bad_requests, greedy_asks, pool_for
from whiflash_workloads.stress.servers import (
    LAUNCHER,
    MAX_BACKLOG,
    RETRACT,
    flush,
    longest_in,
    pressed,
    resident,
    settled,
    wait_until_free,
)
from whiflash_workloads.stress.verdicts import FAULTS, WITH_ERROR, Tally
from whiflash_workloads.tokens import TOKENIZER, totals

CONTEXT = 8192  # of the demo
MAX_MINUTES = 18.0
MIN_LOAD_S = 20.0
ENDING_S = 30.0  # kept for the end of a server
REFERENCE_AT_A_TIME = 8
REQUEST_S = 120.0  # no request of the mix takes longer; one that does is hung
STOP_S = 10.0
MAX_GROWTH = 0.03  # of the memory
MEMORY_EVERY_S = 1.0
PROBES = 8


@dataclass
class Phase:
    """The result of one server."""

    tally: Tally
    leaked: int | None = None  # KV slots; None if the server ended early
    alive: bool = False
    memory: list[float] = field(default_factory=list)  # MiB
    counted: dict[str, Any] = field(default_factory=dict)  # WHIFLASH's totals
    probes: Tally = field(default_factory=Tally)  # asks one at a time, afterwards
    probed: dict[str, Any] = field(default_factory=dict)  # the totals of these
    end: Ending | None = None


@dataclass
class Ending:
    """How a server ended after SIGTERM."""

    seconds: float
    processes_left: int
    streams: Tally
    late_refused: bool  # a request while it was ending


def questions(count: int) -> list[Question]:
    """Histories of held-out sessions up to an assistant's turn, each of another session."""
    from transformers import AutoTokenizer

    from whiflash_workloads.demo.prompts import parsed_arguments

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    found = []
    for number, session in enumerate(sessions("heldout", count)):
        turns = [i for i, message in enumerate(session["messages"]) if message["role"] == "assistant"]
        messages = session["messages"][: turns[number % len(turns)]]
        parsed = [parsed_arguments(message) for message in messages]
        text = tokenizer.apply_chat_template(parsed, tools=session["tools"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        found.append(Question(ids, text, messages, session["tools"]))
    return found


def connect(base_url: str) -> httpx.AsyncClient:
    """A client without a limit on connections."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=base_url, timeout=REQUEST_S, limits=limits)


async def reference(asks: Sequence[Request], log: Path) -> Reference:
    """The greedy texts of a server without speculation."""
    # SGLang's overlapped schedule counts a token for penalties one step late.
    flags = ("--demo", "--whiflash-router", "off", "--disable-overlap-schedule")
    with server.running_server(LAUNCHER, *flags, log=log) as base_url:
        async with connect(base_url) as http:
            return await collect(http, asks, REFERENCE_AT_A_TIME, REQUEST_S)


async def phase(running: server.Server, known: Reference, draw: Draw, clients: int, until: float, group: bool) -> Phase:
    """Load a server until the time `until`, check for leaks, and end it. `group`: SIGTERM to all of its processes."""
    url = running.base_url
    async with connect(url) as http:
        client = Client(http, known.expected, REQUEST_S)
        found = Phase(client.tally)
        try:
            free_at_start = await asyncio.to_thread(wait_until_free, url)
            watching = asyncio.create_task(watch_memory(running.process.pid, found.memory))
            await client.load(draw, clients, max(until, time.monotonic() + MIN_LOAD_S))
            watching.cancel()
            free = await asyncio.to_thread(wait_until_free, url)
            await asyncio.to_thread(flush, url)
            free_when_empty = await asyncio.to_thread(wait_until_free, url)
            found.leaked = free_at_start - min(free, free_when_empty)
            found.counted = await counters(url)
            probing = Client(http, known.expected, REQUEST_S, found.probes)
            alone = [ask for ask in known.asks if ask.replies == 1]  # the only request of its time is not retracted
            for ask in alone[:PROBES]:
                await probing.ask(as_stream(ask, False))
            await asyncio.to_thread(wait_until_free, url)
            found.probed = difference(await counters(url), found.counted)
            found.alive = (await http.get("/health_generate")).status_code == 200
            found.end = await end_while_streaming(http, running, known, clients, group)
        except httpx.HTTPError as error:
            note(f"the server ended before its phase did: {error!r}")
    return found


async def counters(base_url: str) -> dict[str, Any]:
    """The server's `whiflash` totals."""
    found = await asyncio.to_thread(totals, base_url)
    assert found is not None
    return dict(found)


async def watch_memory(process_id: int, sizes: list[float]) -> None:
    """Append the resident memory of all server processes in MiB to `sizes`, until cancelled."""
    while True:
        sizes.append(sum((await asyncio.to_thread(resident, process_id)).values()))
        await asyncio.sleep(MEMORY_EVERY_S)


async def end_while_streaming(
    http: httpx.AsyncClient, running: server.Server, known: Reference, clients: int, group: bool
) -> Ending:
    """SIGTERM while each client has a long stream open."""
    tally = Tally()
    long = [ask for ask in known.asks if ask.kind == "long"]
    streams = [replace(as_stream(ask), fate="ended") for ask in islice(cycle(long), clients)]
    open_ = [asyncio.create_task(hear(http, request, REQUEST_S)) for request in streams]
    await asyncio.sleep(2.0)  # the first ones are being written, others wait for room
    pid = running.process.pid
    began = time.monotonic()
    (os.killpg if group else os.kill)(pid, signal.SIGTERM)
    await asyncio.sleep(0.5)
    late = await hear(http, replace(streams[0], fate="finish"), REQUEST_S)
    while running.processes() and time.monotonic() - began < ENDING_S:
        running.process.poll()
        await asyncio.sleep(0.05)
    seconds = time.monotonic() - began
    for request, task in zip(streams, open_, strict=True):
        tally.add(request, await task, known.expected)
    return Ending(round(seconds, 2), len(running.processes()), tally, late.error is not None and not late.late)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def run(args: argparse.Namespace, logs: Path) -> tuple[dict[str, Phase], Reference, int]:
    """Run all phases. Returns them by name, the reference, and the number of KV slots."""
    end = time.monotonic() + 60 * args.minutes
    asked = questions(args.questions)
    bad = bad_requests(asked[0], CONTEXT)
    known = await reference(greedy_asks(asked), logs / "reference.log")
    pool = pool_for(known.asks, args.clients)
    fitting = [ask for ask in known.asks if ask.tokens <= longest_in(pool)]
    if not any(ask.kind == "long" for ask in fitting):
        raise ValueError("no long text is left to be ended with the server: give more --questions, or another --seed")
    known = known._replace(asks=fitting)
    note(f"reference: {len(known.asks)} asks, left out {known.left_out}; a pool of {pool} tokens")
    os.environ.update(RETRACT)
    poisoned = with_nan(args.poison, DEMO_MODELS, args.folder)
    servers = {"load": (), "poisoned": (FLAGS[args.poison], str(poisoned))}
    shares = {"load": 0.6, "poisoned": 1.0}  # of the time that is left when its turn comes
    found = {}
    for name, own in servers.items():
        flags = (
            *pressed(args.router or f"random:{args.seed}", pool),
            "--max-running-requests",
            str(args.clients),
            *own,
        )
        running = server.start(LAUNCHER, *flags, log=logs / f"{name}.log")
        try:
            await asyncio.to_thread(running.wait_until_ready)
            now = time.monotonic()
            until = now + shares[name] * (end - now) - ENDING_S
            draw = Draw(known.asks, bad, random.Random(args.seed))
            found[name] = await phase(running, known, draw, args.clients, until, group=name == "poisoned")
        finally:
            running.stop()
        note(f"{name}: {dict(found[name].tally.verdicts)}, {found[name].leaked} slots leaked, end {found[name].end}")
    return found, known, pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help=f"for all, at most {MAX_MINUTES:g} (%(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="at a time (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=48, help="greedy asks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the router and of what is asked")
    parser.add_argument("--router", help="default: random:SEED")
    parser.add_argument("--poison", choices=sorted(FLAGS), default="e3", help="the drafter that yields NaN")
    parser.add_argument("--folder", type=Path, default=Path(".runs/chaos"), help="for the poisoned drafter")
    parser.add_argument("--results", type=Path, help="write the JSON line to this file too")
    args = parser.parse_args()
    if not 0 < args.minutes <= MAX_MINUTES:
        parser.error(f"argument --minutes: {args.minutes:g}: give at most {MAX_MINUTES:g}")
    if args.clients < 4 or args.questions < 12:
        parser.error(
            "arguments --clients, --questions: give at least 4 clients, and 12 questions to ask each kind once"
        )
    server.stop_on_signals()
    began = time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-chaos-"))
    try:
        found, known, pool = asyncio.run(run(args, logs))
    except (server.ServerError, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"error: {error!r}; see {logs}") from error
    arguments = {name: getattr(args, name) for name in ("minutes", "clients", "questions", "seed", "router", "poison")}
    line = {"benchmark": "chaos", "arguments": arguments, **figures(found, args.poison), **about(known, pool)}
    line |= {"wall_s": round(time.monotonic() - began, 1), **provenance()}
    finish(line, args.results, None if all(line["checks"].values()) else f"a check is false; see {logs}")


def about(known: Reference, pool: int) -> dict[str, Any]:
    """What is asked, for the JSON line."""
    kinds = dict(Counter(ask.kind for ask in known.asks))
    need = round(statistics.mean(ask.tokens for ask in known.asks))
    return {"asks": {"kinds": kinds, "left_out": known.left_out, "mean_tokens": need}, "pool": pool}


def figures(found: dict[str, Phase], poisoned: str) -> dict[str, Any]:
    """The figures and checks of the run. Pure."""
    load, other = found["load"], found["poisoned"]
    ends = [one.end for one in found.values()]
    tallies = [tally for one in found.values() for tally in (one.tally, one.probes)]
    tallies += [end.streams for end in ends if end is not None]
    verdicts: Counter[str] = Counter()
    for tally in tallies:
        verdicts.update(tally.verdicts)
    means = settled(load.memory)
    lived = all(one.alive and one.end is not None for one in found.values())
    checks = {
        **{f"none_{verdict.replace(' ', '_')}": verdicts[verdict] == 0 for verdict in FAULTS},
        "servers_lived": lived,
        "no_slot_leaked": all(one.leaked == 0 for one in found.values()),
        # Both drafters have ingested the last committed tokens.
        "no_backlog_left": lived
        and load.probed["ingested_by_drafter"]["df"] == load.probed["ingested_by_drafter"]["e3"]
        and load.counted["backlog_max"] <= MAX_BACKLOG,
        "memory_flat": means is not None and means[1] < (1 + MAX_GROWTH) * means[0],
        "requests_were_retracted": load.tally.retractions > 0,
        "poisoned_drafter_switched_off": other.counted.get("switched_off") == {poisoned: 1},
        "stopped_in_time": all(end is not None and end.seconds <= STOP_S for end in ends),
        "no_process_left": all(end is not None and end.processes_left == 0 for end in ends),
        "late_requests_refused": all(end is not None and end.late_refused for end in ends),
        "load_was_mixed": all(load.tally.verdicts[kind] for kind in ("right", "sampled", "cut short", "refused")),
    }
    return {
        "checks": checks,
        "requests": verdicts.total(),
        "failed_with_error": sum(verdicts[verdict] for verdict in WITH_ERROR),
        "wrong_text": verdicts["wrong text"],
        "hung": verdicts["hung"],
        "leaked_slots": sum(one.leaked or 0 for one in found.values()) if lived else None,
        "rss_growth_mb": None if means is None else round(means[1] - means[0], 1),
        "rss_mb": None if means is None else round(means[1], 1),
        "verdicts": dict(sorted(verdicts.items())),
        "phases": {name: shown(one) for name, one in found.items()},
        "faults": list(chain(*(tally.faults for tally in tallies)))[:10],
    }


def shown(one: Phase) -> dict[str, Any]:
    """A phase, for the JSON line."""
    whiflash = {
        name: one.counted.get(name) for name in ("rounds_by_drafter", "switches", "backlog_max", "switched_off")
    }
    end = None if one.end is None else {"seconds": one.end.seconds, "streams": dict(one.end.streams.verdicts)}
    kinds = dict(sorted(one.tally.kinds.items()))
    return {"kinds": kinds, "retractions": one.tally.retractions, "end": end, "whiflash": whiflash}


if __name__ == "__main__":
    main()
