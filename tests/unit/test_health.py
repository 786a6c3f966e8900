"""A drafter that fails one request serves all others; one that fails several is switched off, and tried again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, plain_greedy
from whiflash_sglang.core.health import REQUESTS, WINDOW
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.types import RoundResult
from whiflash_sglang.routing import create_router
from whiflash_sglang.startup.config import WhiFlashConfig

SLOTS = 6


class Server:
    """Rounds with two drafters; `e3` fails for the request slots that `fails` names."""

    def __init__(self, fails: Callable[[int], bool], router: str = "fixed:e3"):
        self.world = World(SLOTS, 400)
        drafters = {name: FakeDrafter(name, drafts, self.world, 0.6) for name, drafts in (("df", 7), ("e3", 4))}
        drafters["e3"].fails = fails
        policy = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router), SLOTS)
        self.round = DecodeRound(policy, drafters, FakeTarget(self.world), self.world.backlog(["df", "e3"]))
        self.health = self.round.health

    def begin(self, *slots: int) -> None:
        for slot in slots:
            self.world.texts[slot] = [slot, 5, 7, *plain_greedy([slot, 5, 7], 1)]
        self.round.prefill(self.world.prefill(slots), torch.zeros(len(slots), VOCAB))

    def decode(self, *slots: int) -> tuple[dict[int, str], list[str]]:
        """Who drafted for which slot, and who was switched off."""
        result = self.run(*slots)
        off = self.health.judge(result, slots, [f"request {slot}" for slot in slots])
        return {slot: name for slot, name in zip(slots, result.plan, strict=True) if name is not None}, off

    def run(self, *slots: int) -> RoundResult:
        result = self.round.run(self.world.rows(slots, 8))
        for slot, tokens in zip(slots, result.committed, strict=True):
            self.world.texts[slot] += tokens
            assert self.world.texts[slot][3:] == plain_greedy([slot, 5, 7], len(self.world.texts[slot]) - 3)
        return result


def test_a_request_that_a_drafter_fails_goes_on_without_it_and_all_others_with_it() -> None:
    server = Server(lambda slot: slot == 1)
    server.begin(0, 1, 2)
    assert server.decode(0, 1, 2) == ({0: "e3", 1: "e3", 2: "e3"}, [])
    for _ in range(10):
        assert server.decode(0, 1, 2) == ({0: "e3", 1: "df", 2: "e3"}, [])
    assert server.health.failures == {"e3": 1} and not server.health.tried_at
    server.begin(1)  # another request in the same slot
    assert server.decode(1) == ({1: "e3"}, [])


def test_one_request_that_is_retracted_again_and_again_switches_nothing_off() -> None:
    server = Server(lambda slot: True)
    for _ in range(3 * REQUESTS):
        server.begin(1)
        assert server.decode(1) == ({1: "e3"}, [])
    assert not server.health.tried_at


def test_a_drafter_that_fails_everywhere_is_off_within_as_many_requests() -> None:
    server = Server(lambda slot: True)
    for slot in range(REQUESTS):  # one after the other
        server.begin(slot)
        for number in range(4):
            expected = ["e3"] if (slot, number) == (REQUESTS - 1, 0) else []
            assert server.decode(slot) == ({slot: "df" if number else "e3"}, expected)
    server = Server(lambda slot: True)
    server.begin(0, 1, 2)  # or at once
    assert server.decode(0, 1, 2)[1] == ["e3"]


def test_a_drafter_that_is_off_is_tried_again_and_stays_if_that_is_clean() -> None:
    failing = set(range(SLOTS))
    server = Server(failing.__contains__)
    server.begin(0, 1, 2)
    assert server.decode(0, 1, 2)[1] == ["e3"]

    def trial() -> None:
        """Most of the wait passes without rounds here, and the drafter is asked in none."""
        server.health.rounds = server.health.tried_at["e3"] - 3
        for _ in range(3):
            assert server.decode(0, 1) == ({0: "df", 1: "df"}, [])
        assert server.decode(0, 1) == ({0: "e3", 1: "e3"}, []), "said once only"

    trial()
    assert server.health.wait["e3"] == 2 * WINDOW
    failing.clear()
    trial()
    assert not server.health.tried_at
    assert server.decode(0, 1) == ({0: "e3", 1: "e3"}, []), "whose KV has no holes: it checks that itself"


def test_failures_of_long_ago_do_not_count() -> None:
    server = Server(lambda slot: True)
    server.begin(*range(2 * REQUESTS))
    for slot in range(2 * REQUESTS):
        assert server.decode(slot)[1] == []
        server.health.rounds += WINDOW
