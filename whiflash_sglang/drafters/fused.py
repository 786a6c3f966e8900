"""Ingestion by one kernel instead of a dozen operations: on a GPU, where a drafter is one that the kernel can serve.

`write_entries` chooses once, when a drafter is made, and has the kernel compiled then. On a CPU, and where something is
lacking, which the log then says, the drafter's own torch operations write its entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from whiflash_sglang.drafters.runner import DraftRunner

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)

WriteEntries = Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor], None]
"""Write K and V of `parts`, each [n, width], for positions [n], at KV slots [n]."""


class KVProjection(NamedTuple):
    """What a drafter makes K and V of all its layers with."""

    layers: Sequence[Any]  # attention of each layer
    weight: torch.Tensor  # [2 * layers * kv_size, width], the K of all layers, then the V of all
    bias: torch.Tensor | None  # [2 * layers * kv_size]
    norms: Sequence[Any]  # of each part of the input: DFlash's features, or EAGLE-3's embeddings and features
    epsilon: float  # of these and of the K norm: SGLang gives all norms of a model the checkpoint's one
    k_norm: torch.Tensor | None = None  # [layers, head_dim]


def write_entries(runner: DraftRunner, kv: KVProjection) -> WriteEntries | None:
    """What writes a drafter's entries in one launch, from parts to which `kv.norms` have not been applied.

    None: the drafter has to write them itself.
    """
    if runner.device.type not in DEVICES:
        return None
    # Here, as a server on a CPU never needs Triton.
    from whiflash_sglang.drafters.ingest_kernel import Ingestion, folded, ingest, warm_up

    pool, rotary = runner.worker.model_runner.token_to_kv_pool, kv.layers[0].rotary_emb
    reason = lacking(runner, kv, pool, rotary)
    if reason is not None:
        logger.warning("WHIFLASH: drafter %s ingests without the fused kernel: %s", runner.spec.kind, reason)
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
        # The table is read anew each time: SGLang replaces it by a longer one where a longer context needs it.
        ingest(made, parts, rotary.cos_sin_cache, positions, kv_slots)

    return write


def lacking(runner: DraftRunner, kv: KVProjection, pool: Any, rotary: Any) -> str | None:
    """What the kernel would have to know and does not."""
    from whiflash_sglang.drafters.ingest_kernel import DTYPES, HEAD_DIMS

    head_dim = runner.spec.head_dim
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is none of {HEAD_DIMS}"
    if type(pool) is not MHATokenToKVPool:  # others may translate slots
        return f"its KV pool is a {type(pool).__name__}"
    if pool.is_quantized_kv_cache or pool.dtype not in DTYPES or pool.kv_cache_layout != "nhd":
        return f"its KV is stored as {pool.dtype}, quantized or in layout {pool.kv_cache_layout}"
    if any(layer.attn.k_scale is not None or layer.attn.v_scale is not None for layer in kv.layers):
        return "K and V are scaled"
    # Subclasses that only fill the table in another way (YaRN, Llama 3) turn heads as this class does.
    kind = type(rotary)
    is_plain = isinstance(rotary, RotaryEmbedding) and kind.forward is RotaryEmbedding.forward
    is_plain = is_plain and kind.forward_cuda is RotaryEmbedding.forward_cuda
    is_plain = is_plain and kind.forward_native is RotaryEmbedding.forward_native
    if not is_plain or not rotary.is_neox_style or rotary.rotary_dim != head_dim:
        return f"the rotary embedding ({kind.__name__}) does not turn the halves of a whole head"
    return None
