"""Ranks of one model: two processes over gloo in which all that may differ does differ, and the first one's word.

One pair of processes for all of this file; each leaves what it saw in a file.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.fakes import FakeDrafter, FakeTarget, World, plain_greedy
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.types import Proposal, Rows, Verified
from whiflash_sglang.routing import create_router
from whiflash_sglang.routing.costs import RoundCosts, measure
from whiflash_sglang.serving.ranks import Ranks, SharedRouter
from whiflash_sglang.startup.config import WhiFlashConfig

PROMPTS = ([1, 2, 3], [4, 5], [6])
ROUNDS = 12


class Disturbed(FakeTarget):
    """A target whose arithmetic differs between ranks in the last bit, and so chooses another token now and then."""

    def __init__(self, world: World, rank: int):
        super().__init__(world)
        self.random = random.Random(rank)
        self.is_first = rank == 0

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = super().verify(rows, proposal)
        if not self.is_first and self.random.random() < 0.5:
            return verified._replace(predictions=(verified.predictions + 1) % 11)
        return verified


def rounds(rank: int, ranks: Ranks, rounds_: int = ROUNDS) -> dict[str, Any]:
    """Rounds of three requests with a router, drafters and a target that are another's on every rank."""
    world = World(8, 400)
    drafters = {"df": FakeDrafter("df", 7, world, 0.7, rank), "e3": FakeDrafter("e3", 4, world, 0.7, rank)}
    config = WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=f"random:{rank}")
    decode = DecodeRound(create_router(config, 8), drafters, Disturbed(world, rank), world.backlog([*drafters], 32))
    ranks.share(decode)
    plans = []
    for slot, prompt in enumerate(PROMPTS):
        world.texts[slot] = [*prompt, *plain_greedy(prompt, 1)]
    decode.prefill(world.prefill(range(len(PROMPTS))), torch.randn(len(PROMPTS), 11))
    for _ in range(rounds_):
        rows = world.rows(range(len(PROMPTS)), 8)
        result = decode.run(rows)
        for row, tokens in enumerate(result.committed):
            world.texts[row] += tokens
        decode.router.learn(rows.host, result, 1.0 + rank)
        if not isinstance(decode.router, SharedRouter):
            ranks.count(rows.host, result)
        plans.append([*result.plan])
    return {"plans": plans, "texts": [world.texts[slot] for slot in range(len(PROMPTS))], "ranks": ranks.snapshot()}


def costs(rank: int, ranks: Ranks) -> dict[str, Any]:
    """A table measured where the second rank takes much longer, and by itself would repeat a round less often."""
    table, runs = RoundCosts({"df": 8, "e3": 6}, (1, 4), (256,)), 0

    def run(name: str, num_rows: int, context: int) -> tuple[float, float]:
        nonlocal runs
        runs += 1
        return (0.01, 0.02) if rank == 0 else (0.1, 0.2)

    measure(table, ranks.first(run))
    return {"runs": runs, "round_ms": table.snapshot()}


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared, apart = Ranks(dist.group.WORLD, dist.group.WORLD), Ranks(dist.group.WORLD, dist.group.WORLD)
    apart.share = lambda decode_round: None  # type: ignore[method-assign]
    seen = {
        "shared": rounds(rank, shared),
        "apart": rounds(rank, apart),
        "costs": costs(rank, shared),
        "first_token": shared.same(torch.tensor([7 + rank, 3], dtype=torch.int32)).tolist(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=one_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():  # ranks that have diverged wait for each other
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_do_the_first_ones_rounds(seen: list[dict[str, Any]]) -> None:
    first, second = (one["shared"] for one in seen)
    assert first["plans"] == second["plans"] and first["texts"] == second["texts"]
    assert len({*map(str, first["plans"])}) > 1, "the router is to choose this and that"
    assert first["ranks"] == second["ranks"]
    assert len(set(first["ranks"]["digests"])) == 1
    assert first["ranks"]["corrected"][0] == 0 < first["ranks"]["corrected"][1]
    for prompt, text in zip(PROMPTS, first["texts"], strict=True):
        assert text == [*prompt, *plain_greedy(prompt, len(text) - len(prompt))]


def test_digests_tell_ranks_that_have_diverged(seen: list[dict[str, Any]]) -> None:
    """The same rounds, where nobody shares anything."""
    first, second = (one["apart"] for one in seen)
    assert first["plans"] != second["plans"]
    assert first["ranks"]["digests"] == second["ranks"]["digests"]
    assert len(set(first["ranks"]["digests"])) == 2


def test_costs_are_measured_by_the_first_rank(seen: list[dict[str, Any]]) -> None:
    """Ranks that repeated a round by their own clocks would wait for each other for ever."""
    first, second = (one["costs"] for one in seen)
    assert first == second
    assert first["round_ms"]["df"]["1"]["256"] == pytest.approx(20)


def test_a_sampled_token_is_the_first_ranks(seen: list[dict[str, Any]]) -> None:
    assert [one["first_token"] for one in seen] == [[7, 3], [7, 3]]


def test_one_process_is_left_alone() -> None:
    alone, tokens = Ranks(), torch.tensor([1])
    router = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router="alternate"), 4)
    world = World(2, 20)
    drafters = {"df": FakeDrafter("df", 7, world, 0.7), "e3": FakeDrafter("e3", 4, world, 0.7)}
    target = FakeTarget(world)
    decode = DecodeRound(router, drafters, target, world.backlog([*drafters]))
    alone.share(decode)
    assert (decode.router, decode.target, decode.drafters) == (router, target, drafters)
    assert alone.same(tokens) is tokens and alone.first(costs) is costs  # type: ignore[arg-type]
    assert alone.snapshot() == {"size": 1}
