"""The round with fakes: the text is the plain greedy text, and every drafter's context is exact whenever it drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeDrafter, FakeTarget, World, feature, plain_greedy
from whiflash_sglang.core.round import DecodeRound, Router
from whiflash_sglang.core.types import HostRows, Plan, Probe, RoundResult
from whiflash_sglang.routing import create_router
from whiflash_sglang.startup.config import WhiFlashConfig

SLOTS, MAX_LEN = 8, 160
ROUTERS = ["fixed:e3", "fixed:df", "alternate", "random:3", "entropy"]


def config(router: str, threshold: float | None = None) -> WhiFlashConfig:
    return WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router, entropy_threshold=threshold)


def serve(router: str, prompts: list[list[int]], num_tokens: int, seed: int, skill: float = 0.7) -> list[list[int]]:
    """Serve the prompts with requests joining and leaving in between; the new tokens of each."""
    shuffle = random.Random(seed)
    world = World(SLOTS, MAX_LEN)
    drafters = {"df": FakeDrafter("df", 7, world, skill, seed), "e3": FakeDrafter("e3", 4, world, skill, seed)}
    target = FakeTarget(world)
    backlog = world.backlog([*drafters], shuffle.choice([8, 9, 13, 64]))
    decode = DecodeRound(create_router(config(router), SLOTS), drafters, target, backlog)
    waiting, running, outputs = list(enumerate(prompts)), {}, {}
    free = list(range(SLOTS))
    while waiting or running:
        while waiting and free and (not running or shuffle.random() < 0.6):
            number, prompt = waiting.pop(0)
            slot = free.pop(shuffle.randrange(len(free)))
            world.texts[slot] = [*prompt, *plain_greedy(prompt, 1)]  # what a prefill samples
            running[slot] = number
            decode.prefill(world.prefill([slot]), torch.randn(1, 11))
        slots = shuffle.sample(sorted(running), shuffle.randint(1, len(running)))
        rows = world.rows(slots, 8)
        result = decode.run(rows)
        for row, slot in enumerate(slots):
            assert 1 <= len(result.committed[row]) <= 1 + result.num_drafts[row]
            world.texts[slot] += result.committed[row]
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


def decode_round(world: World, router: Router, names: list[str], slots: list[int], **options: Any) -> DecodeRound:
    """A round with perfect drafters, whose requests in `slots` have been prefilled."""
    drafters = {name: FakeDrafter(name, {"df": 7, "e3": 4}[name], world, 1.0) for name in names}
    decode = DecodeRound(router, drafters, FakeTarget(world), world.backlog(names, 32), **options)
    decode.prefill(world.prefill(slots), torch.zeros(len(slots), 11))
    return decode


def commit(world: World, slots: list[int], result: RoundResult) -> None:
    for slot, tokens in zip(slots, result.committed, strict=True):
        world.texts[slot] += tokens


def test_perfect_drafts_commit_the_whole_window() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2, 3]
    decode = decode_round(world, create_router(config("fixed:df"), SLOTS), ["df"], [0])
    result = decode.run(world.rows([0], 8))
    assert result.committed == [plain_greedy([1, 2, 3], 8)]
    assert result.window.tolist() == [[3, *plain_greedy([1, 2, 3], 7)]]


class Asleep(Router):
    """No drafts in most rounds, with several steps of the target. Its signals: the best token of every position."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.kept: dict[int, float] = {}

    def route(self, rows: HostRows) -> Plan:
        name = self.random.choice(["df", "e3", None, None, None])
        return [name] * len(rows.slots)

    def ahead(self, rows: HostRows) -> int:
        return self.random.randint(1, 9)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return logits.flatten(0, -2)[at].argmax(-1, keepdim=True).float()

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.kept = {slot: signal for slot, (signal,) in zip(slots, signals, strict=True)}


@pytest.mark.parametrize("max_steps", [1, 4, 20])
def test_several_steps_without_drafts_are_the_same_text(max_steps: int) -> None:
    """The steps are bounded by router, target and window. Signals are those of the last one."""
    world = World(SLOTS, MAX_LEN)
    prompts = [[slot, 5, 7] for slot in range(3)]
    for slot, prompt in enumerate(prompts):
        world.texts[slot] = [*prompt]
    router = Asleep(0)
    decode = decode_round(world, router, ["df", "e3"], [0, 1, 2])
    decode.target = FakeTarget(world, max_steps)
    seen = set()
    for _ in range(12):
        result = decode.run(world.rows([0, 1, 2], 8))
        if not any(result.plan):
            assert [len(tokens) for tokens in result.committed] == [result.steps] * 3
            seen.add(result.steps)
        else:
            assert result.steps == 1
        assert router.kept == {slot: tokens[-1] for slot, tokens in enumerate(result.committed)}
        commit(world, [0, 1, 2], result)
    assert max(seen) == min(max_steps, 8), seen
    for slot, prompt in enumerate(prompts):
        said = world.texts[slot][len(prompt) :]
        assert said == plain_greedy(prompt, len(said))


class Mixed(Router):
    """Row 0 to `df`, row 1 to `e3`, row 2 to nobody. Its signals: the best token of every position, and twice that."""

    def route(self, rows: HostRows) -> Plan:
        return ["df", "e3", None]

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        best = logits.flatten(0, -2)[at].argmax(-1).float()
        return torch.stack([best, 2 * best], dim=1)

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.kept = dict(zip(slots, signals, strict=True))


def test_one_width_a_batch_and_each_row_its_own_drafter() -> None:
    world = World(SLOTS, MAX_LEN)
    for slot in range(3):
        world.texts[slot] = [slot, 5, 7]
    router = Mixed()
    decode = decode_round(world, router, ["df", "e3"], [0, 1, 2])
    result = decode.run(world.rows([0, 1, 2], 8))
    assert decode.target.widths == [8]
    # Row 1 has 4 drafts: the padding behind them is not accepted even where it happens to be right. Row 2 has none.
    assert [len(tokens) for tokens in result.committed] == [8, 5, 1]
    assert router.kept == {slot: [tokens[-1], 2 * tokens[-1]] for slot, tokens in enumerate(result.committed)}


class Probing(Router):
    """Drafts for nobody, and probes a drafter in every second round."""

    def __init__(self, *drafters: str):
        self.drafters = drafters
        self.rounds = 0

    def route(self, rows: HostRows) -> Plan:
        return [None] * len(rows.slots)

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        self.rounds += 1
        if self.rounds % 2:
            return None
        turn = self.rounds // 2
        return Probe(self.drafters[turn % len(self.drafters)], turn % len(rows.slots))


def test_a_probe_drafts_and_verifies_nothing() -> None:
    """Its drafts reach the host with the round's read; width, text and the drafters' contexts are as without it."""
    world = World(SLOTS, MAX_LEN)
    for slot in range(3):
        world.texts[slot] = [slot, 5, 7]
    decode = decode_round(world, Probing("df", "e3"), ["df", "e3"], [0, 1, 2])
    probed = set()
    for _ in range(24):
        texts = {slot: [*text] for slot, text in world.texts.items()}
        result = decode.run(world.rows([0, 1, 2], 8))
        assert [len(tokens) for tokens in result.committed] == [1, 1, 1] and not any(result.plan)
        if result.probe is not None:
            drafter, row, drafts = result.probe
            assert drafts == plain_greedy(texts[row], {"df": 7, "e3": 4}[drafter])
            probed.add((drafter, row))
        commit(world, [0, 1, 2], result)
    assert set(decode.target.widths) == {1}
    assert len(probed) == 6
    for slot in range(3):
        assert world.texts[slot] == [slot, 5, 7, *plain_greedy([slot, 5, 7], 24)]


def test_a_drafter_that_is_switched_off_is_not_probed() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2]
    decode = decode_round(world, Probing("df"), ["df", "e3"], [0])
    decode.health.switch_off("df")
    assert all(decode.run(world.rows([0], 8)).probe is None for _ in range(4))


def test_width_is_no_more_than_the_batch_needs() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2]
    decode = decode_round(world, create_router(config("fixed:e3"), SLOTS), ["df", "e3"], [0])
    decode.run(world.rows([0], 8))
    assert decode.target.widths == [5]


def test_a_drafter_that_is_not_chosen_ingests_nothing_until_its_backlog_is_full() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[0] = [1, 2]
    decode = decode_round(world, create_router(config("fixed:e3"), SLOTS), ["df", "e3"], [0])
    lengths, passes = [], []
    for _ in range(12):  # 5 tokens a round, a bound of 32, a width of 8
        result = decode.run(world.rows([0], 8))
        passes.append(result.catch_ups["df"].lens[0] if "df" in result.catch_ups else 0)
        commit(world, [0], result)
        lengths.append(decode.backlog.length("df", 0, len(world.texts[0]) - 1))
    assert passes == [0, 0, 0, 0, 0, 25, 0, 0, 0, 0, 25, 0]
    assert max(lengths) <= 32


def test_a_request_that_ends_is_ingested_up_to_what_is_shared() -> None:
    world = World(SLOTS, MAX_LEN)
    world.texts[3] = [1, 2]
    decode = decode_round(world, create_router(config("fixed:e3"), SLOTS), ["df", "e3"], [3])
    for _ in range(3):
        commit(world, [3], decode.run(world.rows([3], 8)))
    done = decode.finish([3], [14])  # two of the 16 committed positions lie behind a stop
    assert {name: passed.lens for name, passed in done.items()} == {"df": [13], "e3": [3]}
    text, entries = world.texts[3], decode.drafters["df"].entries
    for position in range(14):
        kept = entries[int(world.table[3, position])]
        assert kept == (feature(text[: position + 1]), text[position + 1], position)


@pytest.mark.parametrize("router", ["fixed:e3", "alternate", "entropy"])
def test_rows_of_a_drafter_that_is_switched_off_go_to_the_other_one(router: str) -> None:
    world = World(SLOTS, MAX_LEN)
    for slot in range(3):
        world.texts[slot] = [slot, 5, 7]
    decode = decode_round(
        world, create_router(config(router, 0.0 if router == "entropy" else None), SLOTS), ["df", "e3"], [0, 1, 2]
    )
    decode.drafters["e3"].fails = lambda slot: True
    result = decode.run(world.rows([0, 1, 2], 8))
    assert {name: set(finite) for name, finite in result.finite.items()} == {
        name: {name == "df"} for name in result.plan
    }
    decode.health.switch_off("e3")
    for _ in range(4):
        result = decode.run(world.rows([0, 1, 2], 8))
        assert set(result.plan) == {"df"}
        assert result.num_drafts == [7, 7, 7]
    decode.health.switch_off("df")
    result = decode.run(world.rows([0, 1, 2], 8))
    assert not any(result.plan)
    assert [len(tokens) for tokens in result.committed] == [1, 1, 1]
