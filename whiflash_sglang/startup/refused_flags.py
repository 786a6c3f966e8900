"""SGLang's flags that WHIFLASH rejects at startup, as tables of flag, reason and fix.

    python -m whiflash_sglang.startup.refused_flags     # print the tables of docs/limits.md

A flag is listed if WHIFLASH would ignore it, break it, or silently lose the benefit of drafting. `refuse` checks flags
as given, before SGLang resolves them and before checkpoints are downloaded or loaded.

REFUSALS        with WHIFLASH; not with `--whiflash-router off`
CPU_REFUSALS    on a CPU, with and without WHIFLASH
CUDA_REFUSALS   on a GPU, with WHIFLASH; `gpu_memory.py` checks head sizes, memory and SGLang's default backends
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup.config import FLAG_ROUTER, FLAG_STEPS

FLAG_WIDTH = "--speculative-num-draft-tokens"
FLAG_ATTENTION = "--attention-backend"
CUDA_BACKENDS = ("triton", "flashinfer", "fa3")


class Given(NamedTuple):
    """A flag's value and its default."""

    value: object
    default: object


class Refusal(NamedTuple):
    """A flag that is rejected unless its value is the default or in `fine`."""

    flag: str
    reason: str
    fix: str
    fine: tuple[object, ...] = ()


def typed(given: Mapping[str, Sequence[str]]) -> dict[str, Given]:
    """Flags from the raw command line (`command_line.read`), with the defaults of SGLang's parser."""
    return {flag: Given(_value(values, DEFAULTS.get(flag)), DEFAULTS.get(flag)) for flag, values in given.items()}


def _value(values: Sequence[str], default: object) -> object:
    """Parse values as SGLang's parser would: a switch, a list, or one value of the default's type."""
    if len(values) != 1:
        return list(values) or True
    try:
        return type(default)(values[0]) if isinstance(default, int | float) else values[0]
    except ValueError:
        return values[0]


def refuse(table: Iterable[Refusal], given: Mapping[str, Given]) -> None:
    """Raise ConfigError for the first flag of the table that was given a value that is not allowed."""
    for row in table:
        value, default = given.get(row.flag, Given(None, None))
        if value != default and value not in row.fine:
            raise ConfigError(row.flag, None if value is True else value, row.reason, row.fix)


def _rows(flags: str, reason: str, fix: str, fine: tuple[object, ...] = ()) -> tuple[Refusal, ...]:
    """One row per flag in `flags`, separated by spaces."""
    return tuple(Refusal(flag, reason, fix, fine) for flag in flags.split())


WITHOUT = f"leave it out, or serve with {FLAG_ROUTER} off"

REFUSALS: tuple[Refusal, ...] = (
    # Replaced by our own flags
    *_rows("--speculative-num-steps", "has no effect with WHIFLASH", f"use {FLAG_STEPS}"),
    *_rows("--speculative-eagle-topk", "has no effect with WHIFLASH", f"use {FLAG_STEPS} (a chain has no branches)"),
    *_rows(
        "--speculative-dflash-block-size",
        "has no effect with WHIFLASH",
        f"use {FLAG_WIDTH} (the block size is the checkpoint's)",
    ),
    *_rows(
        "--speculative-adaptive --speculative-adaptive-config",
        "has no effect with WHIFLASH: it adapts the draft length of SGLang's own EAGLE",
        f"use {FLAG_ROUTER} with --whiflash-objective tokens_per_ms, which can also skip drafting",
    ),
    # SGLang's other algorithms
    *_rows(
        "--speculative-accept-threshold-single --speculative-accept-threshold-acc --speculative-use-rejection-sampling",
        "WHIFLASH accepts a draft only if it equals the target's own choice",
        "leave it out",
    ),
    *_rows(
        "--speculative-token-map",
        "has no effect with WHIFLASH: EAGLE-3 checkpoints contain their own map (d2t)",
        "leave it out",
    ),
    *_rows(
        "--speculative-draft-window-size",
        "WHIFLASH's drafters attend to the whole context, in the target's KV slots",
        "leave it out; --whiflash-max-backlog limits a drafter's backlog",
    ),
    *_rows(
        "--speculative-draft-model-quantization",
        "drafters are not quantized: K and V are projected without the rest of the layer",
        "leave it out or use `unquant`",
        fine=("unquant",),
    ),
    *_rows(
        "--speculative-moe-runner-backend --speculative-moe-a2a-backend",
        "has no effect with WHIFLASH: its drafters have no experts",
        "leave it out",
    ),
    *_rows(
        "--speculative-skip-dp-mlp-sync --enable-multi-layer-eagle --speculative-dspark-block-size "
        "--speculative-dspark-sps-table-path --speculative-dspark-confidence-sts-path "
        "--speculative-dspark-align-verify-tokens-to-graph-tier --speculative-ngram-min-bfs-breadth "
        "--speculative-ngram-max-bfs-breadth --speculative-ngram-match-type --speculative-ngram-max-trie-depth "
        "--speculative-ngram-capacity --speculative-ngram-external-corpus-path "
        "--speculative-ngram-external-sam-budget --speculative-ngram-external-corpus-max-tokens "
        "--decoupled-spec-bind-endpoint --decoupled-spec-connect-endpoints --decoupled-spec-rank "
        "--decoupled-spec-role --spec-trace-dir",
        "belongs to another speculative algorithm",
        "leave it out, or use `python -m sglang.launch_server` with that algorithm",
    ),
    # Parallelism and scheduling
    *_rows(
        "--pipeline-parallel-size --enable-dynamic-chunking",
        "the drafters need features of layers that are on other stages",
        "use --tensor-parallel-size",
    ),
    *_rows(
        "--enable-dp-attention",
        "ranks would run rounds of different shapes and deadlock",
        "use --data-parallel-size without it",
    ),
    *_rows(
        "--decode-context-parallel-size --attention-context-parallel-size --enable-prefill-cp --dwdp-size "
        "--enable-prefill-context-parallel --enable-dsa-prefill-context-parallel",
        "the drafters need features and KV of every position on each rank",
        "use --tensor-parallel-size",
    ),
    *_rows(
        "--disaggregation-mode --disaggregation-decode-enable-offload-kvcache",
        "the drafters' KV and features are not transferred from a prefill server to a decode server",
        "leave it out; --chunked-prefill-size keeps prefills from stalling decoding",
    ),
    *_rows(
        "--enable-pdmux",
        "prefills that are split and run alongside decoding give the drafters no features",
        "leave it out; use --chunked-prefill-size",
    ),
    *_rows(
        "--enable-mixed-chunk",
        "SGLang does not mix prefill and decoding in one step with speculative decoding",
        "leave it out; use --chunked-prefill-size",
    ),
    *_rows(
        "--enable-two-batch-overlap --enable-single-batch-overlap",
        "verify windows do not support overlapping two halves of a batch",
        WITHOUT,
    ),
    *_rows(
        "--use-ray",
        "WhiFlash passes its configuration to processes in the environment, which Ray actors do not inherit",
        "leave it out, and start one server per machine",
    ),
    *_rows(
        "--grpc-mode --smg-grpc-mode",
        "hints, the context of chats and /whiflash/... are implemented in the HTTP server",
        "leave it out and use the HTTP server",
    ),
    *_rows(
        "--tokenizer-worker-num",
        "hints, the context of chats and /whiflash/... need a single HTTP process",
        "leave it at 1; for more HTTP processes start several servers behind a gateway",
    ),
    # Models
    *_rows("--is-embedding", "embedding models do not decode", WITHOUT),
    *_rows(
        "--enable-multimodal --encoder-only --language-only --encoder-urls --encoder-register-urls "
        "--enable-adaptive-dispatch-to-encoder",
        "drafters support text only: they embed token ids, which images and audio do not have",
        WITHOUT,
    ),
    *_rows(
        "--enable-lora --lora-paths --enable-lora-overlap-loading",
        "the drafters expect features of the target without adapters",
        "merge the adapter into the target and serve the result",
    ),
    *_rows("--dllm-algorithm", "a diffusion model is not decoded token by token", WITHOUT),
    *_rows("--enable-mis", "multi-item scoring needs attention masks that verify windows do not support", WITHOUT),
    *_rows(
        "--model-impl",
        "only SGLang's own models return the features of inner layers that drafters need",
        "leave it at auto or sglang",
        fine=("sglang",),
    ),
    *_rows(
        "--cpu-offload-gb --offload-group-size",
        "the drafters' K and V are projected without the layer forward that would fetch offloaded weights",
        WITHOUT,
    ),
    # KV cache
    *_rows(
        "--enable-hierarchical-cache --enable-lmcache --enable-flexkv --enable-hisparse",
        "KV restored from a host or a store lacks the drafters' KV; their drafts would be noise from then on",
        "leave it out; the radix tree on the device shares KV of target and drafters",
    ),
    *_rows(
        "--radix-cache-backend",
        "EAGLE-3's KV is shared by bigram keys, which other caches may not support",
        "leave it out",
    ),
    *_rows(
        "--enable-streaming-session --enable-session-radix-cache",
        "EAGLE-3's KV at the end of a turn depends on the next token, which changes in a session with its own slots",
        "leave it out and send the whole history; the radix tree reuses its KV",
    ),
    *_rows(
        "--enable-unified-memory --enable-page-major-kv-layout",
        "SGLang supports it only for models without drafters",
        WITHOUT,
    ),
    # Outputs
    *_rows("--enable-return-hidden-states --return-hidden-states-mode", "rounds do not return hidden states", WITHOUT),
    *_rows(
        "--enable-return-routed-experts --enable-return-indexer-topk",
        "rounds would return those of whole verify windows, including rejected drafts",
        WITHOUT,
    ),
    *_rows(
        "--rl-on-policy-target",
        "verify widths differ in summation order, and the router picks the width",
        WITHOUT,
    ),
    *_rows(
        "--grammar-backend",
        "masks for every token of a verify window need a grammar that can roll back",
        "leave it out, or serve with --whiflash-router off",
        fine=("xgrammar", "llguidance", "none"),
    ),
)

_ATTENTION = f"{FLAG_ATTENTION} --prefill-attention-backend --decode-attention-backend"

CUDA_REFUSALS: tuple[Refusal, ...] = (
    *_rows(
        f"{_ATTENTION} --speculative-draft-attention-backend",
        "verify windows and blocks have not been tested with it",
        f"leave it out or use {', '.join(CUDA_BACKENDS)}",
        fine=CUDA_BACKENDS,
    ),
)

CPU_REFUSALS: tuple[Refusal, ...] = (
    *_rows("--device", "this machine has no such accelerator", "leave it out or use cpu", fine=("cpu",)),
    *_rows(
        f"{_ATTENTION} --speculative-draft-attention-backend",
        "needs an accelerator",
        "on a CPU leave it out or use torch_native",
        fine=("torch_native", "intel_amx"),
    ),
    *_rows(
        "--sampling-backend",
        "needs an accelerator",
        "on a CPU leave it out or use --sampling-backend pytorch",
        fine=("pytorch",),
    ),
    *_rows(
        "--enable-nccl-nvls --enable-symm-mem --enable-torch-symm-mem --enable-mscclpp --enable-profile-cuda-graph "
        "--enable-cudagraph-gc --debug-cuda-graph --enable-layerwise-nvtx-marker",
        "needs CUDA",
        "leave it out on a CPU",
        fine=(False,),
    ),
    *_rows(
        "--enable-torch-compile",
        "not supported on this CPU platform: compiling takes minutes and gains nothing here",
        "leave it out",
        fine=(False,),
    ),
)

# Defaults in SGLang's parser for flags of the tables. All others default to None or are switches.
DEFAULTS: Mapping[str, int | float | str] = {
    "--speculative-accept-threshold-single": 1.0,
    "--speculative-accept-threshold-acc": 1.0,
    "--speculative-ngram-min-bfs-breadth": 1,
    "--speculative-ngram-max-bfs-breadth": 10,
    "--speculative-ngram-match-type": "BFS",
    "--speculative-ngram-max-trie-depth": 18,
    "--speculative-ngram-capacity": 10_000_000,
    "--speculative-ngram-external-sam-budget": 0,
    "--speculative-ngram-external-corpus-max-tokens": 10_000_000,
    "--decoupled-spec-role": "null",
    "--pipeline-parallel-size": 1,
    "--decode-context-parallel-size": 1,
    "--attention-context-parallel-size": 1,
    "--dwdp-size": 1,
    "--disaggregation-mode": "null",
    "--tokenizer-worker-num": 1,
    "--model-impl": "auto",
    "--cpu-offload-gb": 0,
    "--offload-group-size": -1,
}


def markdown(table: Iterable[Refusal]) -> str:
    """Format a table as Markdown; flags with the same reason and fix share a line."""
    lines = ["| flag | why it is refused | instead |", "|---|---|---|"]
    for (reason, fix, fine), rows in groupby(table, key=lambda row: (row.reason, row.fix, row.fine)):
        flags = ", ".join(f"`{row.flag}`" for row in rows)
        values = [f"`{value}`" for value in fine if value is not False]
        but = f" (but {' and '.join(values)})" if values else ""
        lines.append(f"| {flags}{but} | {reason} | {fix} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(REFUSALS))
    print()
    print(markdown(CPU_REFUSALS))
    print()
    print(markdown(CUDA_REFUSALS))
