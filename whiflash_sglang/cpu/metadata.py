"""Metadata shared by the attention calls of one forward: slots and masks.

Two kinds of batches:

    BlockMetadata   every request has the same few new tokens: decode (1), verify and draft block (the width). K and V
                    of all requests are gathered with one padded index, in one call per batch.
    RaggedMetadata  prompts of different lengths: one call per request, long prompts in chunks of queries.

Lengths: a request with a prefix of P tokens (K/V already cached) and W new tokens reads P + W entries; its new token i
is at position P + i. Example, P = 3, W = 2, causal: query 0 sees entries 0..3, query 1 sees 0..4; non-causal: both see
0..4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

# Wider blocks are treated as prompts: padding them to the longest request would waste more than it saves.
MAX_BLOCK_WIDTH = 64

# Queries per chunk of a prompt. Bounds masks to this times the context.
QUERY_CHUNK = 512

# Masks up to this many entries (32 MB in float32) are kept across layers; larger ones are rebuilt.
MAX_KEPT_MASK = 8 * 1024 * 1024

MaskKey = tuple


@dataclass(frozen=True)
class BlockMetadata:
    """One padded gather for the whole batch.

    Padding repeats the request's own last slot, which holds finite values and is masked. (An unused slot could hold
    NaN, which survives a weight of zero.)
    """

    width: int
    slots: torch.Tensor  # [rows, longest], int64
    prefix_lens: torch.Tensor  # [rows, 1, 1], int64
    is_padded: bool
    masks: dict[MaskKey, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Number of requests."""
        return self.slots.shape[0]

    def mask(self, dtype: torch.dtype, *, causal: bool, window: int, groups: int) -> torch.Tensor | None:
        """Additive mask [rows, 1, groups * width, longest], or None if every query sees every entry."""
        key = (dtype, causal, window, groups)
        if key not in self.masks:
            self.masks[key] = self._build_mask(dtype, causal=causal, window=window, groups=groups)
        return self.masks[key]

    def _build_mask(self, dtype: torch.dtype, *, causal: bool, window: int, groups: int) -> torch.Tensor | None:
        if not self.is_padded and window < 0 and (self.width == 1 or not causal):
            return None
        entries = torch.arange(self.slots.shape[1])
        positions = self.prefix_lens + torch.arange(self.width)[:, None]  # [rows, width, 1]
        last_visible = positions if causal else self.prefix_lens + self.width - 1
        hidden = entries > last_visible
        if window >= 0:
            hidden = hidden | (entries < positions - window)
        mask = additive(hidden.expand(self.num_rows, self.width, -1), dtype)
        return mask.repeat(1, groups, 1)[:, None]


@dataclass(frozen=True)
class PromptSegment:
    """One request of a prefill; its new tokens are rows `start` to `end` of the batch."""

    start: int
    end: int
    prefix_len: int
    slots: torch.Tensor  # [prefix_len + end - start], int64


@dataclass(frozen=True)
class QueryChunk:
    """Consecutive queries of a segment, and the number of entries that they can see."""

    rows: slice
    first_position: int
    num_entries: int

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class RaggedMetadata:
    """Requests of different lengths, one segment each."""

    segments: tuple[PromptSegment, ...]
    masks: dict[MaskKey, torch.Tensor] = field(default_factory=dict, repr=False)

    def chunks(self, segment: PromptSegment, *, causal: bool) -> Iterator[QueryChunk]:
        """Split a segment into chunks of `QUERY_CHUNK` queries."""
        for start in range(segment.start, segment.end, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, segment.end)
            first_position = segment.prefix_len + start - segment.start
            last_entry = first_position + end - start if causal else segment.slots.shape[0]
            yield QueryChunk(slice(start, end), first_position, last_entry)

    def mask(self, dtype: torch.dtype, chunk: QueryChunk, *, causal: bool, window: int) -> torch.Tensor:
        """Additive mask [queries, entries]."""
        key = (dtype, chunk.first_position, chunk.num_queries, chunk.num_entries, causal, window)
        if key in self.masks:
            return self.masks[key]
        entries = torch.arange(chunk.num_entries)
        positions = torch.arange(chunk.first_position, chunk.first_position + chunk.num_queries)[:, None]
        hidden = entries > positions if causal else torch.zeros_like(entries, dtype=torch.bool)
        if window >= 0:
            hidden = hidden | (entries < positions - window)
        mask = additive(hidden.expand(chunk.num_queries, -1), dtype)
        if sum(kept.numel() for kept in self.masks.values()) + mask.numel() <= MAX_KEPT_MASK:
            self.masks[key] = mask
        return mask


AttentionMetadata = BlockMetadata | RaggedMetadata


def additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Minus infinity where hidden, zero elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def block_metadata(
    req_to_token: torch.Tensor, request_rows: torch.Tensor, prefix_lens: torch.Tensor, width: int
) -> BlockMetadata:
    """Metadata for requests `request_rows` [rows] of `req_to_token`, with `width` new tokens each after the prefix."""
    totals = prefix_lens.to(torch.int64) + width  # [rows]
    if totals.shape[0] == 1:
        slots = req_to_token[request_rows.item(), : totals.item()].to(torch.int64)[None]
        return BlockMetadata(width, slots, (totals - width)[:, None, None], is_padded=False)
    shortest, longest = (bound.item() for bound in torch.aminmax(totals))
    entries = torch.arange(longest)
    if shortest < longest:
        entries = torch.minimum(entries, totals[:, None] - 1)  # [rows, longest]
    slots = req_to_token[request_rows.to(torch.int64)[:, None], entries].to(torch.int64)
    return BlockMetadata(width, slots, (totals - width)[:, None, None], is_padded=shortest < longest)


def ragged_metadata(
    req_to_token: torch.Tensor, request_rows: list[int], prefix_lens: list[int], new_lens: list[int]
) -> RaggedMetadata:
    """Metadata for requests with `new_lens` new tokens after their prefixes."""
    segments, start = [], 0
    for row, prefix_len, new_len in zip(request_rows, prefix_lens, new_lens, strict=True):
        slots = req_to_token[row, : prefix_len + new_len].to(torch.int64)
        segments.append(PromptSegment(start, start + new_len, prefix_len, slots))
        start += new_len
    return RaggedMetadata(tuple(segments))
