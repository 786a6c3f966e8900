"""Faster torch implementations of the layers that dominate a small model's time on a CPU.

SGLang's native versions are written for clarity: a rotary embedding takes about twenty operations, each as expensive as
a small layer's arithmetic. Same results except for rounding:

    RMSNorm            one reduction instead of seven operations
    RotaryEmbedding    query and key rotated together: x * cos + swapped halves * signed sin
    linear layers      weights packed once by oneDNN, if that is faster for the few rows of a verify. On some CPUs the
                       plain call packs them in every forward, on others it is fast. Results differ in the last bit;
                       WHIFLASH_PACK_WEIGHTS=1 or 0 makes the choice fixed instead of measured

Layers with unsupported options, and linear layers of long prompts, use SGLang's version.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.utils import MultiPlatformOp
from torch.nn.functional import linear, rms_norm

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

# The resolved overload: looking it up takes a microsecond, a hundred times per forward.
packed_linear = torch.ops.mkldnn._linear_pointwise.default

# Packing keeps a second copy, so only weights up to this size (64 MB in float32) are packed.
MAX_PACKED_WEIGHT = 16 * 1024 * 1024

PACK_WEIGHTS = "WHIFLASH_PACK_WEIGHTS"  # environment variable: "1" always, "0" never, else whichever is faster

# With more rows the packing overhead is negligible. oneDNN also compiles a kernel for each number of rows.
MAX_PACKED_ROWS = 64


def register(dispatch_key: str) -> None:
    """Make layers built from now on use these implementations; `dispatch_key` is the platform's."""
    MultiPlatformOp.register_oot_forward(RMSNorm, norm_forward, dispatch_key)
    MultiPlatformOp.register_oot_forward(RotaryEmbedding, rotary_forward, dispatch_key)


def norm_forward(
    layer: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of x [..., hidden_size]; with `residual`, returns (norm of the sum, sum)."""
    is_plain = not (layer.cast_x_before_out_mul or layer.fp32_residual or layer.override_orig_dtype)
    if not is_plain or layer.variance_size_override is not None or post_residual_addition is not None:
        return layer.forward_native(x, residual, post_residual_addition)
    if residual is None:
        return rms(x, layer.weight, layer.variance_epsilon)
    if x.dtype == torch.float32:
        total = rounded = x + residual
    else:
        total = x.to(torch.float32) + residual.to(torch.float32)
        rounded = total.to(x.dtype)
    return rms(total, layer.weight.to(total.dtype), layer.variance_epsilon).to(x.dtype), rounded


def rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension of x [..., n]."""
    if x.dtype != torch.float32:
        return rms_norm(x, (x.shape[-1],), weight, epsilon)
    # hypot(a, b) = sqrt(a^2 + b^2) adds epsilon without a separate operation.
    per_entry, floor = norm_constants(x.shape[-1], epsilon)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(per_entry).hypot_(floor)
    return x.div(size).mul_(weight)


@cache
def norm_constants(n: int, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / sqrt(n) and sqrt(epsilon) as tensors, which avoids converting Python numbers in every call."""
    return torch.tensor(1 / math.sqrt(n)), torch.tensor(math.sqrt(epsilon))


def rotary_forward(
    layer: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query [tokens, q_heads * head_size] and key [tokens, kv_heads * head_size] to their positions [tokens]."""
    is_plain = layer.is_neox_style and layer.rotary_dim == layer.head_size and query.ndim == key.ndim == 2
    if not is_plain or offsets is not None or layer.cos_sin_cache.dtype != query.dtype:
        return layer.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    rows = rotary_table(layer).index_select(0, positions.flatten())  # [tokens, 2, head_size]
    heads = torch.cat((query, key), dim=-1).view(rows.shape[0], -1, layer.head_size)
    swapped = heads.roll(layer.head_size // 2, dims=-1)
    rotated = torch.addcmul(heads * rows[:, :1], swapped, rows[:, 1:]).flatten(1)
    return rotated[:, : query.shape[1]], rotated[:, query.shape[1] :]


def rotary_table(layer: RotaryEmbedding) -> torch.Tensor:
    """[positions, 2, head_size]: (cos, cos) and (-sin, sin), cached on the layer."""
    table = layer.__dict__.get("whiflash_table")
    # SGLang extends its table for longer contexts.
    if table is None or table.shape[0] != layer.cos_sin_cache.shape[0]:
        cos, sin = layer.cos_sin_cache.chunk(2, dim=-1)
        table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)
        layer.__dict__["whiflash_table"] = table
    return table


def pack_weight(result: None, method: UnquantizedLinearMethod | None, layer: torch.nn.Module) -> None:
    """Hook after loading a linear layer: keep a packed copy of its weight if that is faster."""
    weight = layer.weight.data
    if weight.ndim == 2 and weight.numel() <= MAX_PACKED_WEIGHT and weight.dtype in packable_types():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        if packing_pays(weight, packed):
            layer.__dict__["whiflash_packed"] = packed


@cache
def packable_types() -> tuple[torch.dtype, ...]:
    """Dtypes that oneDNN can pack on this CPU: bfloat16 needs AVX-512 or similar."""
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


def packing_pays(weight: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether packed weights are faster on this CPU for 1 and 8 rows. Measured once per shape, unless
    WHIFLASH_PACK_WEIGHTS decides."""
    if (fixed := os.environ.get(PACK_WEIGHTS)) in ("0", "1"):
        return fixed == "1"
    key = (tuple(weight.shape), weight.dtype)
    if key not in _packing_pays:
        inputs = [torch.zeros(rows, weight.shape[1], dtype=weight.dtype) for rows in (1, 8)]
        with torch.inference_mode():
            plain = sum(quickest(partial(linear, x, weight)) for x in inputs)
            faster = sum(quickest(partial(packed_linear, x, packed, None, "none", [], "")) for x in inputs)
        _packing_pays[key] = faster < 0.9 * plain
    return _packing_pays[key]


_packing_pays: dict[tuple[tuple[int, ...], torch.dtype], bool] = {}


def quickest(call: Callable[[], object], batches: int = 7, calls: int = 10) -> float:
    """Seconds per call in the fastest of several batches, to exclude disturbance by other processes."""
    times = []
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def pack_again(result: object, updater: WeightUpdater, *args: object) -> None:
    """Hook after weights were overwritten in place while serving: pack them again."""
    for layer in updater.get_model().modules():
        if "whiflash_packed" in layer.__dict__:
            pack_weight(None, None, layer)


def linear_forward(
    method: UnquantizedLinearMethod,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [rows, input] @ weight.T + bias: [rows, output]."""
    packed = layer.__dict__.get("whiflash_packed")
    if packed is None or x.ndim != 2 or x.shape[0] > MAX_PACKED_ROWS or x.dtype != layer.weight.dtype:
        return linear(x, layer.weight, bias)
    return packed_linear(x, packed, bias, "none", [], "")
