"""What every router promises to the round (`round.Router`), whatever its policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.round import Router
from whiflash_sglang.router import create_router
from whiflash_sglang.types import Rows

SLOTS, VOCAB = 16, 7
ROUTERS = ["fixed:e3", "fixed:df", "alternate", "random:7", "entropy"]


def create(router: str) -> Router:
    return create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router), SLOTS)


def rows(slots: list[int], prefix_lens: list[int], draftable: list[bool] | None) -> Rows:
    n = len(slots)
    flags = None if draftable is None else torch.tensor(draftable)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Rows(torch.tensor(slots), zeros, torch.tensor(prefix_lens), torch.zeros(n, 9, dtype=torch.int64), flags)


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_each_draftable_row_has_one_drafter_and_no_other_row_any(name: str, data: st.DataObject) -> None:
    router = create(name)
    lens = dict.fromkeys(range(SLOTS), 3)
    for _ in range(data.draw(st.integers(1, 6), label="rounds")):
        slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True), label="slots")
        flags = data.draw(st.none() | st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        plan = router.route(rows(slots, [lens[slot] for slot in slots], flags))
        assert set(plan) <= {"df", "e3"}
        assert all(len(index) for index in plan.values()), "no drafter is called for no row"
        chosen = sorted(row for index in plan.values() for row in index.tolist())
        assert chosen == [row for row in range(len(slots)) if flags is None or flags[row]]
        router.observe(torch.tensor(slots), torch.randn(len(slots), VOCAB))
        for slot in slots:
            lens[slot] += 2


@pytest.mark.parametrize("name", ROUTERS)
def test_a_request_is_routed_the_same_alone_and_among_others(name: str) -> None:
    together, alone = create(name), create(name)
    slots, lens = [4, 9, 2], [5, 30, 12]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    for _ in range(4):
        plan = together.route(rows(slots, lens, None))
        of_9 = next(drafter for drafter, index in plan.items() if 1 in index.tolist())
        assert list(alone.route(rows([9], [lens[1]], None))) == [of_9]
        together.observe(torch.tensor(slots), logits)
        alone.observe(torch.tensor([9]), logits[1:2])
        lens, logits = [n + 3 for n in lens], logits.roll(1, dims=0)
