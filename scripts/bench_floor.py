"""Cost of speculation on unpredictable text, and how fast a server adapts to a change of text.

    python scripts/bench_floor.py [--blocks N] [--trace FILE] [--results FILE]

Servers with speculation off and with both routers run side by side and get the same requests in turns. All figures are
ratios within this run. The last line is JSON.

    random     tokens/s relative to `off` for random token ids, which no drafter can predict; 1, 8 and 16 in flight.
               Lengths are drawn as in SGLang's bench_serving `random-ids`
    trace      the same for recorded sessions of another domain (--trace), two per block, concurrently
    changes    share of rounds without drafts, for the order desk, random ids, and the order desk again, in stretches of
               about 64 rounds with one request at a time

The run fails if a text differs from `off`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import httpx

from whiflash_workloads import server
from whiflash_workloads.bench import demo_servers, finish, in_turns, note
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.provenance import provenance
from whiflash_workloads.replay import replay
from whiflash_workloads.tokens import TokenIds, ask, heldout_histories

POLICIES = ("off", "entropy", "neural")
VOCABULARY = 1280  # token ids of the bundled target
IN_FLIGHT = (1, 8, 16)
PROMPTS, PROMPT_TOKENS, TOKENS = 24, 200, 64  # per block; maximum lengths
STRETCH, STRETCHES = 64, 4  # rounds
TRACE_TOKENS = 48  # per turn
DESK_SESSIONS = 40


def random_prompts(seed: int) -> tuple[list[TokenIds], list[int]]:
    """The prompts of a block, and the number of tokens to generate for each."""
    dice = random.Random(seed)
    prompts = [[dice.randrange(VOCABULARY) for _ in range(dice.randint(1, PROMPT_TOKENS))] for _ in range(PROMPTS)]
    return prompts, [dice.randint(1, TOKENS) for _ in prompts]


def compared(what: str, speeds: dict[str, list[float]], texts: dict[str, list[Any]]) -> dict[str, Any]:
    """Compare speeds and texts (by policy and block) with `off`: mean ratio, standard error, equality of texts."""
    found: dict[str, Any] = {"off_tokens_per_s": round(mean(speeds["off"]), 1)}
    for name in POLICIES[1:]:
        by_block = [own / off for own, off in zip(speeds[name], speeds["off"], strict=True)]
        found[name] = {"over_off": round(mean(by_block), 4), "error": round(stdev(by_block) / len(by_block) ** 0.5, 4)}
    found["identical"] = all(texts[name] == texts["off"] for name in texts)
    note(f"{what}: {found}")
    return found


def on_random_ids(urls: dict[str, str], in_flight: int, blocks: int) -> dict[str, Any]:
    """The part `random` for one load."""
    speeds: dict[str, list[float]] = {name: [] for name in urls}
    texts: dict[str, list[list[TokenIds]]] = {name: [] for name in urls}
    for block, name in in_turns(list(urls), blocks):
        prompts, lengths = random_prompts(1000 * in_flight + block)
        answers = ask(urls[name], prompts, lengths, in_flight, {"ignore_eos": True})
        speeds[name].append(answers.tokens / answers.wall_s)
        texts[name].append(answers.texts)
    return compared(f"random ids, {in_flight} in flight", speeds, texts)


def on_trace(urls: dict[str, str], trace: Path, blocks: int) -> dict[str, Any]:
    """The part `trace`."""
    sessions = load_traces([trace], limit=2 * blocks).sessions
    speeds: dict[str, list[float]] = {name: [] for name in urls}
    texts: dict[str, list[Any]] = {name: [] for name in urls}
    for block, name in in_turns(list(urls), blocks):
        report = replay(sessions[block::blocks], urls[name], label=name, concurrency=2, max_tokens=TRACE_TOKENS)
        speeds[name].append(report.figures()["tokens_per_s"])
        texts[name].append(report.texts())
    return compared(trace.name, speeds, texts)


def on_changes(url: str) -> list[dict[str, Any]]:
    """The part `changes`: per stretch the text, its rounds, and the share without drafts."""
    desk = iter(chain(*heldout_histories(DESK_SESSIONS)))
    noise = iter(random_prompts(1)[0])
    found = []
    for text, prompts in (("desk", desk), ("random", noise), ("desk", desk)):
        for _ in range(STRETCHES):
            rounds = without = tokens = 0
            while rounds < STRETCH:
                answers = ask(url, [next(prompts)], TOKENS, sampling={"ignore_eos": text == "random"})
                assert answers.totals is not None
                rounds += answers.totals["rounds"]
                without += answers.totals["rounds_by_drafter"].get("none", 0)
                tokens += answers.tokens
            found.append({"text": text, "rounds": rounds, "without_drafts": round(without / rounds, 3)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="number of interleaved blocks (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="recorded sessions of another domain")
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error("argument --blocks: give 2 or more")
    server.stop_on_signals()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-floor-"))
    flags = {name: ("--whiflash-router", name) for name in POLICIES}
    with demo_servers(flags, logs) as urls:
        changes = {name: on_changes(urls[name]) for name in POLICIES[1:]}
        note(f"changes of text: {changes}")
        for url in urls.values():
            ask(url, random_prompts(0)[0], TOKENS)  # warm
        by_load = {str(n): on_random_ids(urls, n, args.blocks) for n in IN_FLIGHT}
        trace = on_trace(urls, args.trace, args.blocks) if args.trace else None
    line = {
        "benchmark": "floor",
        "arguments": {"blocks": args.blocks, "trace": args.trace and args.trace.name},
        "random": by_load,
        "trace": trace,
        "changes": changes,
        **provenance(),
    }
    identical = all(found["identical"] for found in (*by_load.values(), *([trace] if trace else [])))
    finish(line, args.results, None if identical else f"a text differs from `off`; see the logs in {logs}")


if __name__ == "__main__":
    try:
        main()
    except (server.ServerError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error}") from error
