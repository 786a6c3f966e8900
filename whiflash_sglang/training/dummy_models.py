"""Dummy checkpoints of a target and both drafters of any size, which a server accepts and which take no disk space.

    paths = write_models(folder, QWEN3_8B)      # then serve with --load-format dummy

Writes `config.json`, the bundled models' tokenizer (the vocabulary is padded), and sparse safetensors files: full
headers, and a hole as data. The launcher checks headers, so it checks these like real models. SGLang fills the weights
with noise and reads no files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.startup.checkpoints import TargetSpec, drafter_tensors, load_target_spec
from whiflash_workloads.tokens import TOKENIZER

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EOS_TOKEN, MASK_TOKEN = 2, 3  # ids of the bundled tokenizer
BYTES = {"BF16": 2, "I64": 8}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a target and its drafters, whose layers have the same sizes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rope_theta: float
    draft_vocab_size: int
    eagle3_layers: tuple[int, ...]  # captured layers of the target
    dflash_layers: tuple[int, ...]
    dflash_depth: int
    block_size: int


QWEN3_8B = ModelShape(
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    context_length=40960,
    rope_theta=1e6,
    draft_vocab_size=32000,
    eagle3_layers=(1, 17, 32),
    dflash_layers=(1, 9, 17, 25, 33),
    dflash_depth=5,
    block_size=16,
)
TINY = ModelShape(
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=1536,
    context_length=4096,
    rope_theta=1e4,
    draft_vocab_size=256,
    eagle3_layers=(0, 1, 2),
    dflash_layers=(0, 2),
    dflash_depth=2,
    block_size=16,
)


class Folders(NamedTuple):
    """Folders of the three models."""

    target: Path
    dflash: Path
    eagle3: Path


def write_models(folder: Path, shape: ModelShape) -> Folders:
    """Write a target and both drafters of this shape to subfolders of `folder`."""
    folders = Folders(folder / "target", folder / "dflash", folder / "eagle3")
    write_config(folders.target, target_config(shape))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folders.target)
    write_hollow(folders.target / "model.safetensors", target_tensors(shape))
    target = load_target_spec(str(folders.target))
    write_drafter(folders.dflash, "df", dflash_config(shape), target)
    write_drafter(folders.eagle3, "e3", eagle3_config(shape), target)
    return folders


def write_drafter(folder: Path, kind: str, config: Mapping[str, Any], target: TargetSpec) -> None:
    """Write a drafter of `kind` "df" or "e3"."""
    write_config(folder, config)
    write_hollow(folder / "model.safetensors", drafter_tensors(str(folder), kind, target))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_hollow(file: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Write a sparse safetensors file (name -> shape) whose data reads as zeros. `d2t` is int64, all else bfloat16."""
    header, end = {}, 0
    for name, shape in tensors.items():
        dtype = "I64" if name == "d2t" else "BF16"
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


# ----------------------------------------------------------------------------------------------------------- configs


def common_config(shape: ModelShape) -> dict[str, Any]:
    """Fields of `config.json` that all three models share."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": EOS_TOKEN,
    }


def target_config(shape: ModelShape) -> dict[str, Any]:
    """A Qwen3 config."""
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": shape.num_layers}
    return common_config(shape) | own | {"use_sliding_window": False}


def dflash_config(shape: ModelShape) -> dict[str, Any]:
    """A DFlash config."""
    return common_config(shape) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": shape.dflash_depth,
        "num_target_layers": shape.num_layers,
        "block_size": shape.block_size,
        "layer_types": ["full_attention"] * shape.dflash_depth,
        "dflash_config": {"mask_token_id": MASK_TOKEN, "target_layer_ids": list(shape.dflash_layers)},
    }


def eagle3_config(shape: ModelShape) -> dict[str, Any]:
    """An EAGLE-3 config."""
    captured = {"eagle_aux_hidden_state_layer_ids": list(shape.eagle3_layers), "use_aux_hidden_state": True}
    return common_config(shape) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": shape.draft_vocab_size,
        "eagle_config": captured,
    }


def target_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a Qwen3 checkpoint."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    layers = {f"model.layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}
    outside = {name: (shape.vocab_size, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return {**outside, "model.norm.weight": (hidden,), **layers}
