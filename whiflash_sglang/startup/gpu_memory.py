"""GPU checks before anything is loaded: supported attention backend and head sizes, and room for all KV pools.

Pure functions of sizes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.core.errors import CheckpointError, ConfigError
from whiflash_sglang.startup.checkpoints import DRAFTER_FLAGS, FLAG_TARGET, DrafterSpec, TargetSpec
from whiflash_sglang.startup.config import FLAG_DRAFTERS
from whiflash_sglang.startup.refused_flags import CUDA_BACKENDS, FLAG_ATTENTION

HEAD_SIZES: Mapping[str, Sequence[int]] = {
    "triton": range(16, 257),
    "flashinfer": (64, 128, 256),
    "fa3": range(8, 257, 8),
}
"""Head sizes that each attention backend has kernels for."""

FLAG_FRACTION = "--mem-fraction-static"
FLAG_POOL = "--max-total-tokens"
FLAG_RUNNING = "--max-running-requests"
FLAG_GRAPHS = "--cuda-graph-max-bs"
MAX_RUNNING = 48  # default number of requests, as for SGLang's DFLASH; rings and graphs grow with it
GIB = 2**30


_DEVICES = ("nvidia*", "kfd", "dri/render*", "dxg", "accel*", "davinci*", "habanalabs*")


def surely_none() -> bool:
    """Whether this machine has no accelerator, judged without torch by device files. False if SGLang's own CPU engine
    is requested (see `cpu.activate`)."""
    own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    return not own_engine and sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DEVICES)


def check_attention(backends: Iterable[str], target: TargetSpec, drafters: Iterable[DrafterSpec]) -> None:
    """Raise ConfigError for an unsupported attention backend, CheckpointError for a head size without a kernel."""
    specs = list(drafters)
    heads = [(FLAG_TARGET, target.path, target.head_dim)]
    heads += [(DRAFTER_FLAGS[spec.kind], spec.path, spec.head_dim) for spec in specs]
    for backend in backends:
        if backend not in CUDA_BACKENDS:
            problem = "verify windows and blocks have not been tested with it"
            raise ConfigError(FLAG_ATTENTION, backend, problem, f"use {' or '.join(CUDA_BACKENDS)}")
        for flag, path, size in heads:
            if size not in HEAD_SIZES[backend]:
                others = [name for name in CUDA_BACKENDS if size in HEAD_SIZES[name]]
                fix = f"use {FLAG_ATTENTION} {' or '.join(others)}" if others else "serve another model"
                raise CheckpointError(flag, path, f"head size {size} is not supported by {backend}", fix)


class Memory(NamedTuple):
    """Device memory for weights and KV, as SGLang accounts for it."""

    total: int  # bytes
    fraction: float  # share of `total` for weights and KV
    weights: int  # bytes, target and drafters


def kv_bytes(spec: TargetSpec | DrafterSpec, element_size: int, num_ranks: int = 1) -> int:
    """Bytes of K and V per token on one of `num_ranks` ranks. Every rank holds at least one KV head."""
    return 2 * spec.num_layers * max(1, spec.num_kv_heads // num_ranks) * spec.head_dim * element_size


def check_room(memory: Memory, token_bytes: int, num_tokens: int) -> None:
    """Raise ConfigError if KV of `num_tokens` tokens (`token_bytes` each, over all pools) and the weights do not
    fit."""
    room = int(memory.total * memory.fraction) - memory.weights
    needed = num_tokens * token_bytes
    if needed > room:
        problem = (
            f"of {memory.total / GIB:.1f} GiB, {max(0, room) / GIB:.2f} are left after the weights of target and "
            f"drafters ({memory.weights / GIB:.1f}), but one window of KV in every pool takes {needed / GIB:.2f}"
        )
        fix = f"raise it, load one drafter ({FLAG_DRAFTERS} df or e3), or use --tp-size"
        raise ConfigError(FLAG_FRACTION, memory.fraction, problem, fix)


class Need(NamedTuple):
    """GPU memory needed in addition to weights and the target's KV."""

    what: str
    size: int  # bytes
    flag: str  # `size` is proportional to this flag's value
    value: int


def ring_bytes(num_requests: int, backlog: int, feature_bytes: int) -> int:
    """Bytes of the backlog ring: features (`feature_bytes` per token, all captured layers) and token ids."""
    return num_requests * backlog * (feature_bytes + 8)


def graph_bytes(
    sizes: Sequence[int],
    widths: Iterable[int],
    draft_widths: Iterable[int],
    features: int,
    vocab_size: int,
    context: int,
) -> int:
    """Lower bound of the bytes that CUDA graphs for batch `sizes` keep: outputs of the verify `widths` (`features`
    bytes per position), one logits buffer, and per width the KV indices of requests with `context` tokens."""
    if not sizes:
        return 0
    verified, largest = [*widths], max(sizes)
    outputs = sum(sizes) * sum(verified) * features
    logits = largest * max(verified) * vocab_size * 4
    return outputs + logits + largest * (sum(verified) + sum(draft_widths)) * context * 8


def check_needs(free: int, needs: Sequence[Need]) -> None:
    """Raise ConfigError, naming the flag of the largest need, if `needs` do not fit into `free` bytes.

    SGLang's estimate of the target's pool ignores second drafters, rings and multiple graph widths. If it is too high,
    allocation would fail with a bare out-of-memory error.
    """
    needed = sum(need.size for need in needs)
    if needed <= free:
        return
    most = max(needs, key=lambda need: need.size)
    fits = most.value * (free - needed + most.size) // most.size
    takes = ", ".join(f"{need.what} {need.size / GIB:.2f}" for need in needs if need.size)
    problem = f"{free / GIB:.2f} GiB are left after weights and the target's KV, but these take: {takes}"
    give = f"give {most.flag} {fits} or less, or " if fits > 0 else ""
    raise ConfigError(
        most.flag, most.value, problem, f"{give}lower {FLAG_FRACTION}, or load one drafter ({FLAG_DRAFTERS} df or e3)"
    )
