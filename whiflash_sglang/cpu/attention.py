"""Attention on a CPU in plain PyTorch, for all forwards of target and drafters.

    forward            new tokens per request        mask                    metadata
    prefill, chunked   any, after a cached prefix    causal                  RaggedMetadata
    decode             1                             -                       BlockMetadata
    verify             the verify width              causal                  BlockMetadata
    draft block        the block size                none inside the block   BlockMetadata

K/V of new tokens are written to their slots first. Attention then reads prefix and new tokens from the cache, through
the request's slot table. Metadata shared by all layers is computed once, in `init_forward_metadata`. Query heads that
share a K/V head are folded into the query axis, so K and V are never repeated. Except for rounding, a request's result
does not depend on the rest of the batch.

`seq_lens` has two meanings in SGLang: it includes the new tokens for decode and prefill, but not for verify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch.nn.functional import scaled_dot_product_attention

from whiflash_sglang.cpu.metadata import (
    MAX_BLOCK_WIDTH,
    AttentionMetadata,
    BlockMetadata,
    RaggedMetadata,
    block_metadata,
    ragged_metadata,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class CpuAttentionBackend(AttentionBackend):
    """SGLang's backend interface over `attend`, one instance per model runner. Raises ValueError for MLA and
    sliding-window KV pools."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        if model_runner.use_mla_backend or isinstance(model_runner.token_to_kv_pool, SWAKVPool):
            raise ValueError(
                f"{model_runner.model_config.model_path}: multi-head latent attention and hybrid sliding-window caches "
                "have no CPU implementation here; serve a model with plain grouped-query attention"
            )
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.metadata: AttentionMetadata | None = None
        self._checked_layers: set[int] = set()

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Compute the metadata that all layers of the next forward share."""
        self.metadata = None if forward_batch.forward_mode.is_idle() else metadata_of(self.req_to_token, forward_batch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs,
    ) -> torch.Tensor:
        """Attention for q [tokens, q_heads * head_dim], k and v [tokens, kv_heads, head_dim]. Returns q's shape."""
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if id(layer) not in self._checked_layers:
            check_layer(layer, kwargs)
            self._checked_layers.add(id(layer))
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        if save_kv_cache and k is not None:
            k_cache.index_copy_(0, forward_batch.out_cache_loc, k.to(k_cache.dtype))
            v_cache.index_copy_(0, forward_batch.out_cache_loc, v.to(v_cache.dtype))
        output = attend(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k_cache,
            v_cache,
            self.metadata,
            scale=layer.scaling,
            causal=layer.attn_type == AttentionType.DECODER,
            window=layer.sliding_window_size,
        )
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def support_triton(self) -> bool:
        return False


def check_layer(layer: RadixAttention, extra_arguments: dict) -> None:
    """Raise ValueError for attention variants that `attend` would silently ignore."""
    unsupported = {
        "cross attention": layer.is_cross_attention,
        f"logit_cap={layer.logit_cap}": layer.logit_cap > 0,
        "irope": layer.use_irope,
        f"xai_temperature_len={layer.xai_temperature_len}": layer.xai_temperature_len > 0,
        f"attn_type={layer.attn_type.value}": layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL,
        ", ".join(extra_arguments): bool(extra_arguments),
    }
    for name, is_asked in unsupported.items():
        if is_asked:
            raise ValueError(f"attention layer {layer.layer_id} needs {name}, which the CPU backend does not support")


def metadata_of(req_to_token: torch.Tensor, batch: ForwardBatch) -> AttentionMetadata:
    """Metadata for SGLang's batch; see the module docstring for the meanings of `seq_lens`."""
    if batch.forward_mode.is_decode():
        return block_metadata(req_to_token, batch.req_pool_indices, batch.seq_lens - 1, width=1)
    if batch.forward_mode.is_target_verify():
        width, rest = divmod(batch.out_cache_loc.numel(), batch.batch_size)
        if rest:
            raise ValueError(
                f"a verify forward of {batch.batch_size} requests has {batch.out_cache_loc.numel()} tokens; "
                "the CPU backend needs the same number of tokens for every request"
            )
        return block_metadata(req_to_token, batch.req_pool_indices, batch.seq_lens, width)
    new_lens = batch.extend_seq_lens.tolist()
    if len(set(new_lens)) == 1 and new_lens[0] <= MAX_BLOCK_WIDTH:
        return block_metadata(req_to_token, batch.req_pool_indices, batch.extend_prefix_lens, new_lens[0])
    return ragged_metadata(req_to_token, batch.req_pool_indices.tolist(), batch.extend_prefix_lens.tolist(), new_lens)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    causal: bool,
    window: int = -1,
) -> torch.Tensor:
    """Attention of q [tokens, q_heads, head_dim] over caches [slots, kv_heads, head_dim]; [tokens, q_heads, v_dim].

    `window` >= 0 masks entries more than `window` positions before the query.
    """
    if isinstance(metadata, BlockMetadata):
        return _attend_block(q, k_cache, v_cache, metadata, scale, causal, window)
    return _attend_ragged(q, k_cache, v_cache, metadata, scale, causal, window)


def _attend_block(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: BlockMetadata,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    rows, longest = metadata.slots.shape
    kv_heads = k_cache.shape[1]
    groups = q.shape[1] // kv_heads
    slots = metadata.slots.view(-1)
    # [rows, kv_heads, longest, head_dim]
    k = k_cache.index_select(0, slots).view(rows, longest, kv_heads, -1).transpose(1, 2)
    v = v_cache.index_select(0, slots).view(rows, longest, kv_heads, -1).transpose(1, 2)
    # [rows * width, q_heads, dim] -> [rows, kv_heads, groups * width, dim]
    folded = (
        q.view(rows, metadata.width, kv_heads, groups, -1)
        .permute(0, 2, 3, 1, 4)
        .reshape(rows, kv_heads, -1, q.shape[2])
    )
    mask = metadata.mask(q.dtype, causal=causal, window=window, groups=groups)
    output = scaled_dot_product_attention(folded, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale)
    output = output.view(rows, kv_heads, groups, metadata.width, -1).permute(0, 3, 1, 2, 4)
    return output.reshape(q.shape[0], q.shape[1], -1)


def _attend_ragged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: RaggedMetadata,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    outputs = []
    for segment in metadata.segments:
        # [1, kv_heads, entries, head_dim]
        k = k_cache.index_select(0, segment.slots).transpose(0, 1)[None].to(q.dtype)
        v = v_cache.index_select(0, segment.slots).transpose(0, 1)[None].to(q.dtype)
        for chunk in metadata.chunks(segment, causal=causal):
            # From position 0 the kernel's built-in causal mask suffices.
            is_triangle = causal and chunk.first_position == 0 and window < 0
            is_masked = not is_triangle and (causal or window >= 0)
            output = scaled_dot_product_attention(
                q[chunk.rows].transpose(0, 1)[None],
                k[:, :, : chunk.num_entries],
                v[:, :, : chunk.num_entries],
                attn_mask=metadata.mask(q.dtype, chunk, causal=causal, window=window) if is_masked else None,
                is_causal=is_triangle,
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
