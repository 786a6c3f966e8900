"""`make bench-priors`: measure the effect of router priors, where they change decisions, and the gain.

    python scripts/bench_priors.py [--sessions N] [--blocks N] [--routers R...] [--traces DIR] [--results FILE]
    python scripts/bench_priors.py --paper-only --data DIR

Each router is compared with itself without priors, in one run. The last line is JSON.

    simulated   the bundled priors at every position of the target's replies to held-out sessions. With `--data` (a
                folder of collect_router_data), priors learned from its last sessions, like `calibrate`, and evaluated
                on the others. By context kind and span: how often entropy is below 0.001 nats, where the calibration
                predicts a single gain, and EAGLE-3's true gain there; how often the prior decides, there and overall;
                the gain of a decided round in tokens over the score's own choice
    served      sessions of a separate split, replayed in turns on servers with the bundled priors and with
                `--whiflash-priors none`. Priced: tokens over the rounds' cost by one common table, independent of the
                machine's load. Measured: tokens per millisecond of rounds, and tokens per second on the client
    traces      the same with recorded traces of another domain, unknown to the bundled models; skipped without traces

`over_none` are ratios with priors over without. A criterion holds if the priced ratio reaches its limit and the
measured one is not significantly below it (two standard errors over blocks). Both include the cost of learning while
serving (trials). Texts must be equal. Exit status 1 if a criterion fails.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from whiflash_sglang.calibrate import costs_at, round_costs
from whiflash_sglang.core.errors import WhiFlashError
from whiflash_sglang.routing.priors import Priors, load_priors
from whiflash_sglang.training.bundled import CALIBRATION, PATHS, PRIORS, gains, replies_to
from whiflash_sglang.training.fit_priors import biases, fit_priors, margin_of, places
from whiflash_sglang.training.router_data import Record, load_router_data
from whiflash_sglang.training.walk import by_worth, gather, walk
from whiflash_workloads import server
from whiflash_workloads.bench import demo_servers, finish, note, replay_in_turns, warm_up
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.provenance import provenance
from whiflash_workloads.report import TABLE_WIDTH, Report, merge
from whiflash_workloads.schema import Session, TraceError
from whiflash_workloads.tokens import totals

SILENT = 0.001  # nats; the calibration's first edge, below which it predicts a single gain
LIMITS = {"held-out replay": 1.0, "traces of another world": 0.98}
MAX_TOKENS = 220
TRACE_TOKENS = 96  # per reply to a trace, where the demo models generate nothing useful
TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
WITH, WITHOUT = "bundled", "none"

# --------------------------------------------------------------------------------------------------------- simulated


def effect(records: Sequence[Record], gain: np.ndarray, priors: Priors, ms: Mapping[str, float]) -> dict[str, Any]:
    """Simulate the effect of `priors` on a router that predicts `gain` [all positions]; `ms`: costs by drafter."""
    without = walk(records, by_worth(records, gain, ms), ms)
    biased = gain + biases(records, priors)
    margin = margin_of(records, biased, ms)
    found = walk(records, biased > margin, ms)
    at = found.position
    decided = found.is_e3 != (gain[at] > margin)
    difference = gather(records, "e3").astype(np.float64) - gather(records, "df")
    worth = np.where(found.is_e3, 1, -1) * (difference[at] - margin) * decided  # tokens gained over the score's choice
    silent = gather(records, "entropy")[at] < SILENT
    place_of = np.array([f"{place.context_kind} {place.span}" for place in places(records)])[at]
    everywhere = np.ones(len(at), dtype=bool)

    def figures(part: np.ndarray) -> dict[str, Any]:
        return {
            "rounds": int(part.sum()),
            "silent": share(part & silent, part),
            "decided": share(part & decided, part),
            "decided_where_silent": share(part & silent & decided, part & silent),
            "worth_of_decided_tokens": mean(worth[part & decided]),
            "e3_gain_where_silent": mean(difference[at][part & silent]),
            "worth_of_all": round(float(worth[part].sum() / found.tokens[part].sum()), 5),
        }

    return {
        "tokens_per_ms": {WITHOUT: round(without.tokens_per_ms, 4), WITH: round(found.tokens_per_ms, 4)},
        "over_none": round(found.tokens_per_ms / without.tokens_per_ms, 5),
        **figures(everywhere),
        "by_place": {str(place): figures(place_of == place) for place in np.unique(place_of)},
    }


def share(part: np.ndarray, whole: np.ndarray) -> float | None:
    """Share of true values; None if `whole` has none."""
    return round(float(part.sum() / whole.sum()), 4) if whole.any() else None


def mean(values: np.ndarray) -> float | None:
    """Rounded mean; None if empty."""
    return round(float(values.mean()), 3) if len(values) else None


def from_data(folder: Path, num_fit: int, routers: Sequence[str], ms: Mapping[str, float]) -> dict[str, Any]:
    """`effect` of priors fitted to the last `num_fit` sessions of a folder, evaluated on the others."""
    data = load_router_data(folder)
    PATHS.identity().check("--data", folder, data.manifest["models"])
    names = data.sessions
    if not 0 < num_fit < len(names):
        raise SystemExit(f"error: --fit {num_fit}: {folder} has {len(names)} sessions; leave some for evaluation")
    fit_names = set(names[-num_fit:])
    fit = [record for record in data.records if record.session in fit_names]
    tried = [record for record in data.records if record.session not in fit_names]
    fit_gain, gain = gains(fit), gains(tried)
    return {name: effect(tried, gain[name], fit_priors(fit, fit_gain[name], ms), ms) for name in routers}


def bundled_on(records: Sequence[Record], routers: Sequence[str], ms: Mapping[str, float]) -> dict[str, Any]:
    """`effect` of the bundled priors."""
    gain, identity = gains(records), PATHS.identity()
    return {name: effect(records, gain[name], load_priors(PRIORS, name, identity), ms) for name in routers}


def paper_table(router: str, found: Mapping[str, Any]) -> Table:
    """The simulated effect by context kind and span."""
    view = Table(title=f"{router}, simulated: {found['over_none']:.4f} times the tokens per ms without priors")
    silent = f"entropy < {SILENT}"
    for column in ("context, span", "rounds", silent, "e3's gain there", "decided there", "decided", "gain"):
        view.add_column(column, justify="left" if column.startswith("context") else "right")
    for place, figures in (*found["by_place"].items(), ("all", found)):
        view.add_row(
            place,
            str(figures["rounds"]),
            shown(figures["silent"], "{:.1%}"),
            shown(figures["e3_gain_where_silent"], "{:+.2f} tokens"),
            shown(figures["decided_where_silent"], "{:.1%}"),
            shown(figures["decided"], "{:.1%}"),
            shown(figures["worth_of_decided_tokens"], "{:+.2f} tokens"),
        )
    return view


def shown(value: float | None, form: str) -> str:
    """Format a value, or "-" for None."""
    return "-" if value is None else form.format(value)


# ------------------------------------------------------------------------------------------------------------ served


def flags_of(routers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flags of two servers per router. `--demo` alone uses the bundled priors."""
    both = {WITHOUT: ("--whiflash-priors", "none"), WITH: ()}
    return {
        f"{router}/{priors}": ("--whiflash-router", router, *own) for router in routers for priors, own in both.items()
    }


def compare(without: Sequence[Report], having: Sequence[Report], table: Mapping[str, Any]) -> dict[str, Any]:
    """Compare one router's blocks without and with priors. `table`: the `round_ms` used to price both."""
    whole = {WITHOUT: merge(without), WITH: merge(having)}
    context = mean_context(whole[WITHOUT])
    ms = costs_at(table, context)
    measured = [tokens_per_ms(report) for report in having], [tokens_per_ms(report) for report in without]
    ratio, error = paired(*measured)
    figures = {name: report.figures() for name, report in whole.items()}
    priced = {name: priced_tokens_per_ms(report, ms) for name, report in whole.items()}
    share_of, by_place = decided(whole[WITH])
    return {
        "over_none": {
            "priced": round(priced[WITH] / priced[WITHOUT], 5),
            "measured": round(ratio, 4),
            "measured_standard_error": round(error, 4),
            "tokens_per_s": round(figures[WITH]["tokens_per_s"] / figures[WITHOUT]["tokens_per_s"], 4),
        },
        "tokens_per_s": {name: each["tokens_per_s"] for name, each in figures.items()},
        "tokens_per_round": {name: each["acceptance_length"] for name, each in figures.items()},
        "e3_share": {name: (each["share_by_drafter"] or {}).get("e3", 0.0) for name, each in figures.items()},
        "decided": share_of,
        "decided_by_place": by_place,
        "priced_at_ms": ms,
        "mean_context": round(context),
        "cut_prompts": figures[WITH]["cut_prompts"],
        "failed": sum(each["failed"] for each in figures.values()),
        "texts_identical": whole[WITH].texts() == whole[WITHOUT].texts(),
    }


def mean_context(report: Report) -> float:
    """Mean context length of rounds, in tokens."""
    done = [turn for turn in report.turns if turn.error is None]
    return statistics.fmean(turn.prompt_tokens + turn.completion_tokens / 2 for turn in done)


def counted(report: Report) -> Mapping[str, Any]:
    """The server's counters. Raises ServerError without them."""
    if report.totals is None:
        raise server.ServerError("the server reports no WhiFlash figures")
    return report.totals


def round_tokens(report: Report) -> int:
    """Number of tokens committed by rounds."""
    found = counted(report)
    return int(found["rounds"] + found["accepted_drafts"])


def tokens_per_ms(report: Report) -> float:
    """Tokens per measured millisecond of rounds."""
    return round_tokens(report) / (1000 * counted(report)["seconds"]["round"])


def priced_tokens_per_ms(report: Report, ms: Mapping[str, float]) -> float:
    """Tokens per millisecond, with rounds priced by `ms`."""
    rounds = counted(report)["rounds_by_drafter"]
    return round_tokens(report) / sum(count * ms[name] for name, count in rounds.items())


def paired(having: Sequence[float], without: Sequence[float]) -> tuple[float, float]:
    """Geometric mean ratio over blocks, and its standard error (infinite for a single block)."""
    logs = [math.log(a / b) for a, b in zip(having, without, strict=True)]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    ratio = math.exp(statistics.fmean(logs))
    return ratio, ratio * error


def decided(report: Report) -> tuple[float | None, dict[str, Any]]:
    """Share of rounds that the prior decided, in total, and counts by context kind and span."""
    by_place: dict[str, Any] = counted(report)["prior_share"]
    counts = {f"{kind} {span}": count for kind, spans in by_place.items() for span, count in spans.items()}
    rounds = sum(count["rounds"] for count in counts.values())
    whole = round(sum(count["decided"] for count in counts.values()) / rounds, 4) if rounds else None
    return whole, dict(sorted(counts.items()))


def holds(found: Mapping[str, Any], limit: float) -> bool:
    """Whether a router meets the criterion."""
    ratios = found["over_none"]
    most = ratios["measured"] + 2 * ratios["measured_standard_error"]
    return ratios["priced"] >= limit and most >= limit and found["texts_identical"] and not found["failed"]


def served_table(title: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """The served comparison, one row per router."""
    view = Table(title=title)
    for column in ("router", "priced", "measured", "tokens/s", "AL without", "AL with", "decided", "texts"):
        view.add_column(column, justify="left" if column == "router" else "right")
    for router, figures in found.items():
        ratios, lengths = figures["over_none"], figures["tokens_per_round"]
        view.add_row(
            router,
            f"{ratios['priced']:.4f}",
            f"{ratios['measured']:.4f} ± {ratios['measured_standard_error']:.4f}",
            f"{ratios['tokens_per_s']:.4f}",
            f"{lengths[WITHOUT]}",
            f"{lengths[WITH]}",
            shown(figures["decided"], "{:.1%}"),
            "same" if figures["texts_identical"] else "DIFFERENT",
        )
    return view


def recorded(folder: Path, count: int) -> list[Session]:
    """About `count` sessions, evenly from all traces in a folder; empty if there are none."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".jsonl", ".traj"))
    if not files:
        note(f"traces: skipped, {folder} has none; give --traces DIR")
        return []
    found = [session for session in load_traces(files).sessions if session.turns and not session.length_only]
    return found[:: max(1, len(found) // count)][:count]


# --------------------------------------------------------------------------------------------------------------- run


def serve(args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """All parts that need servers, and the simulation with their measured costs."""
    own = [Session.model_validate(session) for session in islice(sessions("priors", 1 + args.sessions), args.sessions)]
    replays = {"held-out replay": (own, {"max_tokens": MAX_TOKENS})}
    if foreign := recorded(args.traces, args.trace_sessions):
        replays["traces of another world"] = (foreign, {"max_tokens": TRACE_TOKENS})
    flags = flags_of(args.routers)
    note(f"starting {len(flags)} servers (logs in {logs})")
    with demo_servers(flags, logs) as urls:
        tables = {router: (totals(urls[f"{router}/{WITHOUT}"]) or {})["round_ms"] for router in args.routers}
        warm_up(urls, next(Session.model_validate(session) for session in sessions("heldout", 1)))
        served = {}
        for title, (what, options) in replays.items():
            parts = replay_in_turns(urls, what, min(args.blocks, len(what)), **options)
            served[title] = {
                router: compare(parts[f"{router}/{WITHOUT}"], parts[f"{router}/{WITH}"], tables[router])
                for router in args.routers
            }
            Console(stderr=True, width=TABLE_WIDTH).print(served_table(title, served[title]))
        note("served: done")
        table = tables[args.routers[0]]
        if args.data is None:
            records, _ = replies_to(urls[f"{args.routers[0]}/{WITHOUT}"], map(dumped, own), MAX_TOKENS)
            paper = bundled_on(records, args.routers, round_costs(records, table))
        else:
            paper = from_data(
                args.data, args.fit, args.routers, round_costs(load_router_data(args.data).records, table)
            )
    return {"on_paper": paper, "served": served}


def dumped(session: Session) -> dict[str, Any]:
    """A session as plain data."""
    return session.model_dump(exclude_none=True)


def criteria(found: Mapping[str, Any]) -> dict[str, bool | None]:
    """Criterion -> whether it holds; None if not measured."""
    served = found["served"]
    names = {
        "priors at least none on the held-out replay": "held-out replay",
        "priors at least 0.98 of none on traces of another world": "traces of another world",
    }
    held = {
        name: all(holds(each, LIMITS[title]) for each in served[title].values()) if title in served else None
        for name, title in names.items()
    }
    shares = [each["decided"] for each in served.get("held-out replay", {}).values()]
    return held | {"share of rounds decided by the prior is reported": None not in shares if shares else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", nargs="+", choices=("entropy", "neural"), default=["entropy", "neural"])
    parser.add_argument("--sessions", type=int, default=40, help="held-out sessions (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=8, help="number of interleaved blocks (default: %(default)s)")
    parser.add_argument(
        "--traces", type=Path, default=TRACES, metavar="DIR", help="recorded traces (default: %(default)s)"
    )
    parser.add_argument("--trace-sessions", type=int, default=16, help="sessions from traces (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="output of collect_router_data, for the simulation")
    parser.add_argument("--fit", type=int, default=64, help="number of its last sessions to fit (default: %(default)s)")
    parser.add_argument("--paper-only", action="store_true", help="simulate only: --data with the calibration's costs")
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    if args.paper_only and args.data is None:
        parser.error("argument --paper-only: needs --data, as replies are generated by a server; give both or neither")
    if min(args.sessions, args.blocks, args.trace_sessions) < 1:
        parser.error("arguments --sessions, --blocks and --trace-sessions: give 1 or more")
    server.stop_on_signals()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-priors-"))
    if args.paper_only:
        ms = json.loads(Path(CALIBRATION).read_text())["round_ms"]
        found: dict[str, Any] = {"on_paper": from_data(args.data, args.fit, args.routers, ms), "served": {}}
    else:
        found = serve(args, logs)
    for router, figures in found["on_paper"].items():
        Console(stderr=True, width=TABLE_WIDTH).print(paper_table(router, figures))
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    arguments = {name: value for name, value in arguments.items() if name != "results"}
    held = criteria(found)
    line = {"benchmark": "priors", "arguments": arguments, "criteria": held, **found, **provenance()}
    failed = [name for name, held in held.items() if held is False]
    finish(line, args.results, f"failed: {'; '.join(failed)}; see the logs in {logs}" if failed else None)


if __name__ == "__main__":
    try:
        main()
    except (server.ServerError, httpx.HTTPError, TraceError, WhiFlashError) as error:
        raise SystemExit(f"error: {error}") from error
