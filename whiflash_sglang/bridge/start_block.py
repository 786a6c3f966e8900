"""The summary that the server prints at startup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from whiflash_sglang.bridge.scheduler_hooks import TRIED_ATTENTION
from whiflash_sglang.drafters.runner import DraftRunner
from whiflash_sglang.startup.checkpoints import DrafterSpec
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.gpu_memory import FLAG_RUNNING

if TYPE_CHECKING:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_executor.model_runner import ModelRunner


def print_start_block(
    config: WhiFlashConfig,
    specs: dict[str, DrafterSpec],
    target_worker: TpModelWorker,
    runners: dict[str, DraftRunner],
    widths: Iterable[int],
    router: str,
) -> None:
    """Print models, router, memory cost and limits. `widths`: the verify widths."""
    runner = target_worker.model_runner
    tokens, lost = kv_tokens_lost(runner, runners.values())
    drafters = "; ".join(f"{name} {spec.path} (layers {list(spec.layer_ids)})" for name, spec in specs.items())
    backends = {"target": runner.server_args.attention_backend}
    backends |= {name: r.worker.model_runner.server_args.attention_backend for name, r in runners.items()}
    *others, width = sorted(widths)
    largest = max(max(r.graph_sizes, default=0) for r in runners.values())
    captured = f"widths {', '.join(map(str, others))} and {width}, and drafts, for batches up to {largest}"
    lines = {
        "target": runner.server_args.model_path,
        "drafters": drafters,
        "router": router,
        "verify width": f"{width} (anchor and up to {width - 1} drafts)",
        "catch-up": f"backlog of at most {config.max_backlog} tokens per drafter and request",
        "KV tokens": f"{tokens} ({lost} more would fit without the draft pools)",
        "attention": attention_line(backends, str(runner.device)),
        "requests": f"up to {runner.req_to_token_pool.size} at once ({FLAG_RUNNING})",
        "CUDA graphs": captured if largest else "none",
    }
    print("WhiFlash\n" + "\n".join(f"  {key:<13}{value}" for key, value in lines.items()), flush=True)


def attention_line(backends: Mapping[str, str], device: str) -> str:
    """The attention backends of target and drafters, and whether they have been tested."""
    line = ", ".join(f"{name} {backend}" for name, backend in backends.items())
    if not device.startswith("cuda"):
        return line
    if {*backends.values()} == {TRIED_ATTENTION}:
        return f"{line}; WHIFLASH's default on a GPU"
    return f"{line}; untested: --attention-backend {TRIED_ATTENTION} is the default"


def kv_tokens_lost(target_runner: ModelRunner, runners: Iterable[DraftRunner]) -> tuple[int, int]:
    """KV tokens that the pools hold, and how many more would fit into the draft pools' memory."""
    tokens = target_runner.max_total_num_tokens
    own: MHATokenToKVPool = target_runner.token_to_kv_pool
    pools: list[MHATokenToKVPool] = [r.worker.model_runner.token_to_kv_pool for r in runners]
    draft_bytes = sum(sum(pool.get_kv_size_bytes()) for pool in pools)
    return tokens, int(tokens * draft_bytes / sum(own.get_kv_size_bytes()))
