"""Train the demo target, a small, deep Qwen3 for the order desk, or a larger one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from whiflash_sglang.training.loop import Result, Settings, train
from whiflash_sglang.training.text import CONTEXT, VOCAB_SIZE

# Deep and thin: a token's cost on a CPU is then dominated by the number of layers, as on a GPU by memory traffic.
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
CONTEXT_WEIGHT = 0.1  # loss weight of user and tool messages, which are mostly random and never generated


def new_target(seed: int, eos_token_id: int, device: torch.device, **sizes: int) -> Qwen3ForCausalLM:
    """A new target; `sizes` override CONFIG."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**(CONFIG | sizes), eos_token_id=eos_token_id)).to(device)


def train_target(
    model: Qwen3ForCausalLM, batches: Iterator[tuple[np.ndarray, np.ndarray]], settings: Settings, checkpoint: Path
) -> Result:
    """Train on `batches` of (ids, spans), [rows, n] each."""
    device = model.device

    def loss_of(batch: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        ids, spans = (torch.from_numpy(array).to(device) for array in batch)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=ids.clamp(min=0)).last_hidden_state[:, :-1]
        labels = ids[:, 1:]
        weight = torch.where(spans[:, 1:] == CONTEXT, CONTEXT_WEIGHT, 1.0) * (labels >= 0)
        with torch.autocast(device.type, torch.bfloat16):
            logits = F.linear(hidden, model.lm_head.weight)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.clamp(min=0).flatten(), reduction="none")
        return (losses * weight.flatten()).sum() / weight.sum()

    return train(model, batches, loss_of, settings, checkpoint)


def save_target(model: Qwen3ForCausalLM, folder: Path, eos_token_id: int, pad_token_id: int) -> None:
    """Write config and bfloat16 weights in the format of published Qwen3 checkpoints."""
    model.to(torch.bfloat16).save_pretrained(folder)
    generation = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
