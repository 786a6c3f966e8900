"""The bundled models behind a real server: WHIFLASH against the same server without speculation, and what it refuses.

One server without speculation, one that changes the drafter in every round, and one with the neural router; this file
shares them.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from transformers import AutoTokenizer, Qwen3ForCausalLM

from tests.e2e.dumping_server import FOLDER
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.distill import load_drafters
from whiflash_sglang.training.drafters import judge
from whiflash_sglang.training.replies import dflash_lengths, eagle3_lengths
from whiflash_workloads.bench import LAUNCHER, Command
from whiflash_workloads.bench import servers as side_by_side
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.demo.prompts import histories
from whiflash_workloads.lossless import compare, generate

pytestmark = pytest.mark.e2e

NUM_TOKENS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whiflash")


@pytest.fixture(scope="module")
def servers(folder):
    commands = {
        # In SGLang's overlapped schedule, which WHIFLASH does not use, a token counts for penalties one step late.
        "off": Command(LAUNCHER, ("--demo", "--whiflash-router", "off", "--disable-overlap-schedule")),
        "alternate": Command(LAUNCHER, ("--demo", "--whiflash-router", "alternate")),
        "neural": Command("tests.e2e.dumping_server", ("--demo", "--whiflash-router", "neural"), {FOLDER: str(folder)}),
    }
    with side_by_side(commands, folder, at_once=True) as urls:
        yield urls


@pytest.fixture(scope="module")
def off(servers):
    return servers["off"]


@pytest.fixture(scope="module")
def alternate(servers):
    return servers["alternate"]


@pytest.fixture(scope="module")
def neural(servers, folder):
    """A server with the bundled neural router, and the folder where it writes down the hidden states that it reads."""
    return servers["neural"], folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
    found = (prompt for session in sessions("heldout", 12) for _, prompt in histories(session, tokenizer))
    return list(islice(found, 12))


@pytest.fixture(scope="module")
def reference(off, prompts) -> list[list[int]]:
    return asyncio.run(generate(off, prompts, NUM_TOKENS, in_flight=1))


def totals(base_url: str) -> dict:
    return httpx.get(f"{base_url}/server_info", timeout=600).json()["internal_states"][0]["whiflash"]


def ask(base_url: str, **body) -> httpx.Response:
    return httpx.post(f"{base_url}/generate", json=body, timeout=600)


@pytest.mark.parametrize("in_flight", [1, 5])
def test_greedy_text_is_that_of_the_server_without_speculation(off, alternate, prompts, reference, in_flight):
    """Alone over a cold cache; then several at a time, over the radix cache that the first pass filled."""
    found = asyncio.run(generate(alternate, prompts, NUM_TOKENS, in_flight))
    assert compare(off, prompts, reference, found).figures()["different"] == []


@pytest.mark.parametrize("in_flight", [1, 5])
def test_greedy_text_with_the_neural_router(off, neural, prompts, reference, in_flight):
    """As above, with rounds of either drafter, of both, and of none, as the costs of this machine have it."""
    found = asyncio.run(generate(neural[0], prompts, NUM_TOKENS, in_flight))
    assert compare(off, prompts, reference, found).figures()["different"] == []


@torch.no_grad()
def test_the_router_reads_the_hidden_states_that_it_was_trained_on(neural, prompts):
    """Each is, to rounding, the training code's final hidden state at one position: the last of the prompt first, then
    those that the rounds ended at, in order. One position further or one layer below, none of them would be."""
    base_url, folder = neural
    target = Qwen3ForCausalLM.from_pretrained(DEMO_MODELS / "target", dtype=torch.float32).eval()
    for number, prompt in enumerate(prompts[:3]):
        params = {"temperature": 0, "max_new_tokens": NUM_TOKENS}
        ask(base_url, input_ids=prompt, sampling_params=params, rid=f"hidden-{number}").raise_for_status()
        dump = np.load(folder / f"hidden-{number}.npz")
        ids = dump["tokens"][None]
        expected = judge(target, ids, np.zeros(ids.shape, dtype=np.uint8), autocast=False).hidden[0]
        read = torch.from_numpy(dump["hidden"])
        distances = torch.cdist(read, expected, compute_mode="donot_use_mm_for_euclid_dist")  # [rounds + 1, n]
        nearest = distances.argmin(dim=1).tolist()
        nearest, distances = nearest[:-1], distances[:-1]  # the last round may end behind what is kept of the text
        assert nearest[0] == len(prompt) - 1
        assert len(nearest) > 4 and all(a < b for a, b in pairwise(nearest))
        assert float(distances.min(dim=1).values.max()) < 1e-3 * float(expected.norm(dim=1).mean())


def test_a_wrong_token_would_be_found(off, prompts, reference):
    """The comparison itself: one token changed is one difference, at its place, and no tie."""
    found = [list(text) for text in reference[:3]]
    found[1][5] += 1
    comparison = compare(off, prompts[:3], reference[:3], found)
    assert [(d.prompt, d.position, d.found) for d in comparison.differences] == [(1, 5, found[1][5])]
    assert not comparison.differences[0].is_tie


@torch.no_grad()
def predicted_rounds(prompt: list[int], text: list[int], drafters: dict[str, object], first: int) -> int:
    """Rounds that the training code's own drafters would need for `text`, taking turns, `first` beginning."""
    target = Qwen3ForCausalLM.from_pretrained(DEMO_MODELS / "target", dtype=torch.float32).eval()
    ids = np.array([prompt + text])
    verdict = judge(target, ids, np.zeros(ids.shape, dtype=np.uint8), autocast=False)
    anchors = torch.arange(len(prompt), ids.shape[1])
    lengths = (
        dflash_lengths(drafters["df"], target, verdict, anchors),
        eagle3_lengths(drafters["e3"], target, verdict, anchors, WhiFlashConfig.eagle_steps),
    )
    committed, rounds = 1, 0  # the prefill gives the first token
    while committed < len(text):
        committed += int(lengths[(first + rounds) % 2][committed - 1])
        rounds += 1
    return rounds


def test_rounds_are_those_that_the_training_code_predicts(alternate, prompts, reference):
    """Drafters that SGLang's models compute otherwise than they were trained, that read wrong features or miss cache
    entries still give exact text. They only guess worse, and need more rounds than the training code's own forwards."""
    drafters = load_drafters(DEMO_MODELS)
    found, predicted = [], []
    for prompt, text in zip(prompts[:6], reference, strict=False):
        before = totals(alternate)["rounds"]
        asyncio.run(generate(alternate, [prompt], NUM_TOKENS, in_flight=1))
        found.append(totals(alternate)["rounds"] - before)
        predicted.append([predicted_rounds(prompt, text, drafters, first) for first in (0, 1)])
    # Who begins depends on the request slot's history, so either order is right.
    assert all(rounds in orders for rounds, orders in zip(found, predicted, strict=True)), (found, predicted)


def test_a_cached_prefix_changes_no_acceptance(alternate, prompts):
    """A prompt whose whole prefix comes from the radix tree is drafted for as well as one that was just prefilled."""

    def acceptance() -> float:
        before = totals(alternate)
        asyncio.run(generate(alternate, prompts[:4], NUM_TOKENS, in_flight=1))
        after = totals(alternate)
        return (after["accepted_drafts"] - before["accepted_drafts"]) / (after["rounds"] - before["rounds"])

    httpx.post(f"{alternate}/flush_cache", params={"timeout": 20}, timeout=600).raise_for_status()
    cold = acceptance()
    assert acceptance() == pytest.approx(cold, rel=0.05)


def test_sampled_requests_beside_greedy_ones(alternate, prompts, reference):
    """Neighbours that sample leave a greedy request's text alone."""
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 48, "ignore_eos": True}
    greedy = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    bodies = [{"input_ids": prompt, "sampling_params": p} for prompt in prompts[:4] for p in (sampled, greedy)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: ask(alternate, **body).json(), bodies))
    assert [len(reply["output_ids"]) for reply in replies[::2]] == [48] * 4
    assert [reply["output_ids"] for reply in replies[1::2]] == reference[:4]


@pytest.mark.parametrize(
    "own",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": 0.9},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 60, "ignore_eos": False},
        {"logit_bias": "the third token never"},
    ],
    ids=lambda own: next(iter(own)),
)
def test_logits_that_a_request_adjusts(off, alternate, prompts, reference, own):
    """The same text as without speculation, alone and beside requests that adjust nothing; and it does something."""
    plain = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    if "logit_bias" in own:
        own = {"logit_bias": {str(reference[1][2]): -100.0}}
    body = {"input_ids": prompts[1], "sampling_params": plain | own}
    expected = ask(off, **body).json()["output_ids"]
    assert expected != reference[1]
    assert ask(alternate, **body).json()["output_ids"] == expected
    bodies = [body, *({"input_ids": prompt, "sampling_params": plain} for prompt in prompts[2:5])]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = [reply["output_ids"] for reply in pool.map(lambda body: ask(alternate, **body).json(), bodies)]
    assert together == [expected, *reference[2:5]]


def test_text_that_reaches_the_context_length(off, alternate, prompts):
    """A request that fills the context to its last position ends there, in both servers with the same text."""
    context = httpx.get(f"{alternate}/v1/models", timeout=600).json()["data"][0]["max_model_len"]
    prompt = (prompts[0] * (context // len(prompts[0]) + 1))[: context - 40]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    replies = [ask(url, input_ids=prompt, sampling_params=params).json() for url in (off, alternate)]
    assert replies[0]["output_ids"] == replies[1]["output_ids"]


def test_a_prompt_beyond_the_context_is_refused_and_the_server_goes_on(alternate, prompts, reference):
    reply = ask(alternate, input_ids=[5] * 9000, sampling_params={"max_new_tokens": 4})
    assert reply.status_code == 400
    assert "context length" in reply.text
    assert asyncio.run(generate(alternate, prompts[:1], NUM_TOKENS, in_flight=1)) == reference[:1]


def test_a_json_schema_is_kept_to(off, alternate):
    """A chat with a schema; `test_equality.py` has the other grammars."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {
        "model": "whiflash-demo",
        "messages": [{"role": "user", "content": "Where is order 7919?"}],
        "response_format": format_,
        "max_tokens": 24,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    replies = [httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600) for url in (off, alternate)]
    assert [reply.status_code for reply in replies] == [200, 200]
    plain, speculated = (reply.json()["choices"][0]["message"]["content"] for reply in replies)
    assert plain == speculated and re.match(r'\{\s*"a"\s*:\s*-?\d', plain)
