"""What a GPU must be able to do before anything is loaded on it: run the attention that rounds are made of, at the
models' head sizes, and hold the target's KV beside a pool for every drafter. Pure: sizes in, refusals out.
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
from whiflash_sglang.startup.refusals import CUDA_BACKENDS, FLAG_ATTENTION

HEAD_SIZES: Mapping[str, Sequence[int]] = {
    "triton": range(16, 257),
    "flashinfer": (64, 128, 256),
    "fa3": range(8, 257, 8),
}
"""What each attention backend has kernels for."""

FLAG_FRACTION = "--mem-fraction-static"
FLAG_POOL = "--max-total-tokens"
FLAG_RUNNING = "--max-running-requests"
FLAG_GRAPHS = "--cuda-graph-max-bs"
MAX_RUNNING = 48  # requests where nothing is said, as with SGLang's own DFLASH: rings and graphs grow with them
GIB = 2**30


_DEVICES = ("nvidia*", "kfd", "dri/render*", "dxg", "accel*", "davinci*", "habanalabs*")


def surely_none() -> bool:
    """Whether this machine has no accelerator, as far as that is known without torch: no device file of any, and
    SGLang's own CPU engine (see `cpu.activate`) was not asked for."""
    own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    return not own_engine and sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DEVICES)


def check_attention(backends: Iterable[str], target: TargetSpec, drafters: Iterable[DrafterSpec]) -> None:
    """Refuse an attention backend that rounds are not made for (ConfigError), and a model with heads of a size that it
    has no kernel for (CheckpointError)."""
    specs = list(drafters)
    heads = [(FLAG_TARGET, target.path, target.head_dim)]
    heads += [(DRAFTER_FLAGS[spec.kind], spec.path, spec.head_dim) for spec in specs]
    for backend in backends:
        if backend not in CUDA_BACKENDS:
            problem = "verify windows and blocks have not been tried with it"
            raise ConfigError(FLAG_ATTENTION, backend, problem, f"use {' or '.join(CUDA_BACKENDS)}")
        for flag, path, size in heads:
            if size not in HEAD_SIZES[backend]:
                others = [name for name in CUDA_BACKENDS if size in HEAD_SIZES[name]]
                mend = f"use {FLAG_ATTENTION} {' or '.join(others)}" if others else "serve another model"
                raise CheckpointError(flag, path, f"its heads of size {size} are none that {backend} has", mend)


class Memory(NamedTuple):
    """What KV has to be held in, by SGLang's reckoning."""

    total: int  # bytes of the device
    fraction: float  # of it, for weights and KV
    weights: int  # bytes, of target and drafters


def kv_bytes(spec: TargetSpec | DrafterSpec, element_size: int, num_ranks: int = 1) -> int:
    """Bytes of K and V of one token; each of `num_ranks` processes holds a part of the heads, or one at least."""
    return 2 * spec.num_layers * max(1, spec.num_kv_heads // num_ranks) * spec.head_dim * element_size


def check_room(memory: Memory, token_bytes: int, num_tokens: int) -> None:
    """Refuse where KV of `num_tokens` tokens, of `token_bytes` in all pools, does not fit beside the weights."""
    room = int(memory.total * memory.fraction) - memory.weights
    needed = num_tokens * token_bytes
    if needed > room:
        problem = (
            f"of {memory.total / GIB:.1f} GiB that leaves {max(0, room) / GIB:.2f} beside the weights of target and "
            f"drafters ({memory.weights / GIB:.1f}), and one window of KV in every pool takes {needed / GIB:.2f}"
        )
        mend = f"raise it, load one drafter ({FLAG_DRAFTERS} df or e3), or use --tp-size"
        raise ConfigError(FLAG_FRACTION, memory.fraction, problem, mend)


class Need(NamedTuple):
    """What takes memory of a GPU besides weights and the target's KV."""

    what: str
    size: int  # bytes
    flag: str  # which says how much of it there is, in proportion
    value: int


def ring_bytes(num_requests: int, backlog: int, feature_bytes: int) -> int:
    """Bytes of the features (`feature_bytes` each, of all captured layers) and tokens that wait for drafters."""
    return num_requests * backlog * (feature_bytes + 8)


def graph_bytes(
    sizes: Sequence[int],
    widths: Iterable[int],
    draft_widths: Iterable[int],
    features: int,
    vocab_size: int,
    context: int,
) -> int:
    """Bytes that CUDA graphs keep at least, for batches of `sizes`: of verify `widths` the outputs, `features` bytes a
    position, and one buffer of logits; of every width KV indices for requests of `context` tokens."""
    if not sizes:
        return 0
    verified, largest = [*widths], max(sizes)
    outputs = sum(sizes) * sum(verified) * features
    logits = largest * max(verified) * vocab_size * 4
    return outputs + logits + largest * (sum(verified) + sum(draft_widths)) * context * 8


def check_needs(free: int, needs: Sequence[Need]) -> None:
    """Refuse where `needs` do not fit into `free` bytes, with the flag of the largest.

    SGLang sizes the target's pool by its own estimate, which knows neither two drafters nor rings nor several widths of
    graphs. Where that was too high, allocating would fail with a message about tensors.
    """
    needed = sum(need.size for need in needs)
    if needed <= free:
        return
    most = max(needs, key=lambda need: need.size)
    fits = most.value * (free - needed + most.size) // most.size
    takes = ", ".join(f"{need.what} {need.size / GIB:.2f}" for need in needs if need.size)
    problem = f"besides weights and the target's KV there is room for {free / GIB:.2f} GiB, and these take: {takes}"
    give = f"give {most.flag} {fits} or less, or " if fits > 0 else ""
    raise ConfigError(
        most.flag, most.value, problem, f"{give}lower {FLAG_FRACTION}, or load one drafter ({FLAG_DRAFTERS} df or e3)"
    )
