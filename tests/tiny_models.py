"""Tiny random checkpoints in the published formats: a target with its tokenizer, an EAGLE-3 and a DFlash drafter.

    models = build(tmp_path)            # TinyModels(target, eagle3, dflash), three folders, about 2 MB
    models = build(tmp_path, family="llama")        # or "qwen3_moe": another kind of target, the same drafters
    python tests/tiny_models.py DIR     # the same from a shell

Weights are random with a fixed seed, so drafts are almost never accepted: useful to test losslessness and plumbing, but
not acceptance. Nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
DRAFT_VOCAB_SIZE = 256
HEAD_DIM = 16
EAGLE3_LAYER_IDS = (0, 1, 2)
DFLASH_LAYER_IDS = (0, 2)
DFLASH_BLOCK_SIZE = 8
NUM_EXPERTS = 4

# Fields of `config.json` for each kind of target, except sizes.
FAMILIES: dict[str, dict] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "pretraining_tp": 1},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "use_sliding_window": False,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|mask|>",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

# One pattern per kind of piece, as in byte-level BPE tokenizers: words with their leading space, numbers, the rest.
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class TinyModels:
    """Folders of a target and its two drafters."""

    target: Path
    eagle3: Path
    dflash: Path


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the target; both drafters share its width."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_position_embeddings: int = 4096


def build(directory: Path, seed: int = 0, shape: TinyShape | None = None, family: str = "qwen3") -> TinyModels:
    """Write the three checkpoints to subfolders of `directory`. `family` is the target's."""
    shape = shape or TinyShape()
    generator = torch.Generator().manual_seed(seed)
    paths = TinyModels(directory / "target", directory / "eagle3", directory / "dflash")
    tokenizer = train_tokenizer()
    write_tokenizer(paths.target, tokenizer)
    write_checkpoint(paths.target, target_config(shape, tokenizer, family), target_tensors(shape, generator, family))
    write_checkpoint(paths.eagle3, eagle3_config(shape, tokenizer), eagle3_tensors(shape, generator))
    write_checkpoint(paths.dflash, dflash_config(shape, tokenizer), dflash_tensors(shape, generator))
    return paths


# ---------------------------------------------------------------------------------------------------- tokenizer


def corpus() -> Iterator[str]:
    """Fixed sentences and JSON records, enough to learn a few hundred merges."""
    people, things = ("Ada", "Bruno", "Chen", "Dora"), ("order", "parcel", "refund", "invoice", "customer")
    verbs = ("check", "update", "cancel", "look up", "calculate", "confirm")
    for index in range(400):
        person, thing, verb = people[index % 4], things[index % 5], verbs[index % 6]
        yield f"{person} wants to {verb} the {thing} number {index * 37 % 1000} before the end of the month."
        yield json.dumps({"name": verb, "arguments": {thing: index, "owner": person, "status": "open"}})


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


# ------------------------------------------------------------------------------------------------------ configs


def common_config(shape: TinyShape, tokenizer: Tokenizer) -> dict:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }


def target_config(shape: TinyShape, tokenizer: Tokenizer, family: str) -> dict:
    sizes = {"num_hidden_layers": shape.num_layers}
    if family != "llama":
        sizes |= {"sliding_window": None, "max_window_layers": shape.num_layers}
    if family == "qwen3_moe":
        sizes |= {"moe_intermediate_size": shape.intermediate_size}
    return common_config(shape, tokenizer) | FAMILIES[family] | sizes


def eagle3_config(shape: TinyShape, tokenizer: Tokenizer) -> dict:
    return common_config(shape, tokenizer) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(EAGLE3_LAYER_IDS), "use_aux_hidden_state": True},
    }


def dflash_config(shape: TinyShape, tokenizer: Tokenizer) -> dict:
    return common_config(shape, tokenizer) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_target_layers": shape.num_layers,
        "block_size": DFLASH_BLOCK_SIZE,
        "layer_types": ["full_attention"] * 2,
        "dflash_config": {
            "mask_token_id": tokenizer.token_to_id("<|mask|>"),
            "target_layer_ids": list(DFLASH_LAYER_IDS),
        },
    }


# ------------------------------------------------------------------------------------------------------ tensors


def target_tensors(shape: TinyShape, generator: torch.Generator, family: str) -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": matrix(generator, VOCAB_SIZE, shape.hidden_size, scale=1.0),
        "model.norm.weight": torch.ones(shape.hidden_size),
        "lm_head.weight": matrix(generator, VOCAB_SIZE, shape.hidden_size),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        tensors |= layer_tensors(shape, generator, prefix, qk_norm=family != "llama")
        if family == "qwen3_moe":
            tensors |= experts(shape, generator, tensors, f"{prefix}.mlp")
    return tensors


def experts(
    shape: TinyShape, generator: torch.Generator, tensors: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """Replace a layer's MLP in `tensors` with experts and their gate."""
    for name in [name for name in tensors if name.startswith(f"{prefix}.")]:
        del tensors[name]
    found = {f"{prefix}.gate.weight": matrix(generator, NUM_EXPERTS, shape.hidden_size)}
    for expert in range(NUM_EXPERTS):
        mlp = mlp_tensors(shape, generator)
        found |= {f"{prefix}.experts.{expert}.{name}": tensor for name, tensor in mlp.items()}
    return found


def eagle3_tensors(shape: TinyShape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One layer whose attention reads the normed embedding and the normed feature, and its own head."""
    hidden = shape.hidden_size
    # Every second target id is in the draft vocabulary: draft id d is target id 2 * d.
    kept = torch.arange(VOCAB_SIZE) % 2 == 0
    return {
        "fc.weight": matrix(generator, hidden, len(EAGLE3_LAYER_IDS) * hidden),
        "midlayer.hidden_norm.weight": torch.ones(hidden),
        **layer_tensors(shape, generator, "midlayer", input_width=2 * hidden, qk_norm=False),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(generator, DRAFT_VOCAB_SIZE, hidden),
        "d2t": kept.nonzero().squeeze(1) - torch.arange(DRAFT_VOCAB_SIZE),
        "t2d": kept,
    }


def dflash_tensors(shape: TinyShape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden = shape.hidden_size
    tensors = {
        "fc.weight": matrix(generator, hidden, len(DFLASH_LAYER_IDS) * hidden),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
    }
    for layer in range(2):
        tensors |= layer_tensors(shape, generator, f"layers.{layer}", qk_norm=True)
    return tensors


def layer_tensors(
    shape: TinyShape, generator: torch.Generator, prefix: str, *, qk_norm: bool, input_width: int | None = None
) -> dict[str, torch.Tensor]:
    """One decoder layer. `input_width`: input size of q, k and v, if it is not the hidden size."""
    hidden, width = shape.hidden_size, input_width or shape.hidden_size
    query_size, kv_size = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    tensors = {
        "input_layernorm.weight": torch.ones(hidden),
        "post_attention_layernorm.weight": torch.ones(hidden),
        "self_attn.q_proj.weight": matrix(generator, query_size, width),
        "self_attn.k_proj.weight": matrix(generator, kv_size, width),
        "self_attn.v_proj.weight": matrix(generator, kv_size, width),
        "self_attn.o_proj.weight": matrix(generator, hidden, query_size),
        **{f"mlp.{name}": tensor for name, tensor in mlp_tensors(shape, generator).items()},
    }
    if qk_norm:
        tensors |= {"self_attn.q_norm.weight": torch.ones(HEAD_DIM), "self_attn.k_norm.weight": torch.ones(HEAD_DIM)}
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def mlp_tensors(shape: TinyShape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "gate_proj.weight": matrix(generator, shape.intermediate_size, shape.hidden_size),
        "up_proj.weight": matrix(generator, shape.intermediate_size, shape.hidden_size),
        "down_proj.weight": matrix(generator, shape.hidden_size, shape.intermediate_size),
    }


def matrix(generator: torch.Generator, rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
    """A random matrix [rows, columns] that preserves the scale of its input, so that logits differ clearly."""
    return torch.randn(rows, columns, generator=generator) * (scale or columns**-0.5)


def write_checkpoint(directory: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
