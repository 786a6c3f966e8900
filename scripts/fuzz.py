"""Send malformed requests, and check that the server answers each, survives, and its output stays right.

    python scripts/fuzz.py [--cases N] [--seed N] [--router ROUTER] [--minutes N] [--results FILE]

One demo server with a random router, and the reference: the same with `--whiflash-router off`. Requests for
`/generate`, `/v1/completions`, `/v1/chat/completions` and `/whiflash/...` are drawn by hypothesis
(`workloads/stress/malformed.py`), several in flight. A request that is answered with 5xx, or not completely, is sent to
the reference: if that fails too, the fault is SGLang's own (`sglang_own`), else ours. A few greedy prompts are sent
before, after, and to the reference. The last line is JSON; exit status 1 if one of its `checks` is false.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import httpx

from whiflash_workloads import server
from whiflash_workloads.bench import finish
from whiflash_workloads.provenance import provenance
from whiflash_workloads.stress.blame import Reference, fuzz
from whiflash_workloads.stress.malformed import cases
from whiflash_workloads.stress.servers import LAUNCHER
from whiflash_workloads.tokens import heldout_histories

FLAGS = ("--demo", "--context-length", "1024", "--max-total-tokens", "16384")  # an endless text ends soon
PROMPTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--in-flight", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of requests and router (default: %(default)s)")
    parser.add_argument("--router", help="default: random:SEED")
    parser.add_argument("--minutes", type=float, default=20.0, help="for sending them, at most (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="write the JSON line to this file too")
    args = parser.parse_args()
    server.stop_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="whiflash-fuzz-"))
    drawn = cases(args.cases, args.seed)
    prompts = [histories[0] for histories in heldout_histories(PROMPTS)]
    # The reference schedules as WHIFLASH does, without overlap.
    off = ("--whiflash-router", "off", "--disable-overlap-schedule")
    reference = Reference(LAUNCHER, *FLAGS, *off, log=folder / "off.log")
    log = folder / "server.log"
    running = server.start(LAUNCHER, *FLAGS, "--whiflash-router", args.router or f"random:{args.seed}", log=log)
    try:
        running.wait_until_ready()
        until = time.monotonic() + 60 * args.minutes
        figures = fuzz(running.base_url, reference, drawn, prompts, args.in_flight, until)
    except (server.ServerError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error!r}; see {folder}") from error
    finally:
        running.stop()
        reference.stop()
    arguments = {name: value for name, value in vars(args).items() if name != "results"}
    line = {"benchmark": "fuzz", "arguments": arguments, **figures, **provenance()}
    finish(line, args.results, None if all(figures["checks"].values()) else f"a check is false; see {folder}")


if __name__ == "__main__":
    main()
