"""Calibrate the routers for given models on this machine.

    python -m whiflash_sglang.calibrate --demo --data DIR --out FILE [--neural-router PATH] [-- SERVER FLAGS]
    python -m whiflash_sglang.calibrate --demo --traces TRACE... --out FILE

Needs 32 to 64 sessions (`--traces`, or `--data` from `training.collect_router_data`). Measures how many more tokens
EAGLE-3 accepts than DFlash, by entropy. Starts a server with the given models and the flags after `--`, reads the round
costs that it measures at startup, and stops it. Then picks the thresholds of the entropy and neural routers with the
most tokens per millisecond. The output file is for `--whiflash-calibration`. `--priors FILE` also learns corrections to
both routers' scores by context kind, span and tool, for `--whiflash-priors`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from whiflash_sglang.core.errors import ConfigError, WhiFlashError
from whiflash_sglang.routing.artefact import load_router
from whiflash_sglang.routing.calibration import Calibration, save_calibration
from whiflash_sglang.routing.priors import save_priors
from whiflash_sglang.startup.config import FLAG_CALIBRATION, FLAG_OBJECTIVE, FLAG_ROUTER
from whiflash_sglang.training import collect_router_data
from whiflash_sglang.training.fit_priors import fit_priors
from whiflash_sglang.training.models import ModelPaths, add_arguments, paths_of
from whiflash_sglang.training.router_data import Record, RouterData, load_router_data
from whiflash_sglang.training.walk import best_threshold, by_worth, gather, lengths_of, oracle, round_starts, walk
from whiflash_workloads import server
from whiflash_workloads.printing import to_readers
from whiflash_workloads.provenance import provenance
from whiflash_workloads.schema import TraceError
from whiflash_workloads.tokens import totals

MIN_SESSIONS = 32
EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)  # nats
MIN_POSITIONS = 50  # per bin, for a reliable mean
ENTROPIES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
GAINS = tuple(round(0.25 * step - 2, 2) for step in range(21))  # tokens
LAUNCHER = "whiflash_sglang.launch_server"


def gains_by_entropy(records: Sequence[Record]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bin edges in nats, and the mean gain of e3 over df in tokens per bin (one more than edges).

    Uses only positions where rounds of either drafter begin.
    """
    starts = round_starts(records)
    entropy = gather(records, "entropy")[starts]
    difference = (gather(records, "e3").astype(np.float64) - gather(records, "df"))[starts]
    edges: list[float] = []
    for edge in EDGES:
        below = (entropy < edge) & (entropy >= (edges[-1] if edges else -1.0))
        if below.sum() >= MIN_POSITIONS and (entropy >= edge).sum() >= MIN_POSITIONS:
            edges.append(edge)
    between = np.digitize(entropy, edges)
    return tuple(edges), tuple(round(float(difference[between == i].mean()), 4) for i in range(len(edges) + 1))


def round_costs(records: Sequence[Record], table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """`costs_at` for the mean context of `records`."""
    return costs_at(table, float(np.mean([record.start + len(record.positions.entropy) / 2 for record in records])))


def costs_at(table: Mapping[str, Mapping[str, Mapping[str, float]]], context: float) -> dict[str, float]:
    """Milliseconds per one-row round by drafter, interpolated at `context` tokens. `table`: a server's `round_ms`."""
    result = {}
    for name, by_rows in table.items():
        by_context = {int(place): ms for place, ms in by_rows["1"].items()}
        result[name] = round(float(np.interp(context, list(by_context), list(by_context.values()))), 4)
    return result


def measured_costs(
    paths: ModelPaths, calibration: Calibration, demo: bool, flags: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Start a server with these models and return its measured `round_ms`. Raises ServerError."""
    folder = Path(tempfile.mkdtemp(prefix="whiflash-calibrate-"))
    provisional = folder / "calibration.json"
    save_calibration(provisional, calibration, paths.identity())
    arguments = (
        *(("--demo",) if demo else ()),
        *paths.server_flags(),
        *(f"{FLAG_ROUTER}=entropy", f"{FLAG_OBJECTIVE}=tokens_per_ms", f"{FLAG_CALIBRATION}={provisional}"),
        *flags,
    )
    with server.running_server(LAUNCHER, *arguments, log=folder / "server.log") as base_url:
        found = totals(base_url)
    assert found is not None
    table: dict[str, dict[str, dict[str, float]]] = found["round_ms"]
    return table


def load_data(args: argparse.Namespace, paths: ModelPaths) -> RouterData:
    """Load the given data, or collect it from the given traces. Raises WhiFlashError."""
    if args.sessions < MIN_SESSIONS:
        problem = f"calibration needs at least {MIN_SESSIONS}"
        raise ConfigError("--sessions", args.sessions, problem, "give e.g. 64")
    if (args.data is None) == (args.traces is None):
        raise ConfigError("--data", args.data, "give either --data or --traces", "drop or add one of them")
    folder = args.data
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="whiflash-calibrate-"))
        models = (*(("--demo",) if args.demo else ()), *paths.server_flags())
        traces = ("--traces", *map(str, args.traces), "--limit", str(args.sessions))
        collect_router_data.main([*models, *traces, "--out", str(folder), "--device", str(args.device)])
    data = load_router_data(folder)
    paths.identity().check("--data", folder, data.manifest["models"])
    kept = set(
        data.sessions[-args.sessions :]
    )  # the last sessions, as a router may have been trained on the first ones
    if len(kept) < MIN_SESSIONS:
        problem = f"{len(kept)} sessions, but calibration needs at least {MIN_SESSIONS}"
        raise ConfigError("--traces" if args.data is None else "--data", None, problem, "give more sessions")
    return RouterData(data.manifest, [record for record in data.records if record.session in kept])


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and write the files; returns the figures. Raises WhiFlashError, TraceError or ServerError."""
    paths = paths_of(args)
    router = None
    if args.neural_router is not None:
        router = load_router(args.neural_router, paths.identity(), args.positive_drafter, 0.0)
    data = load_data(args, paths)
    records = data.records
    edges, gains = gains_by_entropy(records)
    lengths = lengths_of(records)
    table = measured_costs(paths, Calibration(lengths, 0.0, edges, gains, None), args.demo, args.server_flags)
    ms = round_costs(records, table)
    entropy = gather(records, "entropy")
    entropy_threshold, by_entropy = best_threshold(records, entropy, ENTROPIES, ms)
    gain_of = {"entropy": np.array(gains)[np.digitize(entropy, edges)]}
    neural_threshold, by_gain = None, None
    if router is not None:
        gain_of["neural"] = router.e3_network(torch.from_numpy(gather(records, "hidden")).float()).numpy()
        neural_threshold, by_gain = best_threshold(records, gain_of["neural"], GAINS, ms)
    calibration = Calibration(lengths, entropy_threshold, edges, gains, neural_threshold)
    never, always = np.zeros(len(entropy), dtype=bool), np.ones(len(entropy), dtype=bool)
    choices = {"fixed:df": never, "fixed:e3": always}
    choices |= {f"{name}, tokens_per_ms": by_worth(records, gain, ms) for name, gain in gain_of.items()}
    choices["oracle"] = oracle(records, ms)
    found = {name: round(walk(records, choice, ms).tokens_per_ms, 4) for name, choice in choices.items()}
    found["entropy, threshold"] = by_entropy[entropy_threshold]
    if by_gain is not None and neural_threshold is not None:
        found["neural, threshold"] = by_gain[neural_threshold]
    about = {
        "sessions": len(data.sessions),
        "positions": len(entropy),
        "round_ms": ms,
        "costs_ms": table,
        "tokens_per_ms": found,
        "tokens_per_ms_by_entropy_threshold": by_entropy,
        "tokens_per_ms_by_neural_threshold": by_gain,
        **provenance(),
    }
    save_calibration(args.out, calibration, paths.identity(), **about)
    if args.priors is not None:
        priors = {name: fit_priors(records, gain, ms) for name, gain in gain_of.items()}
        about_priors = {"sessions": len(data.sessions), "round_ms": ms, **provenance()}
        save_priors(args.priors, priors, paths.identity(), **about_priors)
    return {"out": str(args.out), "entropy_threshold": entropy_threshold, "neural_threshold": neural_threshold, **about}


def show(result: Mapping[str, Any]) -> None:
    """Print the simulated tokens per millisecond of all policies to stderr."""
    view = Table(title=f"Simulated, {result['sessions']} sessions")
    view.add_column("policy")
    view.add_column("tokens/ms", justify="right")
    for name, value in sorted(result["tokens_per_ms"].items(), key=lambda item: item[1]):
        view.add_row(name, f"{value:.4f}")
    Console(stderr=True).print(view)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_sglang.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="output of collect_router_data")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--priors", type=Path, metavar="FILE", help="also learn priors and write them to this file")
    parser.add_argument("--neural-router", metavar="PATH", help="also calibrate this neural router")
    parser.add_argument("--positive-drafter", choices=("e3", "df"), help="for a bare router file")
    parser.add_argument("--sessions", type=int, default=64, help="use at most this many (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    own, server_flags = server.split_flags(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    args.server_flags = server_flags
    server.stop_on_signals()
    try:
        result = calibrate(args)
    except (WhiFlashError, TraceError, server.ServerError) as error:
        raise SystemExit(f"error: {error}") from error
    show(result)
    with to_readers():
        print(json.dumps(result))


if __name__ == "__main__":
    main()
