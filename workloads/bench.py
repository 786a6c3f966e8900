"""Shared by the benchmarks: servers running side by side, interleaved blocks, one JSON line at the end.

Ratios are measured within one run. Each block of work goes to every server, in rotated order, so a temporary slowdown
of the machine affects all servers alike.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from whiflash_workloads import server
from whiflash_workloads.printing import to_readers
from whiflash_workloads.replay import Report, replay
from whiflash_workloads.report import Totals
from whiflash_workloads.schema import Session

LAUNCHER = "whiflash_sglang.launch_server"


def note(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


class Command(NamedTuple):
    """A server to start: `python -m module arguments...`, with additional environment variables."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    start_seconds: float = server.START_SECONDS


@contextlib.contextmanager
def demo_servers(flags: Mapping[str, Sequence[str]], logs: Path, at_once: bool = False) -> Iterator[dict[str, str]]:
    """Like `servers`, with the bundled models and `flags` by name."""
    with servers({name: Command(LAUNCHER, ("--demo", *own)) for name, own in flags.items()}, logs, at_once) as urls:
        yield urls


@contextlib.contextmanager
def servers(commands: Mapping[str, Command], logs: Path, at_once: bool = False) -> Iterator[dict[str, str]]:
    """Start servers and yield their base URLs by name; stop them at the end.

    By default they start one after the other, because cost measurements at startup need an idle machine. `at_once`
    starts them in parallel.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, server.Server] = {}
        for name, (module, arguments, environment, seconds) in commands.items():
            log = logs / f"{name.replace(':', '-').replace('/', '-')}.log"
            running[name] = server.start(module, *arguments, log=log, environment=environment)
            stack.callback(running[name].stop)
            if not at_once:
                running[name].wait_until_ready(seconds)
        for name, one in running.items():
            one.wait_until_ready(commands[name].start_seconds)
        yield {name: one.base_url for name, one in running.items()}


def in_turns(names: Sequence[str], num_blocks: int) -> Iterator[tuple[int, str]]:
    """(block, name) for every block and name; each block starts with the next name."""
    for block in range(num_blocks):
        turn = block % len(names)
        for name in (*names[turn:], *names[:turn]):
            yield block, name


def warm_up(urls: Mapping[str, str], session: Session) -> None:
    """Replay one uncounted session on every server, then flush its cache."""
    for url in urls.values():
        replay([session], url)
        httpx.post(f"{url}/flush_cache", params={"timeout": 20}, timeout=30).raise_for_status()


def replay_in_turns(
    urls: Mapping[str, str], sessions: Sequence[Session], num_blocks: int, **options: Any
) -> dict[str, list[Report]]:
    """Replay the sessions on every server, in interleaved blocks. Returns the reports by server. `options`: see
    `replay`."""
    parts: dict[str, list[Report]] = {name: [] for name in urls}
    for block, name in in_turns(list(urls), num_blocks):
        parts[name].append(replay(sessions[block::num_blocks], urls[name], label=name, **options))
        if all(len(found) > block for found in parts.values()):
            note(f"block {block + 1} of {num_blocks} replayed")
    return parts


def switching_share(counted: Sequence[Totals]) -> float:
    """Cost of switching drafters, as a share of the rounds' time: routing, and catch-up of missed tokens (a pass's time
    is divided by tokens)."""
    overhead = sum(c["seconds"]["route"] + c["catch_up"]["ms"] / 1000 for c in counted)
    return round(overhead / sum(c["seconds"]["round"] for c in counted), 4)


def route_share(counted: Sequence[Totals]) -> float:
    """Routing's share of the rounds' time."""
    return round(sum(c["seconds"]["route"] for c in counted) / sum(c["seconds"]["round"] for c in counted), 5)


def finish(line: Mapping[str, Any], results: Path | None, failure: str | None) -> None:
    """Print the JSON line and write it to `results`, if given. Raises SystemExit if there is a `failure`."""
    text = json.dumps(line)
    if results:
        results.write_text(text + "\n")
    with to_readers():
        print(text)
    if failure is not None:
        raise SystemExit(failure)
