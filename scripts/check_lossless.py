"""Verify that speculation does not change greedy text: compare every policy's token ids with `off`.

    python scripts/check_lossless.py                                   # the bundled models, all policies
    python scripts/check_lossless.py --prompts 8 --policy entropy      # fewer
    python scripts/check_lossless.py -- --model-path T ...             # other models: the launcher's flags

Prompts are held-out histories of the demo workload, sent one at a time and then `--in-flight` at a time. Both are
compared with the reference server (router off) one at a time; so is the reference server's own batched text. Ties of
the two best logits are reported separately. The last line is JSON; exit status 1 if texts differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path

from rich.table import Table

from whiflash_workloads import server
from whiflash_workloads.lossless import Comparison, compare, generate
from whiflash_workloads.printing import Console, to_readers
from whiflash_workloads.provenance import provenance
from whiflash_workloads.tokens import TOKENIZER, heldout_histories

LAUNCHER = "whiflash_sglang.launch_server"
POLICIES = ("fixed:e3", "fixed:df", "alternate", "random:1", "entropy", "neural")


def check(args: argparse.Namespace, launcher_flags: list[str], log: Path) -> dict[str, dict[str, Comparison]]:
    """Policy -> mode (alone, together) -> comparison with the reference."""
    prompts = list(islice(chain(*heldout_histories(args.prompts, args.tokenizer)), args.prompts))
    results: dict[str, dict[str, Comparison]] = {}

    def texts(base_url: str, in_flight: int) -> list[list[int]]:
        return asyncio.run(generate(base_url, prompts, args.tokens, in_flight))

    off = server.running_server(LAUNCHER, *launcher_flags, "--whiflash-router", "off", log=log / "off.log")
    with off as off_url:
        reference = texts(off_url, 1)
        together = texts(off_url, args.in_flight)
        results["off"] = {"together": compare(off_url, prompts, reference, together)}
        for policy in args.policy or POLICIES:
            flags = (*launcher_flags, "--whiflash-router", policy)
            with server.running_server(LAUNCHER, *flags, log=log / f"{policy.replace(':', '-')}.log") as base_url:
                results[policy] = {
                    mode: compare(off_url, prompts, reference, texts(base_url, in_flight))
                    for mode, in_flight in (("alone", 1), ("together", args.in_flight))
                }
            print(f"{policy}: done", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, dict[str, Comparison]]) -> Table:
    """One row per policy and mode."""
    view = Table(title="Token ids compared with the server without speculation")
    for column in ("policy", "requests", "prompts", "tokens", "different", "ties"):
        view.add_column(column, justify="left" if column in ("policy", "requests") else "right")
    for policy, modes in results.items():
        for mode, comparison in modes.items():
            ties = sum(difference.is_tie for difference in comparison.differences)
            different = len(comparison.differences) - ties
            view.add_row(policy, mode, *map(str, (comparison.prompts, comparison.tokens, different, ties)))
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens per prompt")
    parser.add_argument("--in-flight", type=int, default=8, help="concurrent requests in the second pass")
    parser.add_argument("--policy", action="append", help=f"default: {', '.join(POLICIES)}")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of the prompts' tokenizer")
    parser.add_argument("launcher_flags", nargs="*", help="flags of the launcher, after `--` (default: --demo)")
    args = parser.parse_args()
    server.stop_on_signals()
    log = Path(tempfile.mkdtemp(prefix="whiflash-lossless-"))
    results = check(args, args.launcher_flags or ["--demo"], log)
    figures = {policy: {mode: c.figures() for mode, c in modes.items()} for policy, modes in results.items()}
    arguments = vars(args) | {"tokenizer": None if args.tokenizer == TOKENIZER else str(args.tokenizer)}
    with to_readers():
        Console().print(table(results))
        print(json.dumps({"benchmark": "check_lossless", "arguments": arguments, "policies": figures, **provenance()}))
    if any(mode["different"] for modes in figures.values() for mode in modes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
