"""Supported targets: those covered by tests. All others are rejected before anything is loaded.

    problem = why_unsupported(config)       # config: a parsed config.json; None if supported

SGLang supports many more models. Some would start, but would capture the wrong layers or could not roll back rejected
drafts, and produce slow or wrong text. `docs/limits.md` has the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TARGETS = ("Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM")

# Fields of config.json that identify unsupported models.
_MULTIMODAL = ("text_config", "vision_config", "audio_config", "thinker_config")
_RECURRENT = (
    *("hybrid_override_pattern", "layers_block_type", "attn_layer_indices", "full_attention_interval"),
    *("linear_num_key_heads", "linear_attn_config", "mamba_d_state", "mamba_num_heads", "ssm_state_size", "state_size"),
)
_PLAIN = "full_attention"


def why_unsupported(config: Mapping[str, Any]) -> str | None:
    """Why a target with this config.json is not supported, in one line; None if it is."""
    architectures = config.get("architectures") or []
    kind = _kind(config, architectures)
    if kind is None and any(name in TARGETS for name in architectures):
        return None
    return f"config.json: architectures is {architectures}, {kind or 'which has not been tested as a target'}"


def _kind(config: Mapping[str, Any], architectures: list[str]) -> str | None:
    """The unsupported model type, independent of the architecture's name; None if nothing is known against it."""
    is_generation = any(name.endswith("ForConditionalGeneration") for name in architectures)
    if is_generation or any(isinstance(config.get(name), dict) for name in _MULTIMODAL):
        kind = "a multimodal or vision-language model"
        text = config.get("text_config")
        layers = _kind_of_layers(text) if isinstance(text, dict) else None
        return f"{layers} (and {kind})" if layers else kind
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder model"
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "an encoder, classifier or embedding model, which generates no text"
    return _kind_of_layers(config)


def _kind_of_layers(config: Mapping[str, Any]) -> str | None:
    """The unsupported layer type of a text model, if any."""
    layers = set(config.get("layer_types") or [_PLAIN]) - {_PLAIN}
    if config.get("kv_lora_rank") is not None:
        return "a model with multi-head latent attention (MLA), whose compressed KV verify windows do not support"
    if any(config.get(name) is not None for name in _RECURRENT) or any("attention" not in name for name in layers):
        return "a hybrid or Mamba model, whose recurrent state cannot roll back a rejected draft"
    if any("linear" in name for name in layers):
        return "a hybrid with linear attention, whose recurrent state cannot roll back a rejected draft"
    if layers or config.get("use_sliding_window"):
        return "a model with sliding-window layers, whose KV is in separate pools; drafters share the slots of one pool"
    return None
