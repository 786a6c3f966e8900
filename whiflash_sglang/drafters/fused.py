"""Ingestion with one fused kernel instead of a dozen operations, on a GPU and for supported drafters.

`write_entries` decides once, when a drafter is created, and compiles the kernel. Otherwise the drafter falls back to
torch operations; on a GPU a warning gives the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from whiflash_sglang.drafters.runner import DraftRunner

if TYPE_CHECKING:
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.models.dflash import DFlashAttention
    from sglang.srt.models.llama import LlamaAttention

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)

WriteEntries = Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor], None]
"""Write K and V of `parts`, each [n, width], for positions [n], at KV slots [n]."""


class KVProjection(NamedTuple):
    """A drafter's K and V projections of all layers."""

    layers: Sequence[DFlashAttention | LlamaAttention]  # attention of each layer
    weight: torch.Tensor  # [2 * layers * kv_size, width], K of all layers, then V of all layers
    bias: torch.Tensor | None  # [2 * layers * kv_size]
    norms: Sequence[RMSNorm]  # per input part: DFlash's features, or EAGLE-3's embeddings and features
    epsilon: float  # of all norms; a checkpoint has one value
    k_norm: torch.Tensor | None = None  # [layers, head_dim]


def write_entries(runner: DraftRunner, kv: KVProjection) -> WriteEntries | None:
    """A function that writes entries in one launch, from parts before `kv.norms`. None if the kernel does not support
    this drafter or device."""
    if runner.device.type not in DEVICES:
        return None
    # Lazy: a CPU server does not need Triton.
    from whiflash_sglang.drafters.ingest_kernel import Ingestion, folded, ingest, warm_up

    pool: MHATokenToKVPool = runner.worker.model_runner.token_to_kv_pool
    rotary = kv.layers[0].rotary_emb
    reason = lacking(runner, kv, pool, rotary)
    if reason is not None:
        logger.warning("WHIFLASH: drafter %s does not use the fused ingestion kernel: %s", runner.spec.kind, reason)
        return None
    k_pools, v_pools = zip(*(pool.get_kv_buffer(layer.attn.layer_id) for layer in kv.layers), strict=True)
    made = Ingestion(
        weight=folded(kv.weight, [norm.weight for norm in kv.norms]),
        epsilon=kv.epsilon,
        pools=(*k_pools, *v_pools),
        bias=kv.bias,
        k_norm=kv.k_norm,
    )
    warm_up(made, len(kv.norms), rotary.cos_sin_cache)

    def write(parts: Sequence[torch.Tensor], positions: torch.Tensor, kv_slots: torch.Tensor) -> None:
        # Read the table on every call: SGLang replaces it when a longer context needs a longer one.
        ingest(made, parts, rotary.cos_sin_cache, positions, kv_slots)

    return write


def lacking(runner: DraftRunner, kv: KVProjection, pool: MHATokenToKVPool, rotary: RotaryEmbedding) -> str | None:
    """The reason why the kernel does not support this drafter, or None."""
    from whiflash_sglang.drafters.ingest_kernel import DTYPES, HEAD_DIMS

    head_dim = runner.spec.head_dim
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {HEAD_DIMS}"
    if type(pool) is not MHATokenToKVPool:  # subclasses may translate slots
        return f"its KV pool is a {type(pool).__name__}"
    if pool.is_quantized_kv_cache or pool.dtype not in DTYPES or pool.kv_cache_layout != "nhd":
        return f"its KV is stored as {pool.dtype}, quantized or in layout {pool.kv_cache_layout}"
    if any(layer.attn.k_scale is not None or layer.attn.v_scale is not None for layer in kv.layers):
        return "K and V are scaled"
    # Subclasses that only fill the table differently (YaRN, Llama 3) are supported.
    kind = type(rotary)
    is_plain = isinstance(rotary, RotaryEmbedding) and kind.forward is RotaryEmbedding.forward
    is_plain = is_plain and kind.forward_cuda is RotaryEmbedding.forward_cuda
    is_plain = is_plain and kind.forward_native is RotaryEmbedding.forward_native
    if not is_plain or not rotary.is_neox_style or rotary.rotary_dim != head_dim:
        return f"the rotary embedding ({kind.__name__}) does not rotate the halves of a whole head"
    return None
