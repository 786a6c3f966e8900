"""Hooks of the scheduler process. Every hook has a comment with its reason."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from whiflash_sglang.bridge.algorithm import ALGORITHM, WhiFlashAlgorithm
from whiflash_sglang.bridge.builders import captured_layers, drafter_specs
from whiflash_sglang.bridge.logit_adjustments import open_dead_ends
from whiflash_sglang.core.errors import HintError
from whiflash_sglang.core.hints import parse
from whiflash_sglang.startup.config import active_config

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs

TRIED_ATTENTION = "triton"
PRIORS_FIELD, RANKS_FIELD = "whiflash_priors", "whiflash_ranks"  # of the scheduler's state
ASKS_FOR_PRIORS = "whiflash_priors"  # id of a request for the state


def install_hooks() -> None:
    """Register the hooks; SGLang applies them once all plugins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    components = "sglang.srt.model_executor.model_runner_components"
    # Captured layers: SGLang captures the layers of one drafter; we need the union of both.
    HookRegistry.register(
        f"{components}.spec_aux_hidden_state.resolve_spec_aux_hidden_state_config", _capture_union, HookType.AROUND
    )
    # Radix keys: EAGLE-3's KV at a position depends on the next token, so a prefix may only be shared together with
    # its next token (bigram keys, as for SGLang's own EAGLE).
    HookRegistry.register("sglang.srt.mem_cache.registry.create_tree_cache", _bigram_keys, HookType.BEFORE)
    # Live figures: /server_info shows the scheduler's internal state, which plugins cannot extend otherwise.
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _add_stats, HookType.AFTER)
    # Reserve: SGLang's admission and retraction reserve two windows per running request; we need one, see
    # WhiFlashDraftInput.prepare_for_decode.
    HookRegistry.register(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode", _reserve_one_window, HookType.AROUND
    )
    # Longest request: SGLang allows a request to fill the whole pool, leaving no room for its last verify window.
    HookRegistry.register(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info", _cap_longest_request, HookType.AFTER
    )
    # Attention: SGLang defaults to fa3 or flashinfer, but rounds have been tested with triton only.
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs._get_default_attn_backend", _tried_attention, HookType.AROUND
    )
    # Refusals: SGLang's check reports the DFLASH name and suggests no fix. It also rejects logprobs, which we support,
    # and misses hidden states when overlap is off.
    HookRegistry.register(
        "sglang.srt.speculative.dflash_utils.validate_dflash_request", _name_ourselves, HookType.AROUND
    )
    # Dead ends: if a grammar allows no token, the sampler has no valid probabilities and crashes the scheduler.
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias", _open_dead_ends, HookType.AFTER
    )
    # Signals: SGLang's sampler modifies the logits in place, but routers need the raw distribution.
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample", _keep_raw_logits, HookType.BEFORE
    )
    # Hints: validated with the sampling parameters, in the HTTP process, where a ValueError becomes HTTP 400.
    judge = functools.partial(_judge_custom_params, active_config().drafter_names)
    HookRegistry.register("sglang.srt.sampling.sampling_params.SamplingParams.verify", judge, HookType.AFTER)


raw_logits: list[torch.Tensor] = []
"""Logits [requests, vocab] of the target's latest prefill, before sampling; at most one element."""


def _keep_raw_logits(model_runner: ModelRunner, logits_output: LogitsProcessorOutput, forward_batch: object) -> None:
    raw_logits[:] = [logits_output.next_token_logits.clone()]


def _capture_union(
    original: Any, *, server_args: ServerArgs, model_config: ModelConfig, spec_algorithm: object, is_draft_worker: bool
) -> Any:
    if is_draft_worker or not isinstance(spec_algorithm, WhiFlashAlgorithm):
        return original(
            server_args=server_args,
            model_config=model_config,
            spec_algorithm=spec_algorithm,
            is_draft_worker=is_draft_worker,
        )
    from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import SpecAuxHiddenStateConfig

    specs = drafter_specs(active_config(), server_args)
    target_layer = model_config.get_total_num_kv_heads() * model_config.head_dim
    draft_layers = sum(spec.num_layers * spec.num_kv_heads * spec.head_dim for spec in specs.values())
    return SpecAuxHiddenStateConfig(
        dflash_use_aux_hidden_state=True,
        dflash_target_layer_ids=list(captured_layers(specs.values())),
        # SGLang budgets draft KV in units of target layers.
        dflash_draft_num_layers=math.ceil(draft_layers / target_layer),
    )


def _bigram_keys(context: TreeCacheBuildContext) -> None:
    if "e3" in active_config().drafter_names and context.server_args.speculative_algorithm == ALGORITHM:
        context.params.is_eagle = True


def _reserve_one_window(original: Any, server_args: ServerArgs | None = None) -> int:
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_len_per_decode

    return int(get_alloc_len_per_decode(server_args))


def _tried_attention(original: Any, server_args: ServerArgs, use_mla_backend: bool, model_config: ModelConfig) -> str:
    ours = server_args.speculative_algorithm == ALGORITHM and server_args.device.startswith("cuda")
    return TRIED_ATTENTION if ours else str(original(server_args, use_mla_backend, model_config))


def _cap_longest_request(info: tuple[Any, ...], worker: TpModelWorker) -> tuple[Any, ...]:
    pool_tokens, max_request_len, max_prompt_len = info[0], info[4], info[5]
    room = pool_tokens - 1 - worker.server_args.speculative_num_draft_tokens
    excess = max(0, max_request_len - room)
    return (*info[:4], max_request_len - excess, max_prompt_len - excess, *info[6:])


def _name_ourselves(original: Any, request: Req, *args: Any, **kwargs: Any) -> str | None:
    refusal = original(request, *args, **kwargs)
    if refusal is not None and "return_logprob" in refusal:
        refusal = None  # we support them
    if refusal is None and request.return_hidden_states:
        refusal = f"{ALGORITHM} speculative decoding does not support return_hidden_states yet."
    if refusal is None:
        try:  # for requests that bypassed SamplingParams.verify
            parse(request.sampling_params.custom_params, active_config().drafter_names)
        except HintError as error:
            return str(error)
        return None
    fix = "Leave it out of the request, or start the server with --whiflash-router off."
    return f"{refusal.replace('DFLASH', ALGORITHM)} {fix}"


def _open_dead_ends(result: None, sampling: SamplingBatchInfo, logits: torch.Tensor) -> None:
    if sampling.grammar_mask is not None:
        open_dead_ends(logits)


def _judge_custom_params(drafters: tuple[str, ...], result: Any, params: SamplingParams, *args: Any) -> None:
    from sglang.srt.sampling.sampling_params import CustomParamValue

    parse(params.custom_params, drafters)
    try:
        # A value that SGLang cannot decode in the scheduler would crash it.
        msgspec.convert(params.custom_params, dict[str, CustomParamValue] | None)
    except msgspec.ValidationError as error:
        fix = "use numbers, strings, booleans, null, or flat lists and objects of these"
        raise HintError("custom_params", None, str(error), fix) from error


def _add_stats(
    result: GetInternalStateReqOutput, scheduler: Scheduler, request: GetInternalStateReq
) -> GetInternalStateReqOutput:
    worker: Any = scheduler.draft_worker
    if getattr(worker, "totals", None) is not None:
        # The state request reaches every rank in the same step, so ranks can be compared here.
        result.internal_state["whiflash"] = worker.totals.snapshot()
        result.internal_state[RANKS_FIELD] = {"replica": scheduler.ps.dp_rank or 0, **worker.ranks.snapshot()}
        if request.rid == ASKS_FOR_PRIORS:
            result.internal_state[PRIORS_FIELD] = worker.priors_document()
    return result
