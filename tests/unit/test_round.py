"""The round with fakes: the text is the plain greedy text, and every drafter's context is exact whenever it drafts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeDrafter, FakeTarget, World, plain_greedy
from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.round import DecodeRound
from whiflash_sglang.router import create_router
from whiflash_sglang.types import Plan, Rows

SLOTS, MAX_LEN = 8, 160
ROUTERS = ["fixed:e3", "fixed:df", "alternate", "random:3", "entropy"]


def config(router: str, threshold: float = 0.5) -> WhiFlashConfig:
    return WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router, entropy_threshold=threshold)


def serve(router: str, prompts: list[list[int]], num_tokens: int, seed: int, skill: float = 0.7) -> list[list[int]]:
    """Serve the prompts with requests joining and leaving in between; the new tokens of each."""
    shuffle = random.Random(seed)
    world = World(SLOTS, MAX_LEN)
    drafters = {"df": FakeDrafter("df", 7, world, skill, seed), "e3": FakeDrafter("e3", 4, world, skill, seed)}
    target = FakeTarget(world)
    decode = DecodeRound(create_router(config(router), SLOTS), drafters, target)
    waiting, running, outputs = list(enumerate(prompts)), {}, {}
    free = list(range(SLOTS))
    while waiting or running:
        while waiting and free and (not running or shuffle.random() < 0.6):
            number, prompt = waiting.pop(0)
            slot = free.pop(shuffle.randrange(len(free)))
            world.texts[slot] = [*prompt, *plain_greedy(prompt, 1)]  # what a prefill samples
            running[slot] = number
            for drafter in drafters.values():
                drafter.ingest(world.prefill_context([slot]))
            decode.router.observe(torch.tensor([slot]), torch.randn(1, 11))
        slots = shuffle.sample(sorted(running), shuffle.randint(1, len(running)))
        rows = world.rows(slots, 8)
        result = decode.run(rows)
        for row, slot in enumerate(slots):
            count = int(result.accepted.num_committed[row])
            assert 1 <= count <= 1 + int(result.num_drafts[row])
            world.texts[slot] += result.accepted.tokens[row, :count].tolist()
            assert world.texts[slot][-1] == int(result.accepted.bonus[row])
            assert int(result.new_prefix_lens[row]) == len(world.texts[slot]) - 1
            prompt = prompts[running[slot]]
            if len(world.texts[slot]) >= len(prompt) + num_tokens:
                outputs[running.pop(slot)] = world.texts[slot][len(prompt) :][:num_tokens]
                free.append(slot)
    return [outputs[number] for number in range(len(prompts))]


@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_text_is_plain_greedy_text(router: str, seed: int, skill: float) -> None:
    shuffle = random.Random(seed)
    prompts = [[shuffle.randrange(11) for _ in range(shuffle.randint(1, 12))] for _ in range(shuffle.randint(1, 10))]
    outputs = serve(router, prompts, 40, seed, skill)
    assert outputs == [plain_greedy(prompt, 40) for prompt in prompts]


def test_perfect_drafts_commit_the_whole_window() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2, 3]
    drafter = FakeDrafter("df", 7, world, skill=1.0)
    drafter.ingest(world.prefill_context([0]))
    decode = DecodeRound(create_router(config("fixed:df"), SLOTS), {"df": drafter}, FakeTarget(world))
    result = decode.run(world.rows([0], 8))
    assert result.accepted.num_committed.tolist() == [8]
    assert result.accepted.tokens[0].tolist() == plain_greedy([1, 2, 3], 8)


class Mixed:
    """Row 0 to `df`, row 1 to `e3`, row 2 to nobody."""

    def route(self, rows: Rows) -> Plan:
        return {"df": torch.tensor([0]), "e3": torch.tensor([1])}

    def observe(self, slots: torch.Tensor, logits: torch.Tensor) -> None:
        self.logits = logits


def test_one_width_a_batch_and_each_row_its_own_drafter() -> None:
    world = World(SLOTS, MAX_LEN)
    for slot in range(3):
        world.texts[slot] = [slot, 5, 7]
    drafters = {"df": FakeDrafter("df", 7, world, 1.0), "e3": FakeDrafter("e3", 4, world, 1.0)}
    for drafter in drafters.values():
        drafter.ingest(world.prefill_context([0, 1, 2]))
    target, router = FakeTarget(world), Mixed()
    result = DecodeRound(router, drafters, target).run(world.rows([0, 1, 2], 8))
    assert target.widths == [8]
    # Row 1 has 4 drafts: the padding behind them is not accepted even where it happens to be right. Row 2 has none.
    assert result.accepted.num_committed.tolist() == [8, 5, 1]
    assert router.logits.argmax(-1).tolist() == result.accepted.bonus.tolist()


def test_width_is_no_more_than_the_batch_needs() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2]
    drafters = {"df": FakeDrafter("df", 7, world, 1.0), "e3": FakeDrafter("e3", 4, world, 1.0)}
    for drafter in drafters.values():
        drafter.ingest(world.prefill_context([0]))
    target = FakeTarget(world)
    DecodeRound(create_router(config("fixed:e3"), SLOTS), drafters, target).run(world.rows([0], 8))
    assert target.widths == [5]
