"""Compare the routers with fixed drafters, random choice, and the oracle.

    python scripts/bench_routers.py [--sessions N] [--blocks N] [--results FILE] [--picture FILE]

On held-out sessions of the order desk, in one run; the last line is JSON.

    simulated   both drafters' acceptance lengths are known at every position of the target's replies, which determines
                the rounds of any policy, priced with the server's measured costs. `oracle` picks, in hindsight, the
                drafter with more tokens per millisecond in each round; `ceiling` minimizes the total time.
                `entropy_late` and `neural_late` use the score of the previous round, as with an overlap schedule.
                `entropy_masked` drafts with both drafters in every round and chooses on the device, for
                `df` + `e3` - `none` milliseconds (an upper bound of the cost)
    served      tokens/s of servers side by side, in interleaved blocks, for 1, 4 and 16 requests in flight; every text
                is compared with the server without speculation
    signal      share of a policy's rounds in which its score separates the drafters by at least half a token

`over_oracle` is tokens per ms relative to the oracle. `oracle_agreement` is the share of a policy's rounds in which the
oracle chooses the same drafter. `tokens_per_s` is null for policies that cannot be served.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from whiflash_sglang.calibrate import round_costs
from whiflash_sglang.training.bundled import gains, replies_to
from whiflash_sglang.training.router_data import Record
from whiflash_sglang.training.walk import Walk, by_worth, ceiling, gather, oracle, walk
from whiflash_workloads import server
from whiflash_workloads.bench import demo_servers, finish, in_turns, note, route_share
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.provenance import provenance
from whiflash_workloads.tokens import Answers, TokenIds, ask, totals

POLICIES = ("off", "fixed:e3", "fixed:df", "random:1", "entropy", "neural")
SHOWN = {"random:1": "random"}  # names in the results where they differ
IN_FLIGHT = (1, 4, 16)
MAX_TOKENS = 220
SIGNAL = 0.5  # tokens


# --------------------------------------------------------------------------------------------------------- simulated


def on_paper(records: Sequence[Record], ms: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Simulated figures by policy; `ms`: round costs by drafter."""
    gain = gains(records)
    n = len(gather(records, "entropy"))
    best = oracle(records, ms)
    choices = {
        "fixed:e3": np.ones(n, dtype=bool),
        "fixed:df": np.zeros(n, dtype=bool),
        "random": np.random.default_rng(1).random(n) < 0.5,
        **{name: by_worth(records, values, ms) for name, values in gain.items()},
        "oracle": best,
        "ceiling": ceiling(records, ms),
    }
    walks = {name: walk(records, choice, ms) for name, choice in choices.items()}
    walks |= {f"{name}_late": walk(records, choices[name], ms, lag=1) for name in gain}
    both = ms["df"] + ms["e3"] - ms["none"]
    walks["entropy_masked"] = walk(records, gain["entropy"] > 0, {"df": both, "e3": both})
    of_oracle = walks["oracle"].tokens_per_ms
    return {name: paper_figures(found, best, of_oracle, gain.get(name)) for name, found in walks.items()}


def paper_figures(found: Walk, best: np.ndarray, of_oracle: float, gain: np.ndarray | None) -> dict[str, Any]:
    """The figures of one policy. `best`: the oracle's choices, `of_oracle`: its tokens per ms."""
    signal = None if gain is None else round(float((np.abs(gain[found.position]) >= SIGNAL).mean()), 4)
    return {
        "tokens_per_ms": round(found.tokens_per_ms, 4),
        "acceptance_length": round(found.acceptance_length, 3),
        "e3_share": round(float(found.is_e3.mean()), 3),
        "oracle_agreement": round(float((found.is_e3 == best[found.position]).mean()), 4),
        "over_oracle": round(found.tokens_per_ms / of_oracle, 4),
        "rounds_with_signal": signal,
        "by_span": found.by_span(),
    }


# ------------------------------------------------------------------------------------------------------------ served


def for_real(
    urls: Mapping[str, str], prompts: Sequence[TokenIds], blocks: int, in_flight: int
) -> dict[str, list[Answers]]:
    """Answers by policy, in interleaved blocks."""
    parts: dict[str, list[Answers]] = {policy: [] for policy in urls}
    for block, policy in in_turns(list(urls), blocks):
        parts[policy].append(ask(urls[policy], prompts[block::blocks], MAX_TOKENS, in_flight))
    return parts


def speed(parts: Sequence[Answers]) -> float:
    """Tokens/s over all blocks."""
    return round(sum(part.tokens for part in parts) / sum(part.wall_s for part in parts), 2)


# ----------------------------------------------------------------------------------------------------------- picture


def picture(line: Mapping[str, Any], file: Path) -> None:
    """Plot tokens per ms relative to the oracle, by span, and tokens/s by requests in flight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = line["policies"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    names = list(policies)
    bars = left.barh(names, [policies[name]["tokens_per_ms"] for name in names], color="#0072B2")
    left.bar_label(bars, [f"{policies[name]['over_oracle']:.0%}" for name in names], padding=3)
    left.axvline(policies["oracle"]["tokens_per_ms"], color="0.4", linestyle=":")
    left.set(title="Simulated, share of the oracle's", xlabel="tokens per ms")
    spans = list(policies["oracle"]["by_span"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [policies[name]["by_span"].get(span, {}).get("tokens_per_ms", 0) for span in spans]
        middle.bar(np.arange(len(spans)) + i * width, values, width, label=name)
    middle.set_xticks(np.arange(len(spans)) + 0.4 - width / 2, spans)
    middle.set(title="Simulated, by span", ylabel="tokens per ms")
    middle.legend(fontsize="small")
    for name in next(iter(line["batch"].values())):
        right.plot(list(line["batch"]), [by_policy[name] for by_policy in line["batch"].values()], "o-", label=name)
    right.set(title="Served", xlabel="requests in flight", ylabel="tokens/s")
    right.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def run(args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Run all parts; returns the JSON line's figures."""
    with demo_servers({policy: ("--whiflash-router", policy) for policy in POLICIES}, logs) as urls:
        costs = totals(urls["neural"])
        assert costs is not None
        records, prompts = replies_to(urls["off"], sessions("heldout", args.sessions), MAX_TOKENS)
        ms = round_costs(records, costs["round_ms"])
        policies = on_paper(records, ms)
        note("simulation: done")
        for url in urls.values():
            ask(url, prompts, MAX_TOKENS, 4)  # warm up and cache the prompts
        measured = {}
        for in_flight in IN_FLIGHT:
            measured[in_flight] = for_real(urls, prompts, args.blocks, in_flight)
            note(f"{in_flight} in flight: done")
    batch = {
        str(in_flight): {SHOWN.get(policy, policy): speed(found) for policy, found in parts.items()}
        for in_flight, parts in measured.items()
    }
    for name, figures in policies.items():
        figures["tokens_per_s"] = batch["1"].get(name)
    texts = {
        (in_flight, policy): [part.texts for part in found]
        for in_flight, parts in measured.items()
        for policy, found in parts.items()
    }
    arms = ("off", "fixed:e3", "fixed:df")
    best_arm = {size: max(by_policy[arm] for arm in arms) for size, by_policy in batch.items()}
    return {
        "policies": policies,
        "router_share_of_round": {
            name: route_share([part.totals for part in measured[1][name] if part.totals is not None])
            for name in ("entropy", "neural")
        },
        "batch": batch,
        "over_best_arm": {
            size: {name: round(by_policy[name] / best_arm[size], 4) for name in ("entropy", "neural")}
            for size, by_policy in batch.items()
        },
        "round_ms": ms,
        "oracle_over_better_fixed": round(
            policies["oracle"]["tokens_per_ms"]
            / max(policies["fixed:e3"]["tokens_per_ms"], policies["fixed:df"]["tokens_per_ms"]),
            4,
        ),
        "positions": len(gather(records, "entropy")),
        "identical_to_off": all(found == texts[in_flight, "off"] for (in_flight, _), found in texts.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=40, help="held-out sessions (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=6, help="number of interleaved blocks (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--picture", type=Path, help="write the plot to this file (default: a temporary folder)")
    args = parser.parse_args()
    server.stop_on_signals()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-routers-"))
    arguments = {"sessions": args.sessions, "blocks": args.blocks}
    line = {"benchmark": "routers", "arguments": arguments, **run(args, logs), **provenance()}
    file = args.picture or logs / "routers.png"
    picture(line, file)
    note(f"plot: {file}")
    differs = None if line["identical_to_off"] else f"a text differs from `off`; see the logs in {logs}"
    finish(line, args.results, differs)


if __name__ == "__main__":
    try:
        main()
    except (server.ServerError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error}") from error
