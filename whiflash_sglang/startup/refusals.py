"""SGLang's flags that WHIFLASH refuses at start, as one table: the flag, why, and what to do instead.

    python -m whiflash_sglang.startup.refusals     # the table as it stands in docs/limits.md

A flag is in the table where WHIFLASH would ignore it, break it, or lose with it what makes drafting worth while without
a word. `refuse` looks at flags as they were given, before SGLang has resolved any of them, so that nothing is first
downgraded; and before a checkpoint is fetched or loaded. `--whiflash-router off` serves SGLang as it is and refuses
nothing here. On a CPU, with or without WHIFLASH, `CPU_REFUSALS` holds as well: what has no CPU implementation here; on
a GPU `CUDA_REFUSALS`, with WHIFLASH: what rounds are not made for. (What SGLang chooses where nothing is given, head
sizes and memory are judged in `accelerator.py`.)
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
    """A flag's value, and the value that it has where nobody gives it."""

    value: object
    default: object


class Refusal(NamedTuple):
    """A flag that is refused with any value but its default and those in `fine`."""

    flag: str
    reason: str
    mend: str
    fine: tuple[object, ...] = ()


def typed(given: Mapping[str, Sequence[str]]) -> dict[str, Given]:
    """Flags as they were typed (`command_line.read`), with the defaults that SGLang's parser would tell."""
    return {flag: Given(_value(values, DEFAULTS.get(flag)), DEFAULTS.get(flag)) for flag, values in given.items()}


def _value(values: Sequence[str], default: object) -> object:
    """What SGLang's parser would make of them: a switch, several, or one of the default's type."""
    if len(values) != 1:
        return list(values) or True
    try:
        return type(default)(values[0]) if isinstance(default, int | float) else values[0]
    except ValueError:
        return values[0]


def refuse(table: Iterable[Refusal], given: Mapping[str, Given]) -> None:
    """Raise for the first flag of the table that was given. One that `given` does not know, SGLang does not have."""
    for row in table:
        value, default = given.get(row.flag, Given(None, None))
        if value != default and value not in row.fine:
            raise ConfigError(row.flag, None if value is True else value, row.reason, row.mend)


def _rows(flags: str, reason: str, mend: str, fine: tuple[object, ...] = ()) -> tuple[Refusal, ...]:
    """One row for each of the flags, which are set apart by blanks."""
    return tuple(Refusal(flag, reason, mend, fine) for flag in flags.split())


WITHOUT = f"leave it out, or serve with {FLAG_ROUTER} off"

REFUSALS: tuple[Refusal, ...] = (
    # Said by our own flags
    *_rows("--speculative-num-steps", "has no effect with WHIFLASH", f"use {FLAG_STEPS}"),
    *_rows("--speculative-eagle-topk", "has no effect with WHIFLASH", f"use {FLAG_STEPS} (a chain has no branches)"),
    *_rows(
        "--speculative-dflash-block-size",
        "has no effect with WHIFLASH",
        f"use {FLAG_WIDTH} (the block size is the checkpoint's)",
    ),
    *_rows(
        "--speculative-adaptive --speculative-adaptive-config",
        "changes the number of drafts of SGLang's own EAGLE; has no effect with WHIFLASH",
        f"use {FLAG_ROUTER} with --whiflash-objective tokens_per_ms, which also chooses rounds without drafts",
    ),
    # SGLang's other algorithms
    *_rows(
        "--speculative-accept-threshold-single --speculative-accept-threshold-acc --speculative-use-rejection-sampling",
        "WHIFLASH keeps a draft where it is the target's own choice, and knows no other rule",
        "leave it out",
    ),
    *_rows(
        "--speculative-token-map",
        "has no effect with WHIFLASH: EAGLE-3 checkpoints bring their own map (d2t)",
        "leave it out",
    ),
    *_rows(
        "--speculative-draft-window-size",
        "drafters of WHIFLASH attend to the whole context: their KV shares the target's slots",
        "leave it out; --whiflash-max-backlog says how far a drafter may lag behind",
    ),
    *_rows(
        "--speculative-draft-model-quantization",
        "drafters are served as their checkpoints are: K and V are projected without the rest of the layer",
        "leave it out or say `unquant`",
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
    # How the work is divided
    *_rows(
        "--pipeline-parallel-size --enable-dynamic-chunking",
        "the drafters need features of layers that other stages hold",
        "use --tensor-parallel-size",
    ),
    *_rows(
        "--enable-dp-attention",
        "ranks would run rounds of different shapes, and wait for each other for ever",
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
        "the drafters' KV and features are not carried from a prefill server to a decode server",
        "leave it out: chunks of prompts (--chunked-prefill-size) keep prefills from holding up decoding",
    ),
    *_rows(
        "--enable-pdmux",
        "prefills that run in parts beside decoding give the drafters no features",
        "leave it out; use --chunked-prefill-size",
    ),
    *_rows(
        "--enable-mixed-chunk",
        "SGLang mixes prefill and decoding in one step with no speculative algorithm",
        "leave it out; use --chunked-prefill-size",
    ),
    *_rows(
        "--enable-two-batch-overlap --enable-single-batch-overlap",
        "a verify window is not split over two overlapped halves of a batch",
        WITHOUT,
    ),
    *_rows(
        "--use-ray",
        "WhiFlash's configuration reaches processes through the environment, not Ray's actors",
        "leave it out, and start one server for each machine",
    ),
    *_rows(
        "--grpc-mode --smg-grpc-mode",
        "hints, the context of chats and /whiflash/... live in the HTTP server",
        "leave it out and use the HTTP server",
    ),
    *_rows(
        "--tokenizer-worker-num",
        "hints, the context of chats and /whiflash/... live in one HTTP process",
        "leave it at 1; start several servers behind a router for more HTTP processes",
    ),
    # What is served
    *_rows("--is-embedding", "nothing is decoded in it", WITHOUT),
    *_rows(
        "--enable-multimodal --encoder-only --language-only --encoder-urls --encoder-register-urls "
        "--enable-adaptive-dispatch-to-encoder",
        "drafters are made for text: they embed token ids, which images and sounds do not have",
        WITHOUT,
    ),
    *_rows(
        "--enable-lora --lora-paths --enable-lora-overlap-loading",
        "the drafters' features are those of the target without adapters",
        "merge the adapter into the target and serve that",
    ),
    *_rows("--dllm-algorithm", "a diffusion model is not decoded token by token", WITHOUT),
    *_rows("--enable-mis", "scores of several items in one prompt need masks that a verify window has not", WITHOUT),
    *_rows(
        "--model-impl",
        "only SGLang's own models give the drafters features of inner layers",
        "leave it at auto or sglang",
        fine=("sglang",),
    ),
    *_rows(
        "--cpu-offload-gb --offload-group-size",
        "K and V of the drafters are projected without the layer whose forward would fetch offloaded weights",
        WITHOUT,
    ),
    # Where KV lives
    *_rows(
        "--enable-hierarchical-cache --enable-lmcache --enable-flexkv --enable-hisparse",
        "KV that comes back from a host or a store comes without the drafters', and drafts would be noise from then on",
        "leave it out; the radix tree on the device shares KV of target and drafters",
    ),
    *_rows(
        "--radix-cache-backend",
        "a cache that is not SGLang's own need not know bigram keys, by which EAGLE-3's KV is shared",
        "leave it out",
    ),
    *_rows(
        "--enable-streaming-session --enable-session-radix-cache",
        "EAGLE-3's KV at the end of a turn depends on the token behind it, which changes in a session with own slots",
        "leave it out and send the whole history: the radix tree finds it",
    ),
    *_rows(
        "--enable-unified-memory --enable-page-major-kv-layout",
        "SGLang has it for models without drafters",
        WITHOUT,
    ),
    # What is returned
    *_rows("--enable-return-hidden-states --return-hidden-states-mode", "rounds do not return hidden states", WITHOUT),
    *_rows(
        "--enable-return-routed-experts --enable-return-indexer-topk",
        "rounds would return those of whole verify windows, rejected drafts among them",
        WITHOUT,
    ),
    *_rows(
        "--rl-on-policy-target",
        "windows of different widths add in different orders, and which one is verified is the router's choice",
        WITHOUT,
    ),
    *_rows(
        "--grammar-backend",
        "masks for every token of a verify window need a grammar that can step back",
        "leave it out, or serve with --whiflash-router off",
        fine=("xgrammar", "llguidance", "none"),
    ),
)

_ATTENTION = f"{FLAG_ATTENTION} --prefill-attention-backend --decode-attention-backend"

CUDA_REFUSALS: tuple[Refusal, ...] = (
    *_rows(
        f"{_ATTENTION} --speculative-draft-attention-backend",
        "verify windows and blocks have not been tried with it",
        f"leave it out or use {', '.join(CUDA_BACKENDS)}",
        fine=CUDA_BACKENDS,
    ),
)

CPU_REFUSALS: tuple[Refusal, ...] = (
    *_rows("--device", "there is no such accelerator in this machine", "leave it out or say cpu", fine=("cpu",)),
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
        "this CPU platform runs uncompiled: compiling takes minutes and gains nothing here",
        "leave it out",
        fine=(False,),
    ),
)

# What SGLang's parser has for flags of the tables where nobody gives them; the others have nothing, or are switches.
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
    """The table for readers: flags with the same reason and mend share a line."""
    lines = ["| flag | why it is refused | instead |", "|---|---|---|"]
    for (reason, mend, fine), rows in groupby(table, key=lambda row: (row.reason, row.mend, row.fine)):
        flags = ", ".join(f"`{row.flag}`" for row in rows)
        values = [f"`{value}`" for value in fine if value is not False]
        but = f" (but {' and '.join(values)})" if values else ""
        lines.append(f"| {flags}{but} | {reason} | {mend} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(REFUSALS))
    print()
    print(markdown(CPU_REFUSALS))
    print()
    print(markdown(CUDA_REFUSALS))
