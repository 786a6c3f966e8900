"""Targets of each family other than the demo's: tiny random ones, with drafters made for them.

The text is that of the server without speculation, and of the family's implementation in Transformers. Random drafters
are hardly ever right, so that nothing in the text would show what they read: their pools do. A drafter's keys and
values are functions of the target's captured layers, and are computed here from the hidden states of Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny_models
from tests.e2e.dumping_server import FOLDER
from whiflash_sglang.training.distill import load_drafters
from whiflash_sglang.training.drafters import judge
from whiflash_sglang.training.layers import Rope
from whiflash_workloads.server import start

pytestmark = pytest.mark.e2e

LAUNCHER = "whiflash_sglang.launch_server"
NUM_TOKENS = 32
TOLERANCE = 1e-3
PROMPTS = ([5, 6, 7, 9, 20, 40], [100, 200, 300, 23, 45], list(range(30, 70)))
FLAGS = ("--dtype=float32", "--max-total-tokens=4096", "--max-running-requests=4", "--skip-server-warmup")


@dataclass(frozen=True)
class Family:
    off: str  # base URLs
    alternate: str
    models: Path
    dumps: Path

    def target(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.models / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp(request.param)
    paths = tiny_models.build(folder, family=request.param)
    models = ("--model-path", str(paths.target), "--speculative-draft-model-path", str(paths.dflash))
    flags = (*models, "--whiflash-eagle-draft", str(paths.eagle3), *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        running = [
            start(module, *flags, "--whiflash-router", router, log=folder / f"{router}.log")
            for router, module in (("off", LAUNCHER), ("alternate", "tests.e2e.dumping_server"))
        ]
    try:
        for server in running:
            server.wait_until_ready()
        yield Family(running[0].base_url, running[1].base_url, folder, folder)
    finally:
        for server in running:
            server.stop()


def greedy(base_url: str, prompt: list[int], rid: str) -> list[int]:
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "rid": rid}
    reply = httpx.post(f"{base_url}/generate", json=body, timeout=600)
    reply.raise_for_status()
    return list(reply.json()["output_ids"])


@torch.no_grad()
def greedy_of(target: PreTrainedModel, prompt: list[int]) -> list[int]:
    text = list(prompt)
    for _ in range(NUM_TOKENS):
        text.append(int(target(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_text_is_that_of_the_server_without_speculation(family):
    target = family.target()
    for number, prompt in enumerate(PROMPTS):
        expected = greedy(family.off, prompt, f"off-{number}")
        assert greedy(family.alternate, prompt, f"text-{number}") == expected
        assert greedy_of(target, prompt) == expected


@torch.no_grad()
def test_drafters_read_the_layers_that_they_were_made_for(family):
    """DFlash's K and V of each layer, and EAGLE-3's, at every position of a text that both drafters took turns in."""
    greedy(family.alternate, PROMPTS[0], "pools")
    dump = np.load(family.dumps / "pools.npz")
    ids = dump["tokens"][None]
    target, drafters = family.target(), load_drafters(family.models)
    verdict = judge(target, ids, np.zeros(ids.shape, dtype=np.uint8), autocast=False)
    positions = torch.arange(ids.shape[1])

    def features(drafter):
        return drafter.fc(verdict.features[:, :, list(drafter.layer_ids)].flatten(2))

    def check(name: str, computed: tuple[torch.Tensor, torch.Tensor], end: int) -> None:
        for kind, expected in zip("kv", computed, strict=True):
            found = torch.from_numpy(dump[f"{name}.{kind}"])[:end]  # [positions, kv_heads, head_dim]
            distance = (found - expected[0].transpose(0, 1)[:end]).abs().max()
            assert distance < TOLERANCE, f"{name}.{kind}"

    df = drafters["df"]
    rope = Rope(df.shape.head_dim, df.shape.theta, verdict.ids.device)
    context = df.hidden_norm(features(df))
    for number, layer in enumerate(df.layers):
        check(f"df.{number}", layer.self_attn.keys(context, positions, rope), ids.shape[1])
    e3 = drafters["e3"]
    joined = e3.join(target.get_input_embeddings()(verdict.ids.roll(-1, dims=1)), features(e3))
    # The entry of the last position is made of a token that is not in the text.
    check("e3.0", e3.self_attn.keys(joined, positions, rope), ids.shape[1] - 1)
