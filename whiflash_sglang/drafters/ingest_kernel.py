"""KV-only ingestion in one launch: norm, K and V of every layer, k-norm, rotary embedding, and the KV pools.

    made = Ingestion(weight=folded(kv_weight, [hidden_norm.weight]), epsilon=1e-6, pools=(*k_pools, *v_pools))
    ingest(made, (features,), cos_sin, positions, kv_slots)

`reference` does the same in torch, in float32, and is what tests hold the kernel to. Both compute

    x        = the parts, each divided by its root mean square (their norms' weights are folded into `weight`)
    k, v     = x @ weight.T + bias, of every layer
    k        = rope(k_norm(k)), head by head
    pools    = k and v at `kv_slots`

One program makes one head of K or V of one layer, for a block of positions. A head is what k-norm and rope need at
once, so that nothing but the finished entry leaves the program. It is kept as two halves, because rope turns number i
of a head together with number i + head_dim / 2. The square of a part is summed up while its columns pass by for the
product; the root mean square then scales the sum of products, not each of the factors.

Triton compiles a kernel when it is first launched, anew for every combination of what it specializes on, and a server
would stall for seconds. `warm_up` launches every combination that can occur, with nothing to write: block sizes and
types of the rotary table. What else could differ from call to call does not reach the kernel: it is not specialized on
numbers of rows and on index tensors, and parts are made alike before (`readable`).

It has been run in Triton's interpreter and compiled for GPUs, and not been run on one: nothing is known of its speed.
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
ALIGNMENT = 16  # bytes; Triton compiles a kernel of its own for tensors that begin elsewhere
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, eq=False)
class Ingestion:
    """What K and V of all layers of a drafter are made with, and where they go.

    `weight` [2 * layers * kv_heads * head_dim, width]: the K rows of all layers, then the V rows; `bias` likewise.
    `pools`, each [slots, kv_heads, head_dim] and contiguous: K of every layer, then V of every layer. They are written
    at the addresses that they have when the first entries are ingested. `k_norm` [layers, head_dim] is the weight of
    an RMS norm of each head of K. `epsilon` is that of all norms.

    Raises ValueError for a head_dim or dtype that the kernel does not have, or shapes that do not fit each other.
    """

    weight: torch.Tensor
    epsilon: float
    pools: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pool = self.pools[0]
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} is none of {HEAD_DIMS}")
        if not {self.weight.dtype, pool.dtype} <= DTYPES.keys():
            raise ValueError(f"weights in {self.weight.dtype} or KV in {pool.dtype} is none of {[*DTYPES]}")
        if any(p.shape != pool.shape or p.dtype != pool.dtype or not p.is_contiguous() for p in self.pools):
            raise ValueError("the KV pools are not all contiguous and alike")
        rows = len(self.pools) * self.num_heads * self.head_dim
        if len(self.weight) != rows or not self.weight.is_contiguous():
            raise ValueError(f"the weight is not contiguous with {rows} rows, as the KV pools ask for")
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"the bias does not have {rows} entries")
        if self.k_norm is not None and self.k_norm.shape != (self.num_layers, self.head_dim):
            raise ValueError(f"k_norm is not [{self.num_layers}, {self.head_dim}]")

    @property
    def num_layers(self) -> int:
        return len(self.pools) // 2

    @property
    def num_heads(self) -> int:
        return self.pools[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.pools[0].shape[2]

    @cached_property
    def addresses(self) -> torch.Tensor:
        """Where each pool begins, int64 [2 * layers]."""
        return torch.tensor([pool.data_ptr() for pool in self.pools], device=self.weight.device)


def folded(weight: torch.Tensor, norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """`weight` [rows, width] for inputs whose norms' weights, [width] together, have not been applied.

    Features themselves may be large in float16, their products with a norm's weight larger; those of weights are not.
    """
    return (weight.float() * torch.cat([norm.float() for norm in norms])).to(weight.dtype)


def reference(
    made: Ingestion,
    parts: Sequence[torch.Tensor],
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    """What `ingest` does, in torch and in float32."""
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

    `parts` are one or two tensors [n, width / parts], each normed by itself; they are read side by side, and multiplied
    in the weight's dtype. They are copied first where they are of another, or not back to back. `cos_sin` [positions,
    head_dim] holds cosines, then sines, of each position's angles. `positions` [n] and `kv_slots` [n] are int64 and
    contiguous; no two of the slots may be equal. Neither is checked against the table or the pools: that would wait for
    the device.

    Raises ValueError for parts that do not fit the weight, and a table whose rows are not of head_dim numbers.
    """
    num_rows, part_width = parts[0].shape
    if len(parts) > 2 or any(part.shape != parts[0].shape for part in parts):
        raise ValueError("at most two parts of the same shape are ingested")
    if len(parts) * part_width != made.weight.shape[1]:
        raise ValueError(f"{len(parts)} parts of width {part_width} do not make up the weight's {made.weight.shape[1]}")
    if cos_sin.shape[1] != made.head_dim or not cos_sin.is_contiguous():
        raise ValueError(f"the rotary table is not contiguous with rows of {made.head_dim} numbers")
    if num_rows > 0:
        launch(made, [readable(part, made.weight.dtype) for part in parts], cos_sin, positions, kv_slots, num_rows)


def readable(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`part` as all parts are that the kernel sees, so that one kernel reads them all: the same tensor, as a rule."""
    part = part.to(dtype).contiguous()
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()


def warm_up(made: Ingestion, num_parts: int, cos_sin: torch.Tensor) -> None:
    """Have every kernel compiled that ingestion may need, by launches with no rows, which write nothing.

    SGLang may turn the rotary table into the model's type when a model first runs.
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
    """Launch the kernel for `num_rows` positions, in blocks of `block_rows`; None: of what suits them."""
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
    """Positions that one program may have. 16 are the least that tensor cores multiply."""
    return (16, 32) if made.weight.dtype == torch.float32 else (16, 32, 64)


def constants_of(made: Ingestion, num_parts: int, num_rows: int) -> dict[str, Any]:
    """What the kernel is compiled for. Blocks are small enough for registers, and for 99 KiB of shared memory."""
    sizes = block_sizes(made)
    is_wide, is_long = made.weight.dtype == torch.float32, made.head_dim > 128
    # Triton's interpreter keeps bfloat16 as integers, and would multiply these.
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
    return 8 if made.head_dim > 128 else 4


# Not specialized on what differs from call to call, or it would be compiled anew while serving.
@triton.jit(do_not_specialize=["num_rows", "positions", "kv_slots"])
def ingest_kernel(
    first,  # [n, PART_WIDTH]
    last,  # the second part, or the first again
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
    pool = tl.program_id(0) // NUM_HEADS  # K of each layer, then V of each, as the rows of the weight
    head = tl.program_id(0) % NUM_HEADS
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    half = tl.arange(0, HALF)
    outputs = tl.program_id(0).to(tl.int64) * HEAD_DIM + half  # rows of the weight for the head's first half

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
            # "ieee": float32 is not to be rounded to TF32, as torch does not either. Of no effect on shorter types.
            part_low = tl.dot(x.to(MULTIPLIED), w_low, part_low, input_precision="ieee")
            part_high = tl.dot(x.to(MULTIPLIED), w_high, part_high, input_precision="ieee")
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        scale = tl.rsqrt(squares / PART_WIDTH + epsilon)[:, None]
        low += part_low * scale
        high += part_high * scale

    if HAS_BIAS:
        low += tl.load(bias + outputs).to(tl.float32)[None, :]
        high += tl.load(bias + outputs + HALF).to(tl.float32)[None, :]
    if pool < NUM_LAYERS:  # V is neither normed nor turned
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
