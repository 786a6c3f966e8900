"""Measure the cost of switching drafters, and check that the radix cache does not reduce acceptance.

    python scripts/bench_switching.py [--sessions N] [--results FILE]

Three parts, all ratios within this run. The last line is JSON.

    overhead_share     share of a round's time spent on routing and on catch-up of missed tokens (a pass's time is
                       divided by tokens), without a drafter's work for its own rounds
    prefill            the drafters' time relative to the target's for a tool output of 2000 tokens; the same in FLOPs
                       at Qwen3-8B's shapes; KV-only ingestion relative to running EAGLE-3's whole layer on the prompt
    cache              acceptance length with the radix cache relative to without; cached prompt tokens relative to
                       `off`, with a large KV pool, and with a quarter of the working set and interleaved sessions
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig

from whiflash_sglang.training.drafters import DrafterShape, Eagle3
from whiflash_sglang.training.layers import Rope
from whiflash_workloads import server
from whiflash_workloads.bench import demo_servers, finish, in_turns, note, switching_share
from whiflash_workloads.provenance import provenance
from whiflash_workloads.tokens import TOKENIZER, Answers, TokenIds, ask, heldout_histories, totals

TIMED = {
    "entropy": ("--whiflash-router", "entropy"),
    "alternate": ("--whiflash-router", "alternate"),
}
CACHED = {"e3": "fixed:e3", "df": "fixed:df", "random": "random:1"}
MAX_TOKENS = 200
TOOL_OUTPUT_TOKENS = 2000
BLOCKS = 6


# ------------------------------------------------------------------------------------------------------------ rounds


def rounds(sessions: list[list[TokenIds]], logs: Path) -> dict[str, Any]:
    """Measure round overheads in interleaved blocks."""
    parts: dict[str, list[Answers]] = {name: [] for name in TIMED}
    with demo_servers(TIMED, logs, at_once=True) as urls:
        for url in urls.values():
            ask(url, sessions[-1], MAX_TOKENS)  # warm
        for block, name in in_turns(list(urls), BLOCKS):
            parts[name].append(ask(urls[name], list(chain(*sessions[block::BLOCKS])), MAX_TOKENS))
        prefill = prefill_share(urls["entropy"], sessions)
    note("rounds and prefill: measured")
    return {
        "overhead_share": {
            name: switching_share([part.totals for part in parts[name] if part.totals is not None])
            for name in ("alternate", "entropy")
        },
        "drafters_over_target": prefill,
    }


# ----------------------------------------------------------------------------------------------------------- prefill


def prefill_share(base_url: str, sessions: list[list[TokenIds]], repeats: int = 8) -> float:
    """The drafters' time relative to the target's, for a tool output after a cached history."""
    text = list(chain(*(histories[-1] for histories in sessions)))
    drafters = target = 0.0
    for repeat in range(repeats):
        history = sessions[repeat][0]
        start = repeat * TOOL_OUTPUT_TOKENS
        ask(base_url, [history], 1)
        before = totals(base_url)
        ask(base_url, [history + text[start : start + TOOL_OUTPUT_TOKENS]], 1)
        after = totals(base_url)
        assert before is not None and after is not None
        drafters += after["seconds"]["prefill_drafters"] - before["seconds"]["prefill_drafters"]
        target += after["seconds"]["prefill"] - before["seconds"]["prefill"]
    return round(drafters / target, 4)


@torch.inference_mode()
def kv_only_over_full_layer(repeats: int = 7) -> float:
    """Time of EAGLE-3's KV-only ingestion of a tool output relative to its whole layer, at the demo's shapes."""
    torch.set_num_threads(1)
    shape = DrafterShape.of(AutoConfig.from_pretrained(TOKENIZER))
    model = Eagle3(shape, (1, 3, 6), torch.arange(64))
    features = torch.randn(1, TOOL_OUTPUT_TOKENS, 3 * shape.hidden)
    embeds = torch.randn(1, TOOL_OUTPUT_TOKENS, shape.hidden)
    positions = torch.arange(TOOL_OUTPUT_TOKENS)
    rope = Rope(shape.head_dim, shape.theta, positions.device)

    def kv_only() -> tuple[torch.Tensor, ...]:
        fused = model.fc(features)
        x = model.join(embeds, fused)
        return fused, x, *model.self_attn.keys(x, positions, rope)

    def full_layer() -> torch.Tensor:
        fused, x, k, v = kv_only()
        middle = fused + model.self_attn.attend(model.self_attn.query(x, positions, rope), k, v, None)
        return middle + model.mlp(model.post_attention_layernorm(middle))

    return round(quickest(kv_only, repeats) / quickest(full_layer, repeats), 4)


def quickest(call: Any, repeats: int) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def flops_share_at_8b() -> float:
    """The drafters' FLOPs per prompt token relative to the target's, at Qwen3-8B's shapes, for linear layers only.

    Target: 36 layers, width 4096, 32 query and 8 KV heads of 128, MLP 12288. DFlash: 5 layers on 5 captured ones.
    EAGLE-3: one layer, on 3 captured ones and the token's embedding. Including attention, which only the target has
    during prefill, would make the share even smaller.
    """
    hidden, queries, kv, mlp = 4096, 32 * 128, 2 * 8 * 128, 12288
    target = 36 * (hidden * (queries + kv) + queries * hidden + 3 * hidden * mlp)
    dflash = 5 * hidden * hidden + 5 * hidden * kv
    eagle3 = 3 * hidden * hidden + 2 * hidden * kv
    return round((dflash + eagle3) / target, 4)


# ------------------------------------------------------------------------------------------------------------- cache


def cache(sessions: list[list[TokenIds]], logs: Path) -> dict[str, Any]:
    """Acceptance lengths with and without the radix cache, and cached tokens compared with `off`."""
    in_order = list(chain(*sessions))
    warm = {name: ("--whiflash-router", router) for name, router in CACHED.items()}
    with demo_servers({"off": ("--whiflash-router", "off"), **warm}, logs, at_once=True) as urls:
        cached = {name: ask(url, in_order, MAX_TOKENS) for name, url in urls.items()}
    note("with the radix cache: measured")
    without = {name: (*flags, "--disable-radix-cache") for name, flags in warm.items()}
    with demo_servers(without, logs / "without", at_once=True) as urls:
        cold = {name: ask(url, in_order, MAX_TOKENS) for name, url in urls.items()}
    note("without the radix cache: measured")
    off = cached["off"]
    # The tokens that `off` had to compute are the working set.
    working_set = off.prompt_tokens - off.cached_tokens + off.tokens
    # Interleave sessions, so that each is the least recently used one at its next turn.
    by_turns = [prompt for turn in zip_longest(*sessions) for prompt in turn if prompt is not None]
    pool = ("--max-total-tokens", str(working_set // 4))
    pressed_flags = {name: ("--whiflash-router", name, *pool) for name in ("off", "entropy")}
    with demo_servers(pressed_flags, logs / "pressed", at_once=True) as urls:
        pressed = {name: ask(url, by_turns, MAX_TOKENS) for name, url in urls.items()}
    note("in a small pool: measured")
    return {
        "al_cached_over_cold": {
            name: round(cached[name].acceptance_length / cold[name].acceptance_length, 4) for name in CACHED
        },
        "cached_tokens_over_off": round(cached["random"].cached_tokens / off.cached_tokens, 4),
        "cached_tokens_over_off_in_a_quarter_of_the_pool": round(
            pressed["entropy"].cached_tokens / pressed["off"].cached_tokens, 4
        ),
        "pool": {"working_set": working_set, "pressed_cached_tokens": pressed["off"].cached_tokens},
        "identical_to_off": all(a.texts == off.texts for a in (*cached.values(), *cold.values()))
        and pressed["entropy"].texts == pressed["off"].texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=30, help="held-out sessions (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    if args.sessions < 8:
        parser.error("argument --sessions: give 8 or more")
    server.stop_on_signals()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-switching-"))
    sessions = heldout_histories(args.sessions)
    measured = rounds(sessions, logs)
    line = {
        "benchmark": "switching",
        "arguments": {"sessions": args.sessions},
        "overhead_share": measured["overhead_share"],
        "prefill": {
            "drafters_over_target": measured["drafters_over_target"],
            "drafters_over_target_flops_qwen3_8b": flops_share_at_8b(),
            "kv_only_over_full_layer": kv_only_over_full_layer(),
        },
        **cache(sessions, logs),
        **provenance(),
    }
    differs = None if line["identical_to_off"] else f"a text differs from `off`; see the logs in {logs}"
    finish(line, args.results, differs)


if __name__ == "__main__":
    try:
        main()
    except (server.ServerError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error}") from error
