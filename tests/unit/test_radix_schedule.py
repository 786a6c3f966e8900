"""A round between SGLang's cache and queue: whatever the schedule, no drafter ever reads or shares a wrong entry.

Random schedules of all that SGLang does to a request (tests/radix_world.py), over a small pool and texts that share
prefixes of every length. After every step all that drafters have is held against the texts themselves:

    KV slot        has one place: free, in the tree, or the own of a request in the batch
    free           no drafter has an entry there
    in the tree    every drafter's entry is what a prefill of this path of the tree would write
    running        positions that a drafter has ingested have such an entry, all others wait in its backlog
    answer         is the plain greedy one

Then one thing at a time is taken away, and the checks have to notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import VOCAB, plain_greedy
from tests.radix_world import MAX_LEN, RadixWorld, Request, feature_of
from whiflash_sglang.core.round import Router
from whiflash_sglang.routing import create_router
from whiflash_sglang.startup.config import DRAFTERS, WhiFlashConfig

NUM_ROWS = 4
ROUTERS = {
    "df-e3": ["random:1", "random:2", "alternate", "entropy", "fixed:e3", "fixed:df"],
    "e3": ["fixed:e3"],
    "df": ["fixed:df"],
}
CASES = (
    "aborted in the middle",
    "accepted behind the end",
    "caught up on missed rounds",
    "chunk aborted",
    "duplicates freed",
    "ended with a backlog",
    "evicted for room",
    "hit after retraction",
    "hit on a hit",
    "prefilled in chunks",
    "retracted",
)


class Join(NamedTuple):
    """A next turn, a retry or a branch of an earlier text: its first `keep` tokens and some others."""

    earlier: int
    keep: int
    tail: list[int]
    max_tokens: int
    stop: int | None
    draftable: bool


class Prefill(NamedTuple):
    requests: int
    budget: int


class Decode(NamedTuple):
    chosen: int | None  # a bit for each running request, or None: all of them


class Abort(NamedTuple):
    which: int


class Retract(NamedTuple):
    which: int


class Evict(NamedTuple):
    slots: int


Step = Join | Prefill | Decode | Abort | Retract | Evict

joins = st.builds(
    Join,
    earlier=st.integers(0, 50),
    keep=st.integers(0, 26),
    tail=st.lists(st.integers(0, 2), max_size=6),
    max_tokens=st.integers(1, 18),
    stop=st.none() | st.integers(0, 10),
    draftable=st.sampled_from([True, True, True, False]),
)
prefills = st.builds(Prefill, st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 8, 64]))
decodes = st.builds(Decode, st.none() | st.integers(1, 2**NUM_ROWS - 1))
evictions, aborts, retractions = (st.builds(kind, st.integers(0, 9)) for kind in (Evict, Abort, Retract))
# The first is what a failing schedule shrinks to: Evict(0) does nothing.
steps = st.one_of(evictions, aborts, retractions, *[joins] * 4, *[prefills] * 4, *[decodes] * 6)
schedules = st.lists(steps, min_size=50, max_size=120)


@cache
def plain(prompt: tuple[int, ...]) -> list[int]:
    return plain_greedy(prompt, MAX_LEN)


def check(world: RadixWorld) -> None:
    check_slots(world)
    check_tree(world)
    for request in world.running:
        check_features(world, request)
    for request in world.requests:
        expected = plain(tuple(request.prompt))[: len(request.output)]
        assert request.output == expected, "an answer is not the plain greedy one"
        assert not request.ended or len(request.output) == (request.answer_length() or 0)


def check_slots(world: RadixWorld) -> None:
    """Every KV slot is in one place, and drafters have entries in those only that somebody uses."""
    places = world.free + [node.slot for node, _ in world.tree.nodes()]
    for request in world.batch:
        places += world.table[request.row, len(request.path) : request.allocated].tolist()
    assert sorted(places) == list(range(world.pool_size)), "a KV slot is lost or in two places"
    assert sorted([*world.free_rows, *(request.row for request in world.batch)]) == list(range(len(world.table)))
    for name, drafter in world.drafters.items():
        assert drafter.entries.keys() <= set(places) - set(world.free), f"{name} wrote to a slot that nobody holds"


def check_tree(world: RadixWorld) -> None:
    """Entries in shared slots are those that a prefill of the shared text would write, and somebody has that text."""
    texts = [tuple(request.text) for request in world.requests]
    for node, text in world.tree.nodes():
        followers = [node.key[1]] if len(node.key) > 1 else [key[0] for key in node.children]
        for name, drafter in world.drafters.items():
            for follower in followers if drafter.sees_next else (-1,):
                exact = drafter.entry(feature_of(text), follower, len(text) - 1)
                assert drafter.entries.get(node.slot) == exact, f"{name} has a wrong entry in a shared slot"
        if not node.children:
            whole = text + node.key[1:]
            assert any(known[: len(whole)] == whole for known in texts), "a text is shared that nobody has"


def check_features(world: RadixWorld, request: Request) -> None:
    """Committed features are committed tokens: each drafter has ingested a position, or keeps its feature."""
    backlog, text = world.decode.backlog, tuple(request.text)
    assert len(text) == request.committed + 1
    for name, drafter in world.drafters.items():
        waiting = backlog.length(name, request.row, request.committed)
        assert 0 <= waiting <= world.capacity, f"{name} has a backlog of {waiting}"
        for position in range(request.committed):
            value = feature_of(text[: position + 1])
            if position < request.committed - waiting:
                exact = drafter.entry(value, text[position + 1], position)
                slot = int(world.table[request.row, position])
                assert drafter.entries.get(slot) == exact, f"{name} has a wrong entry of a running request"
            else:
                row = int(backlog.rows(torch.tensor(request.row), torch.tensor(position)))
                kept = (float(backlog.features[row, 0]), int(backlog.next_tokens[row]))
                assert kept == (value, text[position + 1]), f"{name} keeps a wrong feature"
        last = backlog.last(torch.tensor([request.row]), torch.tensor([request.committed]))
        assert float(last[0, 0]) == feature_of(text[:-1]), f"{name} has lost the newest feature"


def check_end(world: RadixWorld) -> None:
    """Nothing is left behind when all requests have been served."""
    assert not any(node.locks for node, _ in world.tree.nodes())
    assert (world.table == -1).all() and not world.texts
    world.evict(world.pool_size)
    assert sorted(world.free) == list(range(world.pool_size))
    assert not any(drafter.entries for drafter in world.drafters.values())


def make_router(drafters: str, router: str) -> Router:
    paths = {"df": "dflash_draft", "e3": "eagle_draft"}
    config = WhiFlashConfig(drafters=drafters, router=router, **{paths[name]: "here" for name in DRAFTERS[drafters]})
    return create_router(config, NUM_ROWS)


def apply(world: RadixWorld, step: Step) -> None:
    match step:
        case Join():
            text = world.requests[step.earlier % len(world.requests)].text if world.requests else []
            prompt = text[: step.keep] + step.tail
            world.submit(prompt or [0], step.max_tokens, step.stop, step.draftable)
        case Prefill():
            world.prefill(step.requests, step.budget)
        case Decode(chosen=None):
            world.run(world.running)
        case Decode():
            world.run([request for i, request in enumerate(world.running) if step.chosen >> i & 1])
        case Abort():
            among = world.batch + world.waiting
            if among:
                world.abort(among[step.which % len(among)])
        case Retract():
            if world.batch:
                world.retract(world.batch[step.which % len(world.batch)])
        case Evict():
            world.evict(step.slots)


def serve_all(world: RadixWorld) -> None:
    """Serve whatever is left, and see that it has left nothing behind."""
    for _ in range(1000):
        if not world.waiting and not world.running and world.chunked is None:
            break
        world.prefill(len(world.waiting), budget=1000)
        check(world)
        world.run(world.running)
        check(world)
    assert all(request.ended for request in world.requests)


@pytest.mark.slow  # it plays 150 schedules
@pytest.mark.parametrize("drafters", ROUTERS)
def test_every_entry_is_exact_whatever_the_schedule(drafters: str) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=150 if drafters == "df-e3" else 50, deadline=None)
    @given(
        schedule=schedules,
        router=st.sampled_from(ROUTERS[drafters]),
        pool_size=st.sampled_from([64, 96, 144]),
        capacity=st.sampled_from([8, 9, 13, 64]),
        skill=st.sampled_from([0.0, 0.7, 0.95, 1.0]),
    )
    def serve(schedule: list[Step], router: str, pool_size: int, capacity: int, skill: float) -> None:
        world = RadixWorld(
            DRAFTERS[drafters],
            make_router(drafters, router),
            num_rows=NUM_ROWS,
            pool_size=pool_size,
            capacity=capacity,
            skill=skill,
        )
        for step in schedule:
            apply(world, step)
            check(world)
        serve_all(world)
        check_end(world)
        seen.update(world.seen)

    serve()
    if drafters == "df-e3":
        missing = [case for case in (*CASES, *(f"hit of {length}" for length in range(8))) if not seen[case]]
        assert not missing, "no schedule had this"


def converse(world: RadixWorld) -> None:
    """A turn whose last round accepts tokens behind its end, and the next one; checked at every step."""
    first = world.submit([0, 1, 2], max_tokens=12)
    serve_all(world)
    world.submit([*first.text, 1, 1], max_tokens=12)
    serve_all(world)
    check_end(world)


def small_world(key_size: int = 2) -> RadixWorld:
    """DFlash is never chosen, and EAGLE-3 is always right: 5 tokens a round."""
    return RadixWorld(DRAFTERS["df-e3"], make_router("df-e3", "fixed:e3"), skill=1.0, key_size=key_size)


def without_finish(world: RadixWorld) -> None:
    world.decode.finish = lambda slot, committed: {}


def without_catch_up(world: RadixWorld) -> None:
    world.decode.catch_up = lambda *args: {}


def without_begin(world: RadixWorld) -> None:
    world.decode.backlog.begin = lambda slots, lens, last: None


def without_cut(world: RadixWorld) -> None:
    world.prepare_release = lambda request: world.decode.finish([request.row], [request.committed])


def with_a_late_drafter(world: RadixWorld) -> None:
    """DFlash sees nothing of a prompt."""
    prefill, late = world.decode.prefill, world.drafters["df"]

    def skip(*args: Any) -> None:
        ingest, late.ingest = late.ingest, lambda entries: None
        prefill(*args)
        late.ingest = ingest

    world.decode.prefill = skip


BREAKS: dict[Callable[[RadixWorld], None], str] = {
    without_finish: "df has a wrong entry in a shared slot",
    without_catch_up: "e3 reads position 3 wrong",
    without_begin: "keeps a wrong feature",
    without_cut: "a text is shared that nobody has",
    with_a_late_drafter: "df has a wrong entry in a shared slot",
}


def test_a_conversation_passes_the_checks() -> None:
    world = small_world()
    converse(world)
    assert world.seen["accepted behind the end"] and world.seen["ended with a backlog"]
    assert world.seen["hit of 14"]  # all 15 tokens of the first turn, but for the last one


@pytest.mark.parametrize("take_away", BREAKS)
def test_the_checks_notice(take_away: Callable[[RadixWorld], None]) -> None:
    world = small_world()
    take_away(world)
    with pytest.raises(AssertionError, match=BREAKS[take_away]):
        converse(world)


def test_keys_of_one_token_give_a_branch_an_entry_of_another_text() -> None:
    """Why EAGLE-3 needs bigram keys: its entry of the last shared position is made of the token behind it."""
    world = small_world(key_size=1)
    world.submit([0, 1, 2], max_tokens=12)
    world.prefill(1, budget=64)
    check(world)
    other = (world.requests[0].output[0] + 1) % VOCAB
    branch = world.submit([0, 1, 2, other], max_tokens=12)
    world.prefill(1, budget=64)
    with pytest.raises(AssertionError, match="e3 has a wrong entry in a shared slot"):
        check(world)
    with pytest.raises(AssertionError, match="e3 reads position 2 wrong"):
        world.run([branch])
