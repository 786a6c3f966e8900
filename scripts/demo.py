"""`make demo`: serve the bundled models, replay the bundled traces under every policy, print the comparison.

    python scripts/demo.py [--sessions N] [--concurrency N] [--results FILE]

Four servers of the same model stand side by side, one for each policy. The sessions are replayed in blocks, and each
block is sent to the servers in turn, beginning with another one each time: a machine that is slow for a while is slow
for all. The recorded history is forced, so that every policy gets the same prompts; the texts are compared with those
of `off`, SGLang without speculation. The last line is JSON; exit status 1 if a text differs or a request fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from workloads import server
from workloads.loaders import load_traces
from workloads.provenance import provenance
from workloads.replay import TABLE_WIDTH, Report, merge, replay, table
from workloads.schema import Session

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT / "workloads" / "demo" / "traces" / "heldout.jsonl"
POLICIES = ("off", "fixed:e3", "fixed:df", "entropy")
WEIGH_COSTS = ("entropy",)
# What the JSON line shows of a policy; the replay knows more.
SHOWN = (
    "tokens_per_s",
    "acceptance_length",
    "rounds",
    "rounds_by_drafter",
    "switches",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "cached_prompt_tokens",
    "host_share",
    "failed",
)


def start_servers(logs: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """Base URL by policy. They are started at once, as most of a start is waiting for imports; but one that measures
    what rounds cost when it starts comes last, when the others have become quiet."""
    servers: dict[str, server.Server] = {}
    for group in (tuple(policy for policy in POLICIES if policy not in WEIGH_COSTS), WEIGH_COSTS):
        for policy in group:
            log = logs / f"{policy.replace(':', '-')}.log"
            flags = ("--demo", "--whiflash-router", policy)
            servers[policy] = server.start("whiflash_sglang.launch_server", *flags, log=log)
            stack.callback(servers[policy].stop)
        for policy in group:
            servers[policy].wait_until_ready()
    return {policy: servers[policy].base_url for policy in POLICIES}


def measure(urls: dict[str, str], sessions: Sequence[Session], blocks: int, concurrency: int) -> dict[str, Report]:
    """One report a policy, measured block by block in rotated order."""
    parts: dict[str, list[Report]] = {policy: [] for policy in urls}
    for number in range(blocks):
        block = sessions[number::blocks]
        turn = number % len(urls)
        for policy in (*list(urls)[turn:], *list(urls)[:turn]):
            parts[policy].append(replay(block, urls[policy], concurrency=concurrency, label=policy))
        print(f"block {number + 1} of {blocks} replayed", file=sys.stderr, flush=True)
    return {policy: merge(reports) for policy, reports in parts.items()}


def warm_up(urls: dict[str, str], session: Session) -> None:
    """One session that is not counted, to every server; its cached prefixes are dropped again."""
    for url in urls.values():
        replay([session], url)
        httpx.post(f"{url}/flush_cache", params={"timeout": 20}, timeout=30).raise_for_status()


def summary(reports: dict[str, Report]) -> dict[str, dict[str, Any]]:
    """The figures of each policy, and whether its texts are those of `off`."""
    reference = reports["off"].texts()
    result = {}
    for policy, report in reports.items():
        figures = report.figures()
        shown = {name: figures[name] for name in SHOWN}
        result[policy] = shown | {"identical_to_off": report.texts() == reference}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=40, help="sessions to replay (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks they are replayed in (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="sessions at a time (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="write the JSON line to this file too")
    args = parser.parse_args()
    server.stop_on_signals()
    sessions = load_traces([TRACES]).sessions
    logs = Path(tempfile.mkdtemp(prefix="whiflash-demo-"))
    print(f"starting {len(POLICIES)} servers (logs in {logs})", file=sys.stderr, flush=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        urls = start_servers(logs, stack)
        print(f"ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        warm_up(urls, sessions[-1])
        reports = measure(urls, sessions[: args.sessions], args.blocks, args.concurrency)
    policies = summary(reports)
    Console(width=TABLE_WIDTH).print(table({policy: report.figures() for policy, report in reports.items()}))
    arguments = {name: value for name, value in vars(args).items() if name != "results"}
    line = json.dumps({"benchmark": "demo_replay", "arguments": arguments, "policies": policies, **provenance()})
    if args.results:
        args.results.write_text(line + "\n")
    print(line)
    if not all(figures["identical_to_off"] and not figures["failed"] for figures in policies.values()):
        raise SystemExit("a text differs from that of `off`, or a request failed; see the logs in " + str(logs))


if __name__ == "__main__":
    main()
