"""KV-only ingestion in one launch: norm, K and V of every layer, k-norm, rotary embedding, write to the KV pools.

    made = Ingestion(weight=folded(kv_weight, [hidden_norm.weight]), epsilon=1e-6, pools=(*k_pools, *v_pools))
    ingest(made, (features,), cos_sin, positions, kv_slots)

`reference` is the same in torch and float32; tests compare the kernel with it. Both compute

    x        = the parts, each divided by its root mean square (norm weights are folded into `weight`)
    k, v     = x @ weight.T + bias, for every layer
    k        = rope(k_norm(k)), per head
    pools    = k and v at `kv_slots`

One program computes one head of K or V of one layer, for a block of positions. k-norm and rope need a whole head, so
only the finished entry leaves the program. A head is kept as two halves, because rope rotates element i together with
element i + head_dim / 2. Squares are summed in the same loop as the product; the root mean square then scales the
result instead of the inputs.

Triton compiles a kernel on first launch, once per specialization, which would stall a server for seconds. `warm_up`
launches every combination that can occur (block size, rotary table dtype) with no rows. Nothing else triggers a
specialization: row counts and index tensors are excluded, and parts are made uniform (`readable`).

Tested in Triton's interpreter and compiled for GPUs, but not yet run on one. Its speed is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

HEAD_DIMS = (16, 32, 64, 128, 256)
ALIGNMENT = 16  # bytes; Triton specializes kernels on pointer alignment
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, eq=False)
class Ingestion:
    """Weights of all K and V projections of a drafter, and the KV pools that they write to.

    weight   [2 * layers * kv_heads * head_dim, width], K rows of all layers, then V rows
    bias     [2 * layers * kv_heads * head_dim], optional
    pools    K of every layer, then V of every layer, each [slots, kv_heads, head_dim] and contiguous. Their addresses
             are read once, on first ingestion
    k_norm   [layers, head_dim], RMS norm weight for each head of K, optional
    epsilon  of all norms

    Raises ValueError for an unsupported head_dim or dtype, or mismatched shapes.
    """

    weight: torch.Tensor
    epsilon: float
    pools: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pool = self.pools[0]
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} is not one of {HEAD_DIMS}")
        if not {self.weight.dtype, pool.dtype} <= DTYPES.keys():
            raise ValueError(f"weights in {self.weight.dtype} or KV in {pool.dtype} is not one of {[*DTYPES]}")
        if any(p.shape != pool.shape or p.dtype != pool.dtype or not p.is_contiguous() for p in self.pools):
            raise ValueError("the KV pools must be contiguous, with the same shape and dtype")
        rows = len(self.pools) * self.num_heads * self.head_dim
        if len(self.weight) != rows or not self.weight.is_contiguous():
            raise ValueError(f"the weight must be contiguous with {rows} rows to match the KV pools")
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"the bias must have {rows} entries")
        if self.k_norm is not None and self.k_norm.shape != (self.num_layers, self.head_dim):
            raise ValueError(f"k_norm must be [{self.num_layers}, {self.head_dim}]")

    @property
    def num_layers(self) -> int:
        """Number of the drafter's layers."""
        return len(self.pools) // 2

    @property
    def num_heads(self) -> int:
        """KV heads per layer."""
        return self.pools[0].shape[1]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.pools[0].shape[2]

    @cached_property
    def addresses(self) -> torch.Tensor:
        """The pools' data pointers, int64 [2 * layers]."""
        return torch.tensor([pool.data_ptr() for pool in self.pools], device=self.weight.device)


def folded(weight: torch.Tensor, norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Fold the norms' weights, [width] in total, into `weight` [rows, width].

    Scaling weights instead of features avoids overflow in float16, where features may be large.
    """
    return (weight.float() * torch.cat([norm.float() for norm in norms])).to(weight.dtype)


def reference(
    made: Ingestion,
    parts: Sequence[torch.Tensor],
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    """`ingest` in torch and float32, for tests."""
    x = torch.cat([F.rms_norm(part.float(), part.shape[-1:], eps=made.epsilon) for part in parts], dim=-1)
    kv = F.linear(x, made.weight.float(), None if made.bias is None else made.bias.float())
    kv = kv.view(len(x), 2, made.num_layers, made.num_heads, made.head_dim)
    k, v = kv.unbind(1)  # [n, layers, kv_heads, head_dim]
    if made.k_norm is not None:
        k = F.rms_norm(k, k.shape[-1:], eps=made.epsilon) * made.k_norm.float()[:, None]
    cos, sin = cos_sin[positions].float()[:, None, None].chunk(2, dim=-1)  # [n, 1, 1, head_dim / 2]
    low, high = k.chunk(2, dim=-1)
    k = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    for pool, entries in zip(made.pools, (*k.unbind(1), *v.unbind(1)), strict=True):
        pool[kv_slots] = entries.to(pool.dtype)


def ingest(
    made: Ingestion,
    parts: Sequence[torch.Tensor],
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    """Write K and V of n positions to the pools of every layer, in one launch.

    parts      one or two tensors [n, width / parts], normed separately and concatenated; copied first if they are not
               contiguous or not of the weight's dtype
    cos_sin    [max positions, head_dim], cosines then sines of each position's angles
    positions  [n] int64, contiguous
    kv_slots   [n] int64, contiguous, distinct

    Positions and slots are not bounds-checked, as that would wait for the device. Raises ValueError if the shapes of
    `parts` or `cos_sin` do not fit.
    """
    num_rows, part_width = parts[0].shape
    if len(parts) > 2 or any(part.shape != parts[0].shape for part in parts):
        raise ValueError("expected one or two parts of the same shape")
    if len(parts) * part_width != made.weight.shape[1]:
        raise ValueError(f"{len(parts)} parts of width {part_width} do not match the weight's {made.weight.shape[1]}")
    if cos_sin.shape[1] != made.head_dim or not cos_sin.is_contiguous():
        raise ValueError(f"the rotary table must be contiguous with rows of {made.head_dim} numbers")
    if num_rows > 0:
        launch(made, [readable(part, made.weight.dtype) for part in parts], cos_sin, positions, kv_slots, num_rows)


def readable(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`part` with the given dtype, contiguous and aligned, so that one specialization fits. Usually no copy."""
    part = part.to(dtype).contiguous()
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()


def warm_up(made: Ingestion, num_parts: int, cos_sin: torch.Tensor) -> None:
    """Compile every specialization that ingestion may need, by launches without rows.

    Includes the rotary table in the weight's dtype, as SGLang may convert it on the first forward.
    """
    width = made.weight.shape[1] // num_parts
    parts = [made.weight.new_zeros(1, width) for _ in range(num_parts)]
    index = torch.zeros(1, dtype=torch.int64, device=made.weight.device)
    for dtype in {cos_sin.dtype, made.weight.dtype}:
        table = cos_sin[:1].to(dtype)
        for block_rows in block_sizes(made):
            launch(made, parts, table, index, index, 0, block_rows)


def launch(
    made: Ingestion,
    parts: Sequence[torch.Tensor],
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    num_rows: int,
    block_rows: int | None = None,
) -> None:
    """Launch the kernel for `num_rows` positions, in blocks of `block_rows` (default: chosen by `num_rows`)."""
    constants = constants_of(made, len(parts), block_rows or num_rows)
    blocks = max(1, triton.cdiv(num_rows, constants["BLOCK_ROWS"]))
    ingest_kernel[(len(made.pools) * made.num_heads, blocks)](
        parts[0],
        parts[-1],
        made.weight,
        made.weight if made.bias is None else made.bias,
        made.weight if made.k_norm is None else made.k_norm,
        cos_sin,
        positions,
        kv_slots,
        made.addresses,
        num_rows,
        made.epsilon,
        **constants,
        num_warps=num_warps(made),
    )


def block_sizes(made: Ingestion) -> tuple[int, ...]:
    """Possible positions per program. Tensor cores need at least 16."""
    return (16, 32) if made.weight.dtype == torch.float32 else (16, 32, 64)


def constants_of(made: Ingestion, num_parts: int, num_rows: int) -> dict[str, Any]:
    """The kernel's compile-time constants. Blocks fit into registers and 99 KiB of shared memory."""
    sizes = block_sizes(made)
    is_wide, is_long = made.weight.dtype == torch.float32, made.head_dim > 128
    # Triton's interpreter stores bfloat16 as integers and would multiply those.
    multiplied = torch.float32 if triton.knobs.runtime.interpret else made.weight.dtype
    return {
        "NUM_PARTS": num_parts,
        "PART_WIDTH": made.weight.shape[1] // num_parts,
        "NUM_LAYERS": made.num_layers,
        "NUM_HEADS": made.num_heads,
        "HEAD_DIM": made.head_dim,
        "HAS_BIAS": made.bias is not None,
        "HAS_K_NORM": made.k_norm is not None,
        "STORED": DTYPES[made.pools[0].dtype],
        "MULTIPLIED": DTYPES[multiplied],
        "BLOCK_ROWS": next((size for size in sizes if size >= num_rows), sizes[-1]),
        "BLOCK_COLUMNS": 32 if is_wide or is_long else 64,
    }


def num_warps(made: Ingestion) -> int:
    """Warps per program."""
    return 8 if made.head_dim > 128 else 4


# Do not specialize on arguments that vary by call, to avoid recompiling while serving.
@triton.jit(do_not_specialize=["num_rows", "positions", "kv_slots"])
def ingest_kernel(
    first,  # [n, PART_WIDTH]
    last,  # the second part, or `first`
    weight,  # [2 * NUM_LAYERS * NUM_HEADS * HEAD_DIM, NUM_PARTS * PART_WIDTH]
    bias,
    k_norm,  # [NUM_LAYERS, HEAD_DIM]
    cos_sin,  # [positions, HEAD_DIM]
    positions,
    kv_slots,
    addresses,  # [2 * NUM_LAYERS]
    num_rows,
    epsilon,
    NUM_PARTS: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    STORED: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = NUM_PARTS * PART_WIDTH
    pool = tl.program_id(0) // NUM_HEADS  # K of each layer, then V of each, like the rows of the weight
    head = tl.program_id(0) % NUM_HEADS
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    half = tl.arange(0, HALF)
    outputs = tl.program_id(0).to(tl.int64) * HEAD_DIM + half  # weight rows of the head's first half

    low = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    high = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    for part in tl.static_range(NUM_PARTS):
        if part == 0:
            entries = first + rows[:, None].to(tl.int64) * PART_WIDTH
        else:
            entries = last + rows[:, None].to(tl.int64) * PART_WIDTH
        part_low = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
        part_high = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
        squares = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, PART_WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            is_column = columns < PART_WIDTH
            x = tl.load(entries + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
            w = weight + outputs[None, :] * WIDTH + (part * PART_WIDTH + columns)[:, None]
            w_low = tl.load(w, mask=is_column[:, None], other=0.0).to(MULTIPLIED)
            w_high = tl.load(w + HALF * WIDTH, mask=is_column[:, None], other=0.0).to(MULTIPLIED)
            # "ieee": do not round float32 to TF32, as in torch. No effect on 16-bit types.
            part_low = tl.dot(x.to(MULTIPLIED), w_low, part_low, input_precision="ieee")
            part_high = tl.dot(x.to(MULTIPLIED), w_high, part_high, input_precision="ieee")
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        scale = tl.rsqrt(squares / PART_WIDTH + epsilon)[:, None]
        low += part_low * scale
        high += part_high * scale

    if HAS_BIAS:
        low += tl.load(bias + outputs).to(tl.float32)[None, :]
        high += tl.load(bias + outputs + HALF).to(tl.float32)[None, :]
    if pool < NUM_LAYERS:  # V has neither norm nor rope
        if HAS_K_NORM:
            scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / HEAD_DIM + epsilon)[:, None]
            low *= scale * tl.load(k_norm + pool * HEAD_DIM + half).to(tl.float32)[None, :]
            high *= scale * tl.load(k_norm + pool * HEAD_DIM + HALF + half).to(tl.float32)[None, :]
        angles = cos_sin + tl.load(positions + rows, mask=is_row, other=0)[:, None] * HEAD_DIM + half[None, :]
        cos = tl.load(angles).to(tl.float32)
        sin = tl.load(angles + HALF).to(tl.float32)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned

    slots = tl.load(kv_slots + rows, mask=is_row, other=0)[:, None]
    base = tl.load(addresses + pool).to(tl.pointer_type(STORED))
    out = base + (slots * NUM_HEADS + head) * HEAD_DIM + half[None, :]
    tl.store(out, low.to(STORED), mask=is_row[:, None])
    tl.store(out + HALF, high.to(STORED), mask=is_row[:, None])
