"""The speculative algorithm that SGLang registers, and its state between steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.core.transfer import to_device
from whiflash_sglang.startup.checkpoints import DRAFTER_FLAGS, FLAG_TARGET, check_ranks
from whiflash_sglang.startup.config import active_config
from whiflash_sglang.startup.gpu_memory import MAX_RUNNING

if TYPE_CHECKING:
    from sglang.srt.managers.overlap_utils import FutureMap
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.server_args import ServerArgs

ALGORITHM = "WHIFLASH"
LATE_KV = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"


class WhiFlashAlgorithm(CustomSpecAlgo):
    """The algorithm object that SGLang's scheduler queries.

    It reports itself as DFlash: that selects SGLang's linear-chain verify, its draft input (`DFlashDraftInputV2`) and
    the draft KV in the memory budget.
    """

    def is_dflash(self) -> bool:
        return True

    def is_dflash_family(self) -> bool:
        return True

    def supports_target_verify_for_draft(self) -> bool:
        return True

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def create_future_map(
        self,
        device: torch.device,
        req_to_token_pool: ReqToTokenPool,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def create_worker(self, server_args: ServerArgs) -> type:
        """Overridden because the base class warns about the missing overlap schedule, which is intended here."""
        return self.factory(server_args)

    def handle_server_args(self, server_args: ServerArgs) -> None:
        """Set arguments that the algorithm implies; called during SGLang's argument resolution.

        Raises CheckpointError if `--tp-size` does not divide a model, ConfigError for deferred KV allocation.
        """
        if server_args.tp_size > 1:
            check_ranks(FLAG_TARGET, server_args.model_path, server_args.tp_size)
            for name, path in active_config().draft_paths.items():
                check_ranks(DRAFTER_FLAGS[name], path, server_args.tp_size)
        server_args.speculative_eagle_topk = 1
        server_args.speculative_num_steps = 1
        # A round ends with a host read of the committed tokens, which the overlap schedule does not allow.
        server_args.disable_overlap_schedule = True
        if os.environ.get(LATE_KV, "").lower() in ("1", "true", "yes", "y"):
            problem = "WHIFLASH needs allocated KV to capture graphs and to measure round costs"
            raise ConfigError(LATE_KV, os.environ[LATE_KV], problem, "unset this environment variable")
        if server_args.max_running_requests is None and server_args.device.startswith("cuda"):
            server_args.max_running_requests = MAX_RUNNING


@dataclass
class WhiFlashDraftInput(DFlashDraftInputV2):
    """State between rounds: each request's bonus token and length."""

    def prepare_for_decode(self, batch: ScheduleBatch) -> None:
        """Reserve KV slots for each request's next window.

        SGLang reserves two windows, because lengths lag by one round in its overlap schedule. We need one; unused
        slots would only evict prompt tokens from the radix tree.
        """
        from sglang.srt.mem_cache.allocation import alloc_for_spec_decode
        from sglang.srt.runtime_context import get_spec

        committed = [request.kv_committed_len for request in batch.reqs]
        allocated = [request.kv.kv_allocated_len for request in batch.reqs]
        reserved = reserved_lens(allocated, committed, get_spec().speculative_num_draft_tokens)
        lens = torch.tensor((allocated, reserved), dtype=torch.int32)
        on_device = to_device(lens, torch.device(batch.device), torch.int32)
        alloc_for_spec_decode(
            batch.tree_cache,
            batch.req_to_token_pool,
            reqs=batch.reqs,
            req_pool_indices=batch.req_pool_indices,
            cur_kv_lens=on_device[0],
            cur_kv_lens_cpu=lens[0],
            nxt_kv_lens=on_device[1],
            nxt_kv_lens_cpu=lens[1],
            num_needed_tokens=sum(reserved) - sum(allocated),
            batch=batch,
        )
        batch.seq_lens_cpu, batch.seq_lens_sum = torch.tensor(committed, dtype=torch.int64), sum(committed)


def reserved_lens(allocated: Sequence[int], committed: Sequence[int], window: int) -> list[int]:
    """The positions [rows] that have KV slots in the next round, for windows of `window` tokens."""
    return [max(known, length + window) for known, length in zip(allocated, committed, strict=True)]


def draft_input(bonus_tokens: torch.Tensor, new_seq_lens: torch.Tensor) -> WhiFlashDraftInput:
    """The batch's `spec_info` for requests with the given bonus tokens and lengths, [rows] each."""
    nothing = bonus_tokens.new_empty((len(bonus_tokens), 0))  # fields of other algorithms
    return WhiFlashDraftInput(
        topk_p=nothing,
        topk_index=nothing,
        bonus_tokens=bonus_tokens.to(torch.int64),
        new_seq_lens=new_seq_lens.to(torch.int64),
        hidden_states=nothing,
    )


def register_algorithm(worker_class: Callable[[ServerArgs], type]) -> None:
    """Register `--speculative-algorithm WHIFLASH` with SGLang in this process. `worker_class`: server_args -> class."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import get_spec

    if get_spec(ALGORITHM) is None:
        register = SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=False, spec_class=WhiFlashAlgorithm)
        register(worker_class)
