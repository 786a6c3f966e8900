"""Both draft pools after a multi-turn replay against those of a cold server, position by position.

Tokens are drafted, verified and caught up with in one order, hit in the radix tree, retracted and prefilled in another;
what a drafter then has in its KV pool must be what one plain prefill of the same text gives. Text is exact whatever
stands there: a drafter that reads wrong entries only guesses worse, and nothing else would show it.

The servers write down what is in the pools whenever a request ends (tests/e2e/dumping_server.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("sglang")

from transformers import AutoTokenizer

from tests.e2e.dumping_server import FOLDER
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads.bench import Command
from whiflash_workloads.bench import servers as side_by_side
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.demo.prompts import histories

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-3  # absolute, float32: prefill and decode add up in another order
CONVERSATIONS = 4
MAX_TURNS = 4
PAGE_SIZE = 16
EOS = 2
READING = Lock()  # numpy parses headers with `ast`, which in Python 3.11 fails at times in several threads at once
# How answers end, in turn: by themselves, or within what a round has accepted.
ENDINGS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 96},
    {"max_new_tokens": 29},
    {"max_new_tokens": 96, "stop": ["."]},
    {"max_new_tokens": 96, "stop_token_ids": [261]},
    {"max_new_tokens": 34, "ignore_eos": True},
)
SERVERS = {
    # The drafter changes at random, and prompts come in several prefills.
    "random": (("--whiflash-router", "random:1", "--chunked-prefill-size", "128"), {}),
    # The tree shares whole pages, and a text goes on in one that is its own.
    "paged": (("--whiflash-router", "random:2", "--page-size", str(PAGE_SIZE)), {}),
    # DFlash is never chosen and lags behind up to a small bound; the pool is too small, and requests are retracted.
    "lagging": (
        ("--whiflash-router", "fixed:e3", "--whiflash-max-backlog", "16", "--max-total-tokens", "1536"),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"},
    ),
}


@dataclass(frozen=True)
class Answer:
    """A request that has ended, and what every drafter has for it."""

    rid: str
    prompt: list[int]
    output: list[int]
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]  # by drafter, layer and kind, [positions, kv_heads, head_dim]
    tokens: list[int]  # what is cached of the text

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output


@dataclass(frozen=True)
class Replay:
    talks: list[list[Answer]]  # by conversation, turn after turn
    branches: list[Answer]
    aborted: list[Answer]

    @property
    def turns(self) -> list[Answer]:
        return [answer for answers in self.talks for answer in answers]

    @property
    def all(self) -> list[Answer]:
        return [*self.turns, *self.branches, *self.aborted]


@dataclass(frozen=True)
class DumpingServer:
    name: str  # in SERVERS
    base_url: str
    folder: Path

    def ask(self, rid: str, prompt: list[int], extra_key: str | None = None, **params: Any) -> Answer:
        body = {"rid": rid, "input_ids": prompt, "sampling_params": {"temperature": 0, **params}}
        body |= {"extra_key": extra_key} if extra_key else {}
        reply = httpx.post(f"{self.base_url}/generate", json=body, timeout=600)
        reply.raise_for_status()
        return self.answer(rid, prompt, reply.json())

    def answer(self, rid: str, prompt: list[int], reply: dict[str, Any]) -> Answer:
        with READING, np.load(self.folder / f"{rid}.npz") as file:
            arrays = dict(file)
        tokens = arrays.pop("tokens").tolist()
        return Answer(rid, prompt, reply["output_ids"], reply["meta_info"], arrays, tokens)

    def ask_and_abort(self, rid: str, prompt: list[int]) -> Answer:
        """Abort a long answer when its first tokens have come."""
        params = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True}
        body = {"rid": rid, "input_ids": prompt, "sampling_params": params, "stream": True}
        last: dict[str, Any] = {}
        with httpx.stream("POST", f"{self.base_url}/generate", json=body, timeout=600) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                if not last:
                    httpx.post(f"{self.base_url}/abort_request", json={"rid": rid}, timeout=600).raise_for_status()
                last = json.loads(line.removeprefix("data: "))
        return self.answer(rid, prompt, last)

    def cold(self, rid: str, tokens: list[int]) -> Answer:
        """The same text in a name space of its own, where nothing is cached: one prefill ingests all of it."""
        answer = self.ask(f"cold-{rid}", tokens, extra_key=f"cold-{rid}", max_new_tokens=1)
        assert answer.meta["cached_tokens"] == 0
        return answer


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[dict[str, DumpingServer]]:
    folder = tmp_path_factory.mktemp("dumps")
    commands = {}
    for name, (flags, environment) in SERVERS.items():
        (folder / name).mkdir()
        own = {FOLDER: str(folder / name), **environment}
        commands[name] = Command("tests.e2e.dumping_server", ("--demo", *flags), own)
    with side_by_side(commands, folder, at_once=True) as urls:
        yield {name: DumpingServer(name, url, folder / name) for name, url in urls.items()}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, servers) -> DumpingServer:
    return servers[request.param]


@pytest.fixture(scope="module")
def conversations() -> list[list[list[int]]]:
    """The user's turns of held-out sessions as token ids: a first prompt, then what follows an answer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
    found = []
    for session in sessions("heldout", CONVERSATIONS):
        prompts = list(islice((prompt for _, prompt in histories(session, tokenizer)), MAX_TURNS))
        added = [after[len(before) :] for before, after in pairwise(prompts)]
        found.append([prompts[0], *(turn[turn.index(EOS) + 1 :] for turn in added)])
    return found


def converse(server: DumpingServer, number: int, turns: list[list[int]]) -> list[Answer]:
    answers: list[Answer] = []
    text: list[int] = []
    for i, turn in enumerate(turns):
        if text and text[-1] != EOS:
            text = [*text, EOS]
        prompt = text + turn
        answers.append(server.ask(f"{number}-{i}", prompt, **ENDINGS[(number + i) % len(ENDINGS)]))
        text = answers[-1].text
    return answers


def branch(server: DumpingServer, first: Answer, second: Answer) -> list[Answer]:
    """Prompts that leave the first turn's text at some place: within a turn, at the end of the prompt or the answer."""
    end, cached = len(first.prompt), len(first.tokens)
    found = []
    for place in (end - 60, end - 1, end, end + 1, cached - 1, cached):
        # The second turn goes on with the first one's text: here stands what the tree has after it.
        other = [token for token in second.prompt[-20:] if token != second.prompt[place]]
        prompt = first.text[:place] + other
        found.append(server.ask(f"branch-{first.rid}-{place}", prompt, max_new_tokens=20))
    return found


@pytest.fixture(scope="module")
def replay(server, conversations) -> Replay:
    """All requests whose pools are looked at."""
    with ThreadPoolExecutor(CONVERSATIONS) as pool:
        talks = list(pool.map(lambda item: converse(server, *item), enumerate(conversations)))
        branches = [branch(server, *answers[:2]) for answers in talks[:2]]
        # Side by side, so that rounds go on with the one when the other leaves them.
        prompts = [answers[-1].prompt for answers in talks[:2]]
        aborted = list(pool.map(server.ask_and_abort, ("aborted-0", "aborted-1"), prompts))
    return Replay(talks, [answer for answers in branches for answer in answers], aborted)


def gaps(answer: Answer, cold: Answer) -> dict[str, float]:
    """The largest absolute difference in each pool. EAGLE-3's entry of the last position is made of a next token that
    need not be the same, and the tree does not share it either."""
    n = len(answer.tokens)
    assert cold.tokens[:n] == answer.tokens
    shared = {name: n - 1 if name.startswith("e3") else n for name in answer.arrays}
    return {
        name: float(np.abs(answer.arrays[name][:end] - cold.arrays[name][:end]).max()) for name, end in shared.items()
    }


def far_from_cold(server: DumpingServer, answers: list[Answer]) -> dict[str, dict[str, float]]:
    """By request, the pools that are further than rounding from those of a cold server."""
    found = {}
    for answer in answers:
        wide = gaps(answer, server.cold(answer.rid, answer.tokens))
        assert set(wide) == {f"{drafter}.{kind}" for drafter in ("df.0", "df.1", "e3.0") for kind in "kv"}
        if far := {name: gap for name, gap in wide.items() if not gap <= TOLERANCE}:  # a NaN is far, too
            found[answer.rid] = far
    return found


def test_pools_after_a_conversation_are_those_of_a_cold_server(server, replay):
    """Turn by turn, with every way to end."""
    assert far_from_cold(server, replay.turns) == {}


def test_pools_of_prompts_that_leave_a_cached_text(server, replay):
    """EAGLE-3's entry at the end of a shared prefix is made of the next token, which is another one in each branch."""
    assert far_from_cold(server, replay.branches) == {}


def test_pools_of_aborted_requests(server, replay):
    assert [answer.meta["finish_reason"]["type"] for answer in replay.aborted] == ["abort", "abort"]
    assert all(0 < len(answer.output) < 600 for answer in replay.aborted)
    assert far_from_cold(server, replay.aborted) == {}


def test_a_wrong_entry_would_be_found(server, replay):
    """The comparison itself: entries one position off, in every pool, are far from the cold ones."""
    answer = replay.turns[0]
    shifted = replace(answer, arrays={name: np.roll(array, 1, axis=0) for name, array in answer.arrays.items()})
    assert min(gaps(shifted, server.cold("shifted", answer.tokens)).values()) > 100 * TOLERANCE


def test_every_later_turn_hits_the_radix_cache(replay):
    assert all(answer.meta["cached_tokens"] > 0 for answers in replay.talks for answer in answers[1:])


@pytest.mark.parametrize("server", ["random", "paged"], indirect=True, scope="module")
def test_a_hit_reaches_to_the_branch(server, replay):
    """A position is shared together with the token after it, so that a hit ends one before the first other token, or
    with the last whole page before it. The pool of `lagging` no longer holds what an earlier request left."""
    page_size = PAGE_SIZE if server.name == "paged" else 1
    for answer in replay.branches:
        place = int(answer.rid.rpartition("-")[2])
        assert answer.meta["cached_tokens"] == (place - 1) // page_size * page_size, answer.rid


def test_what_is_cached_never_exceeds_the_answer(replay):
    """A round accepts tokens beyond a stop or the last allowed token. In the tree they would be a text nobody wrote.

    They are cut off, so that the last token of every answer is the one that no drafter and no target has read yet.
    """
    for answer in replay.all:
        assert answer.tokens == answer.text[:-1], answer.rid
    reasons = [answer.meta["finish_reason"]["type"] for answer in replay.all]
    assert reasons.count("stop") >= 2 and reasons.count("length") >= 2


def test_a_request_shows_its_own_figures(server, replay):
    """Those since its last prefill, where it was retracted."""
    for answer in replay.turns:
        (figures,) = answer.meta["whiflash"]
        assert figures["rounds"] == sum(figures["rounds_by_drafter"].values())
        assert 0 <= figures["accepted_drafts"] <= figures["drafted"]
        assert set(figures["catch_up"]) >= {"passes", "tokens", "ms"}
        if server.name == "lagging":
            assert set(figures["rounds_by_drafter"]) <= {"e3"} and figures["switches"] == 0
            assert figures["backlog_max"] <= 16
        else:
            assert 0 <= figures["switches"] < figures["rounds"]
            # The prefill gives the first token, and every round one and what it accepted.
            assert figures["rounds"] + figures["accepted_drafts"] + 1 >= len(answer.output)


def test_requests_were_retracted(server, replay):
    retractions = sum(answer.meta["num_retractions"] for answer in replay.turns)
    assert (retractions > 0) == (server.name == "lagging")


@pytest.mark.parametrize("server", ["lagging"], indirect=True, scope="module")
def test_a_request_that_alone_fills_the_pool_ends_there(server):
    """The other pools are as large as the context."""
    answer = server.ask("large", [5] * 1200, max_new_tokens=3000, ignore_eos=True)
    assert answer.meta["finish_reason"]["type"] == "length"
    assert 1536 - 16 < answer.meta["prompt_tokens"] + len(answer.output) <= 1536
