"""The allocator of pages on a CPU against a model of it: texts grow by prefills, rounds and single tokens, and end."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocation import get_last_loc_torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from whiflash_sglang.cpu.pages import CpuPagedAllocator, allocator

POOL_PAGES = 12


def new(page_size: int) -> CpuPagedAllocator:
    pool = allocator(
        POOL_PAGES * page_size, page_size=page_size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    assert isinstance(pool, CpuPagedAllocator)
    return pool


def grow(pool: CpuPagedAllocator, texts: list[torch.Tensor], by: list[int]) -> list[torch.Tensor] | None:
    """Each text (its slots, in order) with as many more; by one token each as SGLang's decode does it."""
    before = torch.tensor([len(text) for text in texts])
    after = before + torch.tensor(by)
    last = torch.tensor([int(text[-1]) if len(text) else -1 for text in texts])
    if set(by) == {1}:
        slots = pool.alloc_decode(after, after, last)
    else:
        slots = pool.alloc_extend(before, before, after, after, last, sum(by))
    if slots is None:
        return None
    return [torch.cat((text, new)) for text, new in zip(texts, slots.split(by), strict=True)]


steps = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=3, max_size=3) | st.just([1, 1, 1]), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(st.sampled_from([2, 4, 16]), steps)
def test_slots_are_those_of_whole_pages(page_size: int, steps: list[tuple[list[int], int]]) -> None:
    pool = new(page_size)
    texts = [torch.empty(0, dtype=torch.int64)] * 3
    for by, ended in steps:
        free = pool.available_size()
        grown = grow(pool, texts, by)
        lens = torch.tensor([len(text) for text in texts])
        taken = int((pages(lens + torch.tensor(by), page_size) - pages(lens, page_size)).sum())
        if grown is None:
            assert taken * page_size > free == pool.available_size(), "too little, and nothing was taken"
        else:
            texts = grown
            assert pool.available_size() == free - taken * page_size
        if ended < 3:
            pool.free(texts[ended])
            texts[ended] = torch.empty(0, dtype=torch.int64)
        owned = []
        for text in texts:
            first = text[::page_size]
            assert (first % page_size == 0).all() and (first > 0).all(), "page 0 takes padded tokens"
            assert torch.equal(text, (first[:, None] + torch.arange(page_size)).flatten()[: len(text)])
            owned += first.tolist()
        assert len(set(owned)) == len(owned), "nobody else's"
        assert pool.available_size() == (POOL_PAGES - len(owned)) * page_size, "none is lost"


def pages(lens: torch.Tensor, page_size: int) -> torch.Tensor:
    return (lens + page_size - 1) // page_size


def test_single_slots_are_sglangs() -> None:
    pool = allocator(8, page_size=1, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False)
    assert type(pool) is TokenToKVPoolAllocator


def test_the_last_slot_of_a_text() -> None:
    table = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)
    assert get_last_loc_torch(table, torch.tensor([1, 0, 0]), torch.tensor([2, 0, 3])).tolist() == [9, -1, 7]
