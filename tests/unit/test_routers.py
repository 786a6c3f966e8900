"""What each routing policy decides; what all of them promise stands in `tests/conformance`."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from whiflash_sglang.core.types import HostRows, Plan
from whiflash_sglang.routing import create_router
from whiflash_sglang.routing.entropy import EntropyGain, entropy
from whiflash_sglang.startup.config import WhiFlashConfig


def config(router: str, threshold: float | None = None) -> WhiFlashConfig:
    return WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router, entropy_threshold=threshold)


def rows(slots: list[int], lens: list[int]) -> HostRows:
    return HostRows(slots, lens)


def choices(plan: Plan, n: int) -> list[str]:
    assert len(plan) == n
    return [name or "none" for name in plan]


def test_fixed() -> None:
    assert choices(create_router(config("fixed:e3"), 4).route(rows([0, 1], [3, 3])), 2) == ["e3", "e3"]


def test_alternate_switches_every_round_of_a_request() -> None:
    router = create_router(config("alternate"), 8)
    first = choices(router.route(rows([4, 5], [3, 3])), 2)
    alone = choices(router.route(rows([5], [4])), 1)
    second = choices(router.route(rows([4, 5], [4, 5])), 2)
    assert first[0] != second[0]
    assert first[1] != alone[0] != second[1]


def test_random_is_fair_and_repeats_itself() -> None:
    batch = rows(list(range(8)) * 200, [n // 8 for n in range(1600)])
    first = choices(create_router(config("random:1"), 8).route(batch), 1600)
    assert first == choices(create_router(config("random:1"), 8).route(batch), 1600)
    assert first != choices(create_router(config("random:2"), 8).route(batch), 1600)
    assert 0.45 < first.count("e3") / 1600 < 0.55
    # Neighbouring rounds of a request are independent: about half of them switch.
    of_slot_0 = first[::8]
    assert 0.35 < sum(a != b for a, b in pairwise(of_slot_0)) / 199 < 0.65


def test_entropy_splits_a_batch_at_the_threshold() -> None:
    router = create_router(config("entropy", threshold=0.5), 8)
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])  # ln 4 nats and about 0
    router.keep([6, 2], router.observe(logits, torch.zeros(2, 0), torch.arange(2)).tolist())
    assert choices(router.route(rows([2, 6], [3, 3])), 2) == ["df", "e3"]


def test_entropy_value() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25, 0.0])
    logits = probabilities.log()  # -inf for a masked token must not turn it into NaN
    assert entropy(logits[None]).item() == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.25, 0.25)), abs=1e-6)
    assert entropy(torch.tensor([[1000.0, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)


def test_random_takes_a_seed_of_any_length() -> None:
    batch = rows(list(range(8)), [5] * 8)
    chosen = choices(create_router(config(f"random:{10**30}"), 8).route(batch), 8)
    assert set(chosen) <= {"df", "e3"}


def test_entropy_gain_is_a_step_function_of_entropy() -> None:
    score = EntropyGain(8, edges=(0.1, 1.0), gains=(-2.0, 0.5, 3.0))
    two, four = math.log(2), math.log(4)  # nats of an even choice
    logits = torch.tensor([[9.0, -9.0, -9.0, -9.0], [5.0, 5.0, -30.0, -30.0], [0.0, 0.0, 0.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([0.0, two, four], abs=1e-4)
    score.keep([5, 0, 3], score.observe(logits, torch.zeros(3, 0), torch.arange(3)).tolist())
    assert score.read([0, 3, 5]) == [0.5, 3.0, -2.0]


@pytest.mark.parametrize("edge", [0.1, 0.30000001192092896, 0.7])
def test_an_entropy_on_an_edge_belongs_above_it(edge: float) -> None:
    """Edges are compared as exactly as an entropy is kept: 0.7 as float32 is less than 0.7."""
    score = EntropyGain(1, edges=(edge,), gains=(-1.0, 1.0))
    score.keep([0], torch.tensor([[edge]]).tolist())
    assert score.read([0]) == [1.0]
