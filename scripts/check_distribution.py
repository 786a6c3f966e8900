"""Verify that speculation does not change the output distribution, by sampling continuations on every route.

    python scripts/check_distribution.py                        # the bundled models, 5,000 continuations per route
    python scripts/check_distribution.py --count 1000           # fewer
    python scripts/check_distribution.py -- --demo --dtype=bfloat16     # other flags of the launcher

Uses one server with random routing. Requests select their route (e3, df, off, or auto for the router) and sample with
several temperatures, top-p, top-k and min-p, in mixed batches. A chi-square test compares each route's counts with the
exact probabilities of all continuations, computed in plain PyTorch. The last line is JSON; exit status 1 if a route's
p-value is at most 0.01, which happens by chance in 4 of 100 runs with four routes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.continuations import Sampling, continuations, joint_p_value, open_place
from whiflash_sglang.training.models import ModelPaths, load_models
from whiflash_workloads import sampled, server
from whiflash_workloads.printing import Console, to_readers
from whiflash_workloads.provenance import provenance
from whiflash_workloads.tokens import heldout_histories

LAUNCHER = "whiflash_sglang.launch_server"
LENGTH = 4  # the first token is from the prefill, the others from rounds
ROUTES = ("e3", "df", "off", "auto")
SAMPLINGS = (Sampling(0.7, 8, 0.95), Sampling(1.0, 4, 0.98), Sampling(1.3, 8, 0.9, 0.02))
LEAST = 0.01


def check(base_url: str, count: int) -> dict[str, dict[str, Any]]:
    """Route -> p-value and number of continuations."""
    paths = ModelPaths(*(DEMO_MODELS / name for name in ("target", "dflash", "eagle3")), WhiFlashConfig.eagle_steps)
    target = load_models(paths, torch.device("cpu")).target
    prompt = open_place(target, heldout_histories(1)[0][0], max_new_tokens=40, ahead=2)
    exact = {sampling: continuations(target, prompt, LENGTH, sampling) for sampling in SAMPLINGS}
    kinds = {
        (route, sampling): {**sampling.params(), "custom_params": {"whiflash": {"route": route}}}
        for route in ROUTES
        for sampling in SAMPLINGS
    }
    counts = sampled.count(base_url, prompt, LENGTH, kinds, -(-count // len(SAMPLINGS)))
    return {
        route: {
            "p": joint_p_value((counts[route, sampling], exact[sampling]) for sampling in SAMPLINGS),
            "continuations": sum(counts[route, sampling].total() for sampling in SAMPLINGS),
        }
        for route in ROUTES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="continuations per route (default: %(default)s)")
    parser.add_argument("launcher_flags", nargs="*", help="flags of the launcher, after `--` (default: --demo)")
    args = parser.parse_args()
    server.stop_on_signals()
    log = Path(tempfile.mkdtemp(prefix="whiflash-distribution-")) / "server.log"
    flags = [*(args.launcher_flags or ["--demo"]), "--whiflash-router", "random:1"]
    began = time.perf_counter()
    with server.running_server(LAUNCHER, *flags, log=log) as base_url:
        routes = check(base_url, args.count)
    seconds = round(time.perf_counter() - began, 1)
    view = Table("route", "continuations", "p", title="Continuations vs. the target's exact distribution")
    for route, found in routes.items():
        view.add_row(route, str(found["continuations"]), f"{found['p']:.3f}")
    about = {"benchmark": "check_distribution", "arguments": vars(args), "routes": routes, "seconds": seconds}
    with to_readers():
        Console().print(view)
        print(json.dumps(about | provenance()))
    if any(found["p"] <= LEAST for found in routes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
