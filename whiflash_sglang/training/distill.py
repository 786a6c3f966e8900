"""Losses, training loops and checkpoint files of the two drafters in `drafters.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from whiflash_sglang.training.drafters import DFlash, DrafterShape, Eagle3, Verdict, judge
from whiflash_sglang.training.loop import Result, Settings, train
from whiflash_sglang.training.text import CONTEXT, REASONING

Batches = Iterator[tuple[np.ndarray, np.ndarray]]

EAGLE3_STEPS = 7
STEP_DECAY = 0.85
# Each drafter is trained for the round starts that an entropy router assigns to it: EAGLE-3 for anchors above
# OPEN_NATS, DFlash for those below. Trained on all of them, DFlash was better everywhere (docs/log.md).
OPEN_NATS = 0.4
EAGLE3_SETTLED = 0.2  # weight of anchors below OPEN_NATS
DFLASH_OPEN = 0.02  # weight of anchors above OPEN_NATS


def reply_weights(verdict: Verdict) -> torch.Tensor:
    """Loss weight of each token [rows, n]: 1 for generated text, 0 for context and padding."""
    return ((verdict.spans != CONTEXT) & (verdict.ids >= 0)).float()


def anchor_weights(
    verdict: Verdict, weights: torch.Tensor, settled: float, open_: float, reasoning: float
) -> torch.Tensor:
    """Weight of each position [rows, n] as an anchor, by the target's entropy at its choice and by span."""
    is_open = (verdict.entropy > OPEN_NATS).roll(1, dims=1)  # anchor a was chosen after a - 1
    by_span = torch.where(verdict.spans == REASONING, reasoning, 1.0)
    return shifted(weights, 1) * torch.where(is_open, open_, settled) * by_span


def shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """`values` [rows, n] at position + `by`, zero beyond the end."""
    result = torch.zeros_like(values)
    result[:, : values.shape[1] - by] = values[:, by:]
    return result


def eagle3_loss(
    model: Eagle3, embed: torch.nn.Module, verdict: Verdict, num_chains: int, reasoning: float = 1.0
) -> torch.Tensor:
    """Cross-entropy with the target's choices, over the steps of chains from random entries (a scalar).

    Step k (from 0) of the chain at entry i predicts token i + 2 + k, which the target chooses after token i + 1 + k.
    It has weight only while tokens i + 2 .. i + 1 + k are the target's own choices.
    """
    to_draft = torch.full((model.shape.vocab,), -100, device=verdict.ids.device)
    to_draft[model.draft_tokens] = torch.arange(len(model.draft_tokens), device=verdict.ids.device)
    weights = reply_weights(verdict)
    starts = anchor_weights(verdict, weights, settled=EAGLE3_SETTLED, open_=1.0, reasoning=reasoning)
    entries = pick_anchors(starts, num_chains, EAGLE3_STEPS + 2) - 1  # entry i is anchored at i + 1
    alive = torch.ones_like(verdict.follows)
    total = norm = torch.zeros((), device=verdict.ids.device)
    for step, logits in enumerate(model.chains(embed, verdict, EAGLE3_STEPS, entries)):
        if step:
            alive = alive & shifted(verdict.follows, step + 1)
        labels = to_draft[shifted(verdict.choices, step + 1)].gather(1, entries)
        weight = (shifted(weights, step + 2) * alive).gather(1, entries) * (labels >= 0) * STEP_DECAY**step
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
        total = total + (losses * weight.flatten()).sum()
        norm = norm + weight.sum()
    return total / norm


def dflash_loss(
    model: DFlash,
    embed: torch.nn.Module,
    head: torch.Tensor,
    verdict: Verdict,
    num_anchors: int,
    reasoning: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy with the target's choices, over blocks at random anchors (a scalar).

    Entry j (from 0) of the block at anchor a predicts token a + 1 + j, which the target chooses after token a + j. It
    has weight only while tokens a + 1 .. a + j are the target's own choices.
    """
    weights = reply_weights(verdict)
    starts = anchor_weights(verdict, weights, settled=1.0, open_=DFLASH_OPEN, reasoning=reasoning)
    anchors = pick_anchors(starts, num_anchors, model.block)
    logits = model.blocks(embed, head, verdict, anchors)
    offsets = torch.arange(model.block - 1, device=anchors.device)
    at = (anchors[:, :, None] + offsets).flatten(1)  # positions a + j
    shape = (*anchors.shape, model.block - 1)
    labels = verdict.choices.gather(1, at).view(shape)
    follows = verdict.follows.gather(1, at).view(shape).clone()
    follows[:, :, 0] = True  # the anchor is given
    weight = shifted(weights, 1).gather(1, at).view(shape) * follows.cumprod(dim=2) * STEP_DECAY**offsets
    losses = F.cross_entropy(logits.flatten(0, 2).float(), labels.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def pick_anchors(weights: torch.Tensor, count: int, block: int) -> torch.Tensor:
    """Random anchors [rows, count] in proportion to `weights` [rows, n], at least `block` before the end."""
    usable = weights.clone()
    usable[:, -block:] = 0
    usable[:, 0] = 0
    usable[usable.sum(1) == 0, 1] = 1.0  # rows without a reply get anchors of weight zero
    return usable.multinomial(count, replacement=True)


def new_eagle3(target: Qwen3ForCausalLM, layer_ids: tuple[int, ...], draft_tokens: torch.Tensor) -> Eagle3:
    """A new EAGLE-3 drafter, initialized from the target."""
    torch.manual_seed(1)
    model = Eagle3(DrafterShape.of(target.config), layer_ids, draft_tokens).to(target.device)
    model.start_from(target)
    return model


def train_eagle3(
    model: Eagle3,
    target: Qwen3ForCausalLM,
    batches: Batches,
    settings: Settings,
    checkpoint: Path,
    reasoning: float = 1.0,
) -> Result:
    """Train on the target's replies; `reasoning`: weight of rounds that begin in it, against all others."""
    embed = target.get_input_embeddings()

    def loss_of(batch: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        verdict = judge(target, *batch)
        with torch.autocast(target.device.type, torch.bfloat16):
            return eagle3_loss(model, embed, verdict, num_chains=192, reasoning=reasoning)

    return train(model, batches, loss_of, settings, checkpoint)


def new_dflash(
    target: Qwen3ForCausalLM, layer_ids: tuple[int, ...], layers: int, block: int, mask_token: int
) -> DFlash:
    """A new DFlash drafter, initialized from the target."""
    torch.manual_seed(2)
    model = DFlash(DrafterShape.of(target.config), layer_ids, layers, block, mask_token).to(target.device)
    model.start_from(target)
    return model


def train_dflash(
    model: DFlash,
    target: Qwen3ForCausalLM,
    batches: Batches,
    settings: Settings,
    checkpoint: Path,
    reasoning: float = 1.0,
) -> Result:
    """Train on the target's replies; `reasoning`: weight of rounds that begin in it, against all others."""
    embed, head = target.get_input_embeddings(), target.lm_head.weight

    def loss_of(batch: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        verdict = judge(target, *batch)
        with torch.autocast(target.device.type, torch.bfloat16):
            return dflash_loss(model, embed, head, verdict, num_anchors=48, reasoning=reasoning)

    return train(model, batches, loss_of, settings, checkpoint)


def save_eagle3(model: Eagle3, target: Qwen3ForCausalLM, folder: Path) -> None:
    """Write a checkpoint in SafeAILab's EAGLE-3 format."""
    draft_tokens = model.draft_tokens.cpu()
    renamed = {}
    for name, value in model.state_dict().items():
        if name != "draft_tokens":
            outside = name.split(".")[0] in ("fc", "norm", "lm_head")
            renamed[name if outside else f"midlayer.{name}"] = value.to(torch.bfloat16).cpu().contiguous()
    renamed["d2t"] = draft_tokens - torch.arange(len(draft_tokens))
    renamed["t2d"] = torch.zeros(model.shape.vocab, dtype=torch.bool).index_fill(0, draft_tokens, True)
    config = _config(model.shape, target) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": len(draft_tokens),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(model.layer_ids), "use_aux_hidden_state": True},
    }
    _save(folder, renamed, config)


def save_dflash(model: DFlash, target: Qwen3ForCausalLM, folder: Path) -> None:
    """Write a checkpoint in z-lab's DFlash format."""
    tensors = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in model.state_dict().items()}
    config = _config(model.shape, target) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": len(model.layers),
        "block_size": model.block,
        "num_target_layers": target.config.num_hidden_layers,
        "dflash_config": {"mask_token_id": model.mask_token, "target_layer_ids": list(model.layer_ids)},
    }
    _save(folder, tensors, config)


def load_drafters(folder: Path) -> dict[str, Eagle3 | DFlash]:
    """Load both drafters by name, from the subfolders `eagle3` and `dflash`."""
    return {"df": load_dflash(folder / "dflash"), "e3": load_eagle3(folder / "eagle3")}


def load_eagle3(folder: Path) -> Eagle3:
    """Load a checkpoint in the format of `save_eagle3`."""
    config = json.loads((folder / "config.json").read_text())
    layer_ids = tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    offsets = load_file(folder / "model.safetensors")["d2t"]
    model = Eagle3(_shape(config), layer_ids, offsets + torch.arange(len(offsets)))
    _load(model, folder)
    return model


def load_dflash(folder: Path) -> DFlash:
    """Load a checkpoint in the format of `save_dflash`."""
    config = json.loads((folder / "config.json").read_text())
    options = config["dflash_config"]
    layers, block = config["num_hidden_layers"], config["block_size"]
    model = DFlash(_shape(config), tuple(options["target_layer_ids"]), layers, block, options["mask_token_id"])
    _load(model, folder)
    return model


def _load(model: Eagle3 | DFlash, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    state = {name.removeprefix("midlayer."): value.float() for name, value in tensors.items()}
    for name in model.state_dict().keys() & state.keys():
        model.state_dict()[name].copy_(state[name])
    missing = model.state_dict().keys() - state.keys() - {"draft_tokens"}
    if missing:
        raise ValueError(f"{folder}: no tensors {sorted(missing)}")


def _shape(config: dict[str, Any]) -> DrafterShape:
    return DrafterShape(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        theta=config["rope_theta"],
    )


def _config(shape: DrafterShape, target: Qwen3ForCausalLM) -> dict[str, object]:
    return {
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.theta,
        "max_position_embeddings": target.config.max_position_embeddings,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
