"""SGLang's unmodified server on the CPU platform against the reference implementation on the same weights.

Tiny random models, built on the fly; one server for each dtype, each for this file only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("sglang")

from transformers import AutoModelForCausalLM

from tests.tiny_models import VOCAB_SIZE, TinyModels, build
from whiflash_workloads.server import running_server

pytestmark = pytest.mark.e2e

NUM_TOKENS = 48
# Smaller than most prompts, so that they are prefilled in several chunks, mixed with others' decoding.
CHUNKED_PREFILL_SIZE = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> TinyModels:
    return build(tmp_path_factory.mktemp("models"))


def serve(models: TinyModels, log: Path, dtype: str):
    arguments = {
        "--model-path": models.target,
        "--dtype": dtype,
        "--max-total-tokens": 20000,
        "--chunked-prefill-size": CHUNKED_PREFILL_SIZE,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    return running_server("sglang.launch_server", *flat, "--enable-mixed-chunk", log=log)


@pytest.fixture(scope="module")
def float32_server(models, tmp_path_factory):
    with serve(models, tmp_path_factory.mktemp("float32") / "server.log", "float32") as base_url:
        yield base_url


def generate(base_url: str, prompt: list[int], num_tokens: int = NUM_TOKENS) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    reply = httpx.post(f"{base_url}/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=600)
    reply.raise_for_status()
    return reply.json()


def prompts_with_shared_prefixes() -> list[list[int]]:
    """Lengths from 1 to a few chunks; most begin with some of the same 90 tokens."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(8, VOCAB_SIZE, (count,), generator=generator).tolist()

    base = tokens(90)
    shapes = [(0, 1), (0, 5), (40, 3), (90, 60), (90, 1), (20, 200), (90, 150), (60, 30)]
    return [base[:shared] + tokens(own) for shared, own in shapes]


@pytest.fixture(scope="module")
def expected(models) -> list[list[int]]:
    """Greedy tokens of the reference implementation, one prompt at a time, without a server."""
    model = AutoModelForCausalLM.from_pretrained(models.target, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts_with_shared_prefixes():
        with torch.no_grad():
            output = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def test_greedy_tokens_equal_the_reference(float32_server, expected):
    """Eight at a time over a cold cache, then one by one over the radix cache that the first pass filled."""
    prompts = prompts_with_shared_prefixes()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: generate(float32_server, prompt), prompts))
    alone = [generate(float32_server, prompt) for prompt in prompts]
    assert [reply["output_ids"] for reply in together] == expected
    assert [reply["output_ids"] for reply in alone] == expected
    # All of a repeated prompt but its last token comes from the cache.
    cached = [reply["meta_info"]["cached_tokens"] for reply in alone]
    assert cached == [len(prompt) - 1 for prompt in prompts]


def test_chat_completion_streams(float32_server):
    """The tokenizer, the chat template and the stream work end to end."""
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Ada wants to check the order."}],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{float32_server}/v1/chat/completions", json=request, timeout=600) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert '"prompt_tokens":' in lines[-2]


def test_bfloat16_answers(models, tmp_path, expected):
    """Rounded weights change the text sooner or later; the first tokens of most prompts stay the same."""
    with serve(models, tmp_path / "server.log", "bfloat16") as base_url:
        replies = [generate(base_url, prompt, num_tokens=8)["output_ids"] for prompt in prompts_with_shared_prefixes()]
    assert all(len(reply) == 8 for reply in replies)
    same_first = sum(reply[0] == reference[0] for reply, reference in zip(replies, expected, strict=True))
    assert same_first >= len(replies) // 2
