"""More than one process: two ranks of one model (`--tp-size 2`), and two replicas (`--dp-size 2`), against one process.

The ranks are served with the router that the second rank would be first to disagree with: the bundled models' default,
which weighs what this machine's clock says and throws a coin now and then. Three servers, shared by this file.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from whiflash_workloads.lossless import compare, generate
from whiflash_workloads.server import start
from whiflash_workloads.tokens import ask, heldout_histories

pytestmark = pytest.mark.e2e

LAUNCHER = "whiflash_sglang.launch_server"
FLAGS = {
    "off": ("--whiflash-router", "off"),
    "tp": ("--tp-size", "2"),
    "dp": ("--dp-size", "2", "--whiflash-router", "alternate"),
}
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Base URLs by name. They start side by side, as each waits for its own processes most of the time."""
    logs = tmp_path_factory.mktemp("processes")
    with contextlib.ExitStack() as stack:
        running = {}
        for name, flags in FLAGS.items():
            running[name] = start(LAUNCHER, "--demo", *flags, log=logs / f"{name}.log")
            stack.callback(running[name].stop)
        for server in running.values():
            server.wait_until_ready()
        yield {name: server.base_url for name, server in running.items()}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt for histories in heldout_histories(3) for prompt in histories][:6]


@pytest.fixture(scope="module")
def reference(servers: dict[str, str], prompts: list[list[int]]) -> list[list[int]]:
    return asyncio.run(generate(servers["off"], prompts, NUM_TOKENS, in_flight=1))


def stats(base_url: str) -> dict[str, Any]:
    reply = httpx.get(f"{base_url}/whiflash/stats", timeout=600)
    reply.raise_for_status()
    return dict(reply.json())


def routed(route: str) -> dict[str, Any]:
    return {"ignore_eos": True, "custom_params": {"whiflash": {"route": route}}}


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("name", ["tp", "dp"])
def test_greedy_text_is_that_of_one_process(servers, prompts, reference, name, in_flight):
    """Ranks add up their parts of a layer in another order than one process does: ties are excused, nothing else is."""
    found = asyncio.run(generate(servers[name], prompts, NUM_TOKENS, in_flight))
    assert compare(servers["off"], prompts, reference, found).figures()["different"] == []


@pytest.mark.parametrize("route", ["e3", "df"])
def test_drafters_in_parts_guess_as_well_as_whole_ones(servers, prompts, route):
    """A drafter of which a rank holds half the heads, and half the target's head, still gives exact text if it is cut
    up wrongly: only its acceptance length falls."""
    whole, parts = (
        ask(servers[name], prompts, NUM_TOKENS, 3, routed(route)).acceptance_length for name in ("dp", "tp")
    )
    assert whole > 1.5
    assert parts == pytest.approx(whole, rel=0.05)


def test_ranks_did_the_same_rounds(servers, prompts):
    """Sampled and greedy requests at once, in rounds of either drafter. A rank that had drafted with another one, or
    sampled another token, would have another digest, if the server had not stopped before."""
    before = stats(servers["tp"])["ranks"]
    sampled = {"temperature": 1.2, "top_p": 0.95, "max_new_tokens": 48, "ignore_eos": True}
    greedy = {"temperature": 0, "max_new_tokens": 48}
    bodies = [
        {"input_ids": prompt, "sampling_params": {**params, "custom_params": {"whiflash": {"route": route}}}}
        for prompt, route in zip(prompts, ("e3", "df", "auto") * 2, strict=True)
        for params in (sampled, greedy | {"ignore_eos": True})
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(
            pool.map(lambda body: httpx.post(f"{servers['tp']}/generate", json=body, timeout=600).json(), bodies)
        )
    assert [len(reply["output_ids"]) for reply in replies] == [48] * len(bodies)
    seen = stats(servers["tp"])
    assert seen["ranks"]["size"] == 2 and seen["ranks"]["corrected"] == [0, 0]
    first, second = seen["ranks"]["digests"]
    assert first == second != before["digests"][0]
    assert {"df", "e3"} <= seen["rounds_by_drafter"].keys()
    assert seen["round_ms"], "the first rank's measurements decide"


def test_both_replicas_serve_and_their_figures_add_up(servers, prompts):
    before = stats(servers["dp"])
    asked = ask(servers["dp"], prompts, NUM_TOKENS, 3, {"ignore_eos": True})
    after = stats(servers["dp"])
    rounds = [new["rounds"] - old["rounds"] for new, old in zip(after["replicas"], before["replicas"], strict=True)]
    assert len(rounds) == 2 and min(rounds) > 0
    assert sum(rounds) == after["rounds"] - before["rounds"] == asked.totals["rounds"]
    assert [replica["ranks"]["replica"] for replica in after["replicas"]] == [0, 1]


def test_a_requests_figures_are_found_whichever_replica_served_it(servers, prompts):
    for _ in range(2):
        body = {"input_ids": prompts[0], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        reply = httpx.post(f"{servers['dp']}/generate", json=body, timeout=600).json()
        figures = httpx.get(f"{servers['dp']}/whiflash/requests/{reply['meta_info']['id']}", timeout=600)
        assert figures.status_code == 200 and figures.json()["completion_tokens"] == 8
