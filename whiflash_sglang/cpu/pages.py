"""KV slot allocators for a CPU: single slots or pages (`--page-size`).

SGLang's paged allocator uses Triton kernels to allocate; the rest is bookkeeping in torch. A page holds consecutive
positions of one request. The radix tree shares whole pages only.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import (
    BaseTokenToKVPoolAllocator,
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
    alloc_extend_naive,
)
from sglang.srt.utils import get_num_new_pages


def allocator(
    size: int, *, page_size: int, dtype: torch.dtype, device: str, kvcache: object, need_sort: bool
) -> BaseTokenToKVPoolAllocator:
    """Create the slot allocator; returned to SGLang as the allocator class."""
    if page_size == 1:
        return TokenToKVPoolAllocator(size, dtype, device, kvcache, need_sort)
    return CpuPagedAllocator(size, page_size, dtype, device, kvcache, need_sort)


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """A paged allocator without Triton. Like SGLang's, returns None and allocates nothing if too few pages are free."""

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots [extend_num_tokens] int64 for positions prefix .. seq - 1 of every request, concatenated.

        The rest of the page of `last_loc`, the slot of position prefix - 1 (-1 if there is none), is used first.
        """
        needed = num_new_pages
        if needed is None:
            needed = get_num_new_pages(seq_lens_cpu, self.page_size, prefix_lens_cpu)
        if not self._have(needed):
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[needed:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Slots [requests] int64 for position seq - 1 of every request: the one after `last_loc`, or on a new page."""
        opens = (seq_lens - 1) % self.page_size == 0
        needed = int(opens.sum())
        if not self._have(needed):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[opens] = self.free_pages[:needed] * self.page_size
        self.free_pages = self.free_pages[needed:]
        return slots

    def _have(self, num_pages: int) -> bool:
        if num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        return num_pages <= len(self.free_pages)
