"""Check the GPU memory that WHIFLASH needs, before it is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from whiflash_sglang.bridge.builders import captured_layers, drafter_specs
from whiflash_sglang.startup.checkpoints import DRAFTER_FLAGS, FLAG_TARGET, DrafterSpec, load_target_spec
from whiflash_sglang.startup.config import WhiFlashConfig, active_config
from whiflash_sglang.startup.gpu_memory import (
    FLAG_GRAPHS,
    FLAG_POOL,
    FLAG_RUNNING,
    Memory,
    Need,
    check_attention,
    check_needs,
    check_room,
    graph_bytes,
    kv_bytes,
    ring_bytes,
)
from whiflash_sglang.startup.safetensors_header import weight_bytes

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs


def check_accelerator(server_args: ServerArgs) -> None:
    """Check resolved server arguments against the GPU, before anything is loaded.

    Raises ConfigError or CheckpointError for an unsupported attention backend or head size, or too little memory.
    """
    from sglang.srt.utils import get_device_memory_capacity

    if not server_args.device.startswith("cuda"):
        return
    target, config = load_target_spec(server_args.model_path), active_config()
    drafters = list(drafter_specs(config, server_args).values())
    drafting = server_args.speculative_draft_attention_backend
    check_attention({*server_args.get_attention_backends(), drafting} - {None}, target, drafters)
    capacity = get_device_memory_capacity(server_args.device)  # MiB
    if capacity is None or server_args.mem_fraction_static is None or server_args.quantization is not None:
        return  # the size of the weights is unknown
    ranks = server_args.tp_size
    paths = {FLAG_TARGET: target.path} | {DRAFTER_FLAGS[spec.kind]: spec.path for spec in drafters}
    weights = sum(weight_bytes(flag, Path(path)) for flag, path in paths.items()) // ranks
    memory = Memory(int(capacity * 2**20), server_args.mem_fraction_static, weights)
    token_bytes = sum(kv_bytes(spec, 1, ranks) for spec in (target, *drafters))  # at least one byte per KV element
    check_room(memory, token_bytes, server_args.speculative_num_draft_tokens)


def check_memory(
    config: WhiFlashConfig, specs: Mapping[str, DrafterSpec], target_runner: ModelRunner, requests: ReqToTokenPool
) -> None:
    """Raise ConfigError if the GPU has too little free memory for draft pools, rings and CUDA graphs.

    `requests`: SGLang's `ReqToTokenPool`.
    """
    if str(target_runner.device).startswith("cuda"):
        check_needs(torch.cuda.mem_get_info()[0], memory_needs(config, specs, target_runner, requests))


def memory_needs(
    config: WhiFlashConfig, specs: Mapping[str, DrafterSpec], target_runner: ModelRunner, requests: ReqToTokenPool
) -> list[Need]:
    """Memory needs of draft pools, rings and CUDA graphs."""
    element, tokens = target_runner.kv_cache_dtype.itemsize, target_runner.max_total_num_tokens
    server_args = target_runner.server_args
    num_slots, context = requests.req_to_token.shape
    graphs = server_args.cuda_graph_config.decode
    sizes = [] if graphs.backend == "disabled" else sorted({min(size, requests.size) for size in graphs.bs})
    drafts = {name: spec.num_queries for name, spec in specs.items()}
    windows = {1, *(config.eagle_steps + 1 if name == "e3" else width for name, width in drafts.items())}
    of_feature = target_runner.dtype.itemsize
    hidden = target_runner.model_config.hidden_size
    layers = len(captured_layers(specs.values()))
    captures = layers + (config.router == "neural")  # it reads final hidden states
    pools = sum(tokens * kv_bytes(spec, element, server_args.tp_size) for spec in specs.values())
    rings = ring_bytes(num_slots, config.max_backlog, layers * hidden * of_feature)
    vocab_size = target_runner.model_config.vocab_size
    captured = graph_bytes(sizes, windows, drafts.values(), captures * hidden * of_feature, vocab_size, context)
    return [
        Need("draft pools", pools, FLAG_POOL, tokens),
        Need("backlogs", rings, FLAG_RUNNING, requests.size),
        Need("CUDA graphs", captured, FLAG_GRAPHS, max(sizes, default=0)),
    ]
