"""Sampled requests on real servers: seeds, and the distribution of what comes out, by every route and in mixed batches.

With `--enable-deterministic-inference` SGLang samples with noise that is a hash of seed, position and token. The token
that a seeded request gets at a position is then a function of its text so far, whoever drafted and whatever stands
beside it: the text is the same with and without speculation. Seeds also make the p-values here the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("sglang")

from transformers import AutoModelForCausalLM, PreTrainedModel

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.continuations import Sampling, continuations, joint_p_value, open_place
from whiflash_workloads import sampled
from whiflash_workloads.bench import demo_servers
from whiflash_workloads.tokens import heldout_histories

pytestmark = pytest.mark.e2e

SEEDS = "--enable-deterministic-inference"
ROUTES = ("e3", "df", "off", "auto")
LENGTH = 4
SAMPLINGS = (Sampling(0.7, 8, 0.95), Sampling(1.3, 8, 0.9))
COUNT = 200  # continuations by route and sampling; scripts/check_distribution.py counts more

ROUTERS = ("random:1", "entropy", "neural")

Urls = tuple[str, ...]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    """Without speculation, and with each router; all sample by seeds."""
    folder: Path = tmp_path_factory.mktemp("sampling")
    flags = {router: (SEEDS, "--whiflash-router", router) for router in ("off", *ROUTERS)}
    with demo_servers(flags, folder, at_once=True) as urls:
        yield tuple(urls.values())


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODELS / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [histories[0] for histories in heldout_histories(2)]


def ask(base_url: str, prompt: list[int], **params: object) -> httpx.Response:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 48, "ignore_eos": True, **params}}
    return httpx.post(f"{base_url}/generate", json=body, timeout=600)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_seed_gives_the_same_text_by_every_route_and_in_any_batch(servers, prompts, router):
    off, drafted = servers[0], servers[1 + ROUTERS.index(router)]
    kinds = [
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "sampling_seed": 7},
        {"temperature": 1.2, "sampling_seed": 7},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.02},  # SGLang's own seed
    ]
    cases = [(prompt, kind) for prompt in prompts[:2] for kind in kinds]
    expected = [ask(off, prompt, **kind).json()["output_ids"] for prompt, kind in cases]
    routed = [
        (prompt, kind | {"custom_params": {"whiflash": {"route": route}}}) for route in ROUTES for prompt, kind in cases
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda case: ask(drafted, case[0], **case[1]).json()["output_ids"], routed))
    assert together == expected * len(ROUTES)
    alone = [ask(drafted, prompt, **kind).json()["output_ids"] for prompt, kind in cases]
    assert alone == expected
    others = [ask(drafted, prompt, **(kind | {"sampling_seed": 8})).json()["output_ids"] for prompt, kind in cases]
    assert sum(text != other for text, other in zip(expected, others, strict=True)) >= len(cases) - 1


def test_the_chat_api_takes_seeds_too(servers):
    body = {"model": "whiflash-demo", "temperature": 1.0, "seed": 11, "max_tokens": 32}
    body["messages"] = [{"role": "user", "content": "Where is order 1042?"}]
    texts = []
    for url in (*servers, servers[1]):
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        reply.raise_for_status()
        texts.append(reply.json()["choices"][0]["message"])
    assert texts[0] == texts[1] == texts[2]


def test_continuations_have_the_targets_distribution(servers, target, prompts):
    """Seeded samples against exact probabilities, batches that mix routes and parameters."""
    prompt = open_place(target, prompts[0], max_new_tokens=40, ahead=2)
    exact = {sampling: continuations(target, prompt, LENGTH, sampling) for sampling in SAMPLINGS}
    kinds = {
        (route, sampling): {**sampling.params(), "custom_params": {"whiflash": {"route": route}}}
        for route in ROUTES
        for sampling in SAMPLINGS
    }
    counts = sampled.count(servers[1], prompt, LENGTH, kinds, COUNT, seeded=True)
    for route in ROUTES:
        found = joint_p_value((counts[route, sampling], exact[sampling]) for sampling in SAMPLINGS)
        assert found > 0.01, route
