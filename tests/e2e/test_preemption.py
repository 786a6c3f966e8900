"""A request that matters more takes the place of others in the middle of their texts. What they had said and drafted is
dropped and prefilled again, and each text is that of the server without speculation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from whiflash_workloads.bench import demo_servers
from whiflash_workloads.stress.servers import wait_until_free
from whiflash_workloads.tokens import ask, heldout_histories

pytestmark = pytest.mark.e2e

SLOTS = 6000
FLAGS = (
    *("--context-length", "2048", "--max-total-tokens", str(SLOTS), "--max-running-requests", "2"),
    *("--enable-priority-scheduling", "--default-priority-value", "0"),
    *("--priority-scheduling-preemption-threshold", "1"),
)
ROUTERS = ("random:1", "entropy", "neural")
LONG, SHORT = 400, 40  # tokens
ROUNDS = 5

TokenIds = list[int]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    flags = {router: (*FLAGS, "--whiflash-router", router) for router in ("off", *ROUTERS)}
    with demo_servers(flags, tmp_path_factory.mktemp("preemption"), at_once=True) as urls:
        yield urls


@pytest.fixture(scope="module")
def prompts() -> list[TokenIds]:
    return [histories[0] for histories in heldout_histories(4)]


@pytest.fixture(scope="module")
def texts(servers: dict[str, str], prompts: list[TokenIds]) -> list[TokenIds]:
    """What follows each prompt, without speculation and with nobody in the way."""
    return ask(servers["off"], prompts, LONG, sampling={"ignore_eos": True}).texts


def stream(base_url: str, prompt: TokenIds, num_tokens: int, priority: int, began: Event) -> dict[str, Any]:
    """The last chunk of a reply; `began` is set with its first one."""
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True, "priority": priority}
    last: dict[str, Any] = {}
    with httpx.stream("POST", f"{base_url}/generate", json=body, timeout=600) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
                began.set()
    return last


@pytest.mark.parametrize("router", ROUTERS)
def test_texts_of_requests_that_were_preempted(
    servers: dict[str, str], prompts: list[TokenIds], texts: list[TokenIds], router: str
) -> None:
    """Again until it has happened to both requests that ran, as a fast machine may have ended one of them before."""
    preempted = [0, 0]
    for _ in range(ROUNDS):
        began = [Event(), Event()]
        with ThreadPoolExecutor(4) as pool:
            less = [pool.submit(stream, servers[router], prompts[i], LONG, 0, began[i]) for i in (0, 1)]
            assert all(event.wait(60) for event in began)
            more = [pool.submit(stream, servers[router], prompts[i], SHORT, 10, Event()) for i in (2, 3)]
            urgent = [one.result(120) for one in more]
            others = [one.result(120) for one in less]
        assert [one["output_ids"] for one in others] == texts[:2]
        assert [one["output_ids"] for one in urgent] == [text[:SHORT] for text in texts[2:]]
        assert [one["meta_info"]["num_retractions"] for one in urgent] == [0, 0]
        counts = [one["meta_info"]["num_retractions"] for one in others]
        preempted = [before + count for before, count in zip(preempted, counts, strict=True)]
        if all(preempted):
            break
    assert all(preempted), preempted
    assert wait_until_free(servers[router]) == wait_until_free(servers["off"])
    assert httpx.get(f"{servers[router]}/whiflash/stats", timeout=600).json()["accepted_drafts"] > 0
