"""Validate checkpoints before anything is loaded, from `config.json` and the safetensors headers.

    target = load_target_spec("models/target")
    spec = load_drafter_spec("models/dflash", "df", target)     # CheckpointError names flag, value and fix

SGLang's loaders skip unknown tensors and leave missing parameters uninitialized. A drafter made for another target
would therefore load, and then be wrong at every token. This module checks sizes against the target, captured layers,
the presence and shape of every tensor, and the draft vocabulary map (d2t).

A layer id means "output of target layer id", counted from 0. SGLang captures at the input of layer id + 1, so the last
layer's output is not available.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.startup import supported_targets as targets
from whiflash_sglang.startup.config import FLAG_DFLASH, FLAG_EAGLE, FLAG_ROUTER
from whiflash_sglang.startup.safetensors_header import (
    TensorInfo,
    check_files,
    read_headers,
    read_integers,
    read_json,
    refuse_pickled,
)

FLAG_TARGET = "--model-path"
DRAFTER_FLAGS = {"df": FLAG_DFLASH, "e3": FLAG_EAGLE}

_OTHER_DRAFTER = "use a drafter that was made for this target"
_OTHER_TARGET = f"serve {', '.join(targets.TARGETS)}, or this one with {FLAG_ROUTER} off"
_WHOLE_CHECKPOINT = "use a complete checkpoint in the published format"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TargetSpec:
    """The target's sizes that drafters depend on."""

    path: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter that fits its target."""

    kind: str  # "df" or "e3"
    path: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int  # the target's
    draft_vocab_size: int  # rows of the drafter's head; the target's vocabulary for DFlash
    layer_ids: tuple[int, ...]  # captured target layers, in the column order of the drafter's `fc`
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int | None  # DFlash: tokens per block, including the anchor
    mask_token_id: int | None  # DFlash

    @property
    def num_queries(self) -> int:
        """Queries per request in one draft forward: a whole block (DFlash) or one chain step (EAGLE-3)."""
        return self.block_size or 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its parsed config, and the flag that named it."""

    flag: str
    path: Path
    config: Mapping[str, Any]

    def error(self, problem: str, fix: str) -> CheckpointError:
        """An error that names this checkpoint's flag and path."""
        return CheckpointError(self.flag, self.path, problem, fix)

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Read an integer from `config.json`; required unless there is a default. Raises CheckpointError."""
        value = self.config.get(name)
        return self.check_integer(name, default if value is None else value, minimum)

    def check_integer(self, name: str, value: object, minimum: int = 1) -> int:
        """Return `value` if it is an integer >= `minimum`, else raise CheckpointError."""
        if value is None:
            raise self.error(f"config.json has no `{name}`", _WHOLE_CHECKPOINT)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(f"config.json: `{name}` is {value!r}, not a whole number >= {minimum}", _WHOLE_CHECKPOINT)
        return value


def load_target_spec(path: str) -> TargetSpec:
    """Read the target's sizes. Raises CheckpointError for an unsupported model. `path`: a local folder
    (see `hub.resolve`)."""
    checkpoint = open_checkpoint(FLAG_TARGET, path)
    problem = targets.why_unsupported(checkpoint.config)
    if problem is not None:
        raise checkpoint.error(problem, _OTHER_TARGET)
    refuse_pickled(FLAG_TARGET, checkpoint.path)
    return TargetSpec(
        path=str(checkpoint.path),
        vocab_size=checkpoint.integer("vocab_size"),
        num_layers=checkpoint.integer("num_hidden_layers"),
        **_width(checkpoint),
    )


def check_weights(flag: str, path: str, needed: bool = False) -> None:
    """Raise CheckpointError for truncated, corrupt or missing weight files; if `needed`, also if there are none."""
    (read_headers if needed else check_files)(flag, Path(path))


def load_drafter_spec(path: str, kind: str, target: TargetSpec) -> DrafterSpec:
    """Read a drafter of `kind` "df" or "e3". Raises CheckpointError if it does not fit `target`."""
    checkpoint, spec = _read_drafter(path, kind, target)
    tensors = read_headers(checkpoint.flag, checkpoint.path)
    {"df": _check_dflash_tensors, "e3": _check_eagle3_tensors}[kind](checkpoint, spec, tensors)
    return spec


def drafter_tensors(path: str, kind: str, target: TargetSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor that the drafter in `path` must have, from its `config.json` alone."""
    return {"df": _dflash_tensors, "e3": _eagle3_tensors}[kind](*_read_drafter(path, kind, target))


def _read_drafter(path: str, kind: str, target: TargetSpec) -> tuple[Checkpoint, DrafterSpec]:
    """Read a drafter's `config.json` and check it against `target`."""
    checkpoint = open_checkpoint(DRAFTER_FLAGS[kind], path)
    spec = {"df": _dflash_spec, "e3": _eagle3_spec}[kind](checkpoint, target)
    _check_sizes(checkpoint, spec, target)
    return checkpoint, spec


def check_ranks(flag: str, path: str, num_ranks: int) -> None:
    """Raise CheckpointError if `num_ranks` ranks cannot split the model into whole heads and equal MLP shards. KV
    heads may be replicated."""
    checkpoint = open_checkpoint(flag, path)
    heads = checkpoint.integer("num_attention_heads")
    mlp = checkpoint.integer("intermediate_size", default=num_ranks)  # optional: MoE experts have their own size
    kv_heads = checkpoint.integer("num_key_value_heads", default=heads)
    if heads % num_ranks or mlp % num_ranks or (kv_heads % num_ranks and num_ranks % kv_heads):
        sizes = f"{heads} heads, {kv_heads} KV heads and an MLP of {mlp}"
        raise checkpoint.error(f"has {sizes}, which --tp-size {num_ranks} does not divide", "use a --tp-size that does")


def open_checkpoint(flag: str, path: str) -> Checkpoint:
    """Open a local folder that has a `config.json`. Raises CheckpointError."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(flag, path, "no such folder", "give a folder that holds a checkpoint, or a hub id")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            flag, path, "has no config.json", "give the folder that holds config.json and the weights"
        )
    return Checkpoint(flag, folder, read_json(flag, folder / "config.json"))


# --------------------------------------------------------------------------------------------------------- configs


def _dflash_spec(checkpoint: Checkpoint, target: TargetSpec) -> DrafterSpec:
    _check_architecture(checkpoint, "DFlashDraftModel", "DFlash")
    dflash = _section(checkpoint, "dflash_config")
    layer_ids = dflash.get("target_layer_ids", checkpoint.config.get("target_layer_ids"))
    block_size = dflash.get("block_size", checkpoint.config.get("block_size"))
    vocab_size = checkpoint.integer("vocab_size")
    mask_token_id = checkpoint.check_integer("dflash_config.mask_token_id", dflash.get("mask_token_id"), minimum=0)
    if mask_token_id >= vocab_size:
        problem = f"config.json: mask_token_id {mask_token_id} is outside the vocabulary of {vocab_size}"
        raise checkpoint.error(problem, _OTHER_DRAFTER)
    return DrafterSpec(
        kind="df",
        draft_vocab_size=vocab_size,
        layer_ids=_layer_ids(checkpoint, "dflash_config.target_layer_ids", layer_ids, target),
        block_size=checkpoint.check_integer("block_size", block_size, minimum=2),
        mask_token_id=mask_token_id,
        **_common_fields(checkpoint, target),
    )


def _eagle3_spec(checkpoint: Checkpoint, target: TargetSpec) -> DrafterSpec:
    _check_architecture(checkpoint, "LlamaForCausalLMEagle3", "EAGLE-3")
    eagle = _section(checkpoint, "eagle_config")
    name = "eagle_config.eagle_aux_hidden_state_layer_ids"
    layer_ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if layer_ids is None:
        # Published EAGLE-3 drafters without a list use an early, a middle and a late layer.
        name, layer_ids = f"{name} (default)", [1, target.num_layers // 2 - 1, target.num_layers - 4]
    if checkpoint.integer("num_hidden_layers", default=1) != 1:
        problem = f"has {checkpoint.integer('num_hidden_layers')} layers; KV-only ingestion is exact for one layer only"
        raise checkpoint.error(problem, "use an EAGLE-3 drafter with one layer")
    return DrafterSpec(
        kind="e3",
        draft_vocab_size=checkpoint.integer("draft_vocab_size", default=checkpoint.integer("vocab_size")),
        layer_ids=_layer_ids(checkpoint, name, layer_ids, target),
        block_size=None,
        mask_token_id=None,
        **_common_fields(checkpoint, target),
    )


def _common_fields(checkpoint: Checkpoint, target: TargetSpec) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "target_hidden_size": target.hidden_size,
        "vocab_size": checkpoint.integer("vocab_size"),
        "num_layers": checkpoint.integer("num_hidden_layers", default=1),
        **_width(checkpoint),
    }


def _width(checkpoint: Checkpoint) -> dict[str, int]:
    num_heads = checkpoint.integer("num_attention_heads")
    hidden_size = checkpoint.integer("hidden_size")
    return {
        "hidden_size": hidden_size,
        "num_kv_heads": checkpoint.integer("num_key_value_heads", default=num_heads),
        "head_dim": checkpoint.integer("head_dim", default=hidden_size // num_heads),
    }


def _check_architecture(checkpoint: Checkpoint, expected: str, title: str) -> None:
    architectures = checkpoint.config.get("architectures") or []
    if expected not in architectures:
        problem = f"config.json: architectures is {architectures}, not a {title} drafter ({expected})"
        raise checkpoint.error(problem, f"give a {title} checkpoint; were the two drafters swapped?")


def _section(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    section = checkpoint.config.get(name) or {}
    if not isinstance(section, dict):
        raise checkpoint.error(f"config.json: `{name}` is {section!r}, not an object", _WHOLE_CHECKPOINT)
    return section


def _layer_ids(checkpoint: Checkpoint, name: str, value: object, target: TargetSpec) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise checkpoint.error(f"config.json: `{name}` is {value!r}, not a list of layer ids", _WHOLE_CHECKPOINT)
    ids = tuple(checkpoint.check_integer(f"{name}[{i}]", layer, minimum=0) for i, layer in enumerate(value))
    highest = target.num_layers - 2
    if max(ids) > highest:
        problem = f"config.json: `{name}` {list(ids)}, but the target's {target.num_layers} layers allow 0 to {highest}"
        raise checkpoint.error(problem, _OTHER_DRAFTER)
    if len(set(ids)) != len(ids):
        raise checkpoint.error(f"config.json: `{name}` {list(ids)} names a layer twice", _OTHER_DRAFTER)
    return ids


def _check_sizes(checkpoint: Checkpoint, spec: DrafterSpec, target: TargetSpec) -> None:
    if spec.hidden_size != target.hidden_size:
        problem = f"hidden_size {spec.hidden_size}, but the target's is {target.hidden_size}"
        raise checkpoint.error(problem, _OTHER_DRAFTER)
    if spec.vocab_size != target.vocab_size:
        problem = f"vocab_size {spec.vocab_size}, but the target's is {target.vocab_size}"
        raise checkpoint.error(problem, _OTHER_DRAFTER)
    if spec.draft_vocab_size > spec.vocab_size:
        problem = f"draft_vocab_size {spec.draft_vocab_size} is larger than vocab_size {spec.vocab_size}"
        raise checkpoint.error(problem, _WHOLE_CHECKPOINT)


# --------------------------------------------------------------------------------------------------------- tensors


def _check_dflash_tensors(checkpoint: Checkpoint, spec: DrafterSpec, tensors: Mapping[str, TensorInfo]) -> None:
    _check_shapes(checkpoint, _dflash_tensors(checkpoint, spec), tensors)


def _dflash_tensors(checkpoint: Checkpoint, spec: DrafterSpec) -> dict[str, Shape]:
    expected: dict[str, Shape] = {
        "fc.weight": (spec.hidden_size, len(spec.layer_ids) * spec.target_hidden_size),
        "hidden_norm.weight": (spec.hidden_size,),
        "norm.weight": (spec.hidden_size,),
    }
    for layer in range(spec.num_layers):
        shapes = _layer_shapes(checkpoint, spec, input_width=spec.hidden_size)
        shapes |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
        expected |= {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return expected


def _check_eagle3_tensors(checkpoint: Checkpoint, spec: DrafterSpec, tensors: Mapping[str, TensorInfo]) -> None:
    tensors = {_published_eagle3_name(name): info for name, info in tensors.items()}
    expected = _eagle3_tensors(checkpoint, spec)
    if "t2d" in tensors:
        expected["t2d"] = (spec.vocab_size,)
    _check_shapes(checkpoint, expected, tensors)
    if "lm_head.weight" in tensors and checkpoint.config.get("tie_word_embeddings"):
        problem = "config.json: tie_word_embeddings is true, so SGLang would ignore the drafter's lm_head.weight"
        raise checkpoint.error(problem, "set it to false")
    if "d2t" in tensors:
        _check_draft_vocabulary(checkpoint, spec, tensors["d2t"])


def _eagle3_tensors(checkpoint: Checkpoint, spec: DrafterSpec) -> dict[str, Shape]:
    config, hidden, features = checkpoint.config, spec.hidden_size, len(spec.layer_ids) * spec.target_hidden_size
    layer = _layer_shapes(checkpoint, spec, input_width=2 * hidden) | {"hidden_norm.weight": (hidden,)}
    expected: dict[str, Shape] = {
        "fc.weight": (hidden, features),
        **{f"midlayer.{name}": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
    }
    if config.get("norm_before_fc") or _section(checkpoint, "eagle_config").get("norm_before_fc"):
        expected["input_norm.weight"] = (features,)
    if config.get("fc_norm") or config.get("use_aux_norm"):
        expected |= {f"fc_norm.{i}.weight": (spec.target_hidden_size,) for i in range(len(spec.layer_ids))}
    if config.get("draft_vocab_size") is not None:
        expected["lm_head.weight"] = (spec.draft_vocab_size, hidden)
    if spec.draft_vocab_size < spec.vocab_size:
        expected["d2t"] = (spec.draft_vocab_size,)
    return expected


def _published_eagle3_name(name: str) -> str:
    """The published name of a tensor. SGLang accepts a second spelling of some."""
    name = re.sub(r"^layers\.0\.", "midlayer.", name.removeprefix("model."))
    for index, old in enumerate(("low", "mid", "high")):
        name = name.replace(f"aux_norm_{old}.", f"fc_norm.{index}.")
    return name


def _layer_shapes(checkpoint: Checkpoint, spec: DrafterSpec, input_width: int) -> dict[str, Shape]:
    """One decoder layer; q, k and v read `input_width` columns."""
    hidden, intermediate = spec.hidden_size, checkpoint.integer("intermediate_size")
    query_size = checkpoint.integer("num_attention_heads") * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query_size, input_width),
        "self_attn.k_proj.weight": (kv_size, input_width),
        "self_attn.v_proj.weight": (kv_size, input_width),
        "self_attn.o_proj.weight": (hidden, query_size),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def _check_shapes(checkpoint: Checkpoint, expected: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> None:
    if missing := [name for name in expected if name not in tensors]:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise checkpoint.error(f"the weights lack {listed}", _WHOLE_CHECKPOINT)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            problem = f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            raise checkpoint.error(problem, _OTHER_DRAFTER)


def _check_draft_vocabulary(checkpoint: Checkpoint, spec: DrafterSpec, info: TensorInfo) -> None:
    """Target id = draft id + d2t[draft id]. An id outside the vocabulary would read out of bounds in the embedding."""
    for draft_id, offset in enumerate(read_integers(checkpoint.flag, info)):
        if not 0 <= draft_id + offset < spec.vocab_size:
            problem = f"d2t[{draft_id}] = {offset} points outside the vocabulary of {spec.vocab_size}"
            raise checkpoint.error(problem, _WHOLE_CHECKPOINT)
