"""`make demo`: serve the bundled models, replay the bundled traces under every policy, and compare them.

    python scripts/demo.py [--sessions N] [--concurrency N] [--results FILE]

Runs four servers of the same model side by side, one per policy. Sessions are replayed in blocks that go to every
server in rotated order, so a temporary slowdown of the machine affects all alike. The recorded history is forced, so
every policy gets the same prompts. Texts are compared with `off`, SGLang without speculation. The last line is JSON;
exit status 1 if a text differs or a request fails.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from whiflash_workloads import server
from whiflash_workloads.bench import finish, note, replay_in_turns, warm_up
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.printing import Console, to_readers
from whiflash_workloads.provenance import provenance
from whiflash_workloads.replay import TABLE_WIDTH, Report, merge, table

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT / "workloads" / "demo" / "traces" / "heldout.jsonl"
POLICIES = ("off", "fixed:e3", "fixed:df", "entropy")
WEIGH_COSTS = ("entropy",)
# Figures per policy in the JSON line; a subset of the replay's.
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
    """Start all servers; returns base URLs by policy. Servers that measure round costs at startup start last, when the
    others are idle."""
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


def summary(reports: dict[str, Report]) -> dict[str, dict[str, Any]]:
    """Figures by policy, and whether its texts equal `off`."""
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
    parser.add_argument("--blocks", type=int, default=8, help="number of interleaved blocks (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="concurrent sessions (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    server.stop_on_signals()
    sessions = load_traces([TRACES]).sessions
    logs = Path(tempfile.mkdtemp(prefix="whiflash-demo-"))
    note(f"starting {len(POLICIES)} servers (logs in {logs})")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        urls = start_servers(logs, stack)
        note(f"ready after {time.monotonic() - began:.0f} s")
        warm_up(urls, sessions[-1])
        parts = replay_in_turns(urls, sessions[: args.sessions], args.blocks, concurrency=args.concurrency)
    reports = {policy: merge(found) for policy, found in parts.items()}
    policies = summary(reports)
    with to_readers():
        Console(width=TABLE_WIDTH).print(table({policy: report.figures() for policy, report in reports.items()}))
    arguments = {name: value for name, value in vars(args).items() if name != "results"}
    line = {"benchmark": "demo_replay", "arguments": arguments, "policies": policies, **provenance()}
    good = all(figures["identical_to_off"] and not figures["failed"] for figures in policies.values())
    failure = f"a text differs from `off`, or a request failed; see the logs in {logs}"
    finish(line, args.results, None if good else failure)


if __name__ == "__main__":
    main()
