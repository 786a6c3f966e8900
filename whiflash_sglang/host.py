"""The one door to SGLang's private and unstable names: the registered algorithm, the hooks and why, the builders.

The plugin calls `register_algorithm` and `install_hooks` in each process that SGLang spawns, where the launcher has
left a WhiFlash configuration in the environment. The launcher, whose process becomes the HTTP server, calls
`install_http` as well.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from whiflash_sglang.accelerator import (
    FLAG_GRAPHS,
    FLAG_POOL,
    FLAG_RUNNING,
    MAX_RUNNING,
    Memory,
    Need,
    check_attention,
    check_needs,
    check_room,
    graph_bytes,
    kv_bytes,
    ring_bytes,
)
from whiflash_sglang.adjust import open_dead_ends
from whiflash_sglang.admission import (
    judge_grammars,
    judge_logprobs,
    judge_names,
    judge_prompt,
    judge_samples,
    judge_sampling,
    judge_types,
)
from whiflash_sglang.checkpoints import (
    DRAFTER_FLAGS,
    FLAG_TARGET,
    DrafterSpec,
    check_ranks,
    load_drafter_spec,
    load_target_spec,
)
from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.drafters.runner import DraftRunner
from whiflash_sglang.ending import RefuseWhenEnding, requests_have_ended
from whiflash_sglang.errors import ConfigError, HintError
from whiflash_sglang.hints import CONTEXT_FIELD, Asked, context_params, parse
from whiflash_sglang.ranks import Ranks
from whiflash_sglang.safetensors_header import weight_bytes
from whiflash_sglang.spans import (
    TURN_ENDS_AFTER_OUTPUT,
    Markers,
    Pair,
    SpanReader,
    ToolOutput,
    message_context,
)
from whiflash_sglang.transfer import to_device

logger = logging.getLogger(__name__)

ALGORITHM = "WHIFLASH"
PRIORS_FIELD, RANKS_FIELD = "whiflash_priors", "whiflash_ranks"  # of the scheduler's state
LATE_KV = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
TRIED_ATTENTION = "triton"
ASKS_FOR_PRIORS = "whiflash_priors"  # id of a request for the state


class WhiFlashAlgorithm(CustomSpecAlgo):
    """What the scheduler asks of a speculative algorithm.

    It counts as one of the DFlash family, as SGLang's verify of a linear chain, its draft input (`DFlashDraftInputV2`)
    and the room for draft KV in the memory budget are chosen by that.
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
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> Any:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def create_worker(self, server_args: Any) -> type:
        """The base class warns that steps do not overlap, which is `handle_server_args`'s own choice."""
        return self.factory(server_args)

    def handle_server_args(self, server_args: Any) -> None:
        """Settle what follows from the algorithm; runs inside SGLang's own argument resolution."""
        if server_args.tp_size > 1:
            check_ranks(FLAG_TARGET, server_args.model_path, server_args.tp_size)
            for name, path in active_config().draft_paths.items():
                check_ranks(DRAFTER_FLAGS[name], path, server_args.tp_size)
        server_args.speculative_eagle_topk = 1
        server_args.speculative_num_steps = 1
        # A round ends when the host has read what it committed; overlap would need that to stay on the device.
        server_args.disable_overlap_schedule = True
        if os.environ.get(LATE_KV, "").lower() in ("1", "true", "yes", "y"):
            problem = "KV has no memory yet while WHIFLASH captures graphs and measures what rounds cost"
            raise ConfigError(LATE_KV, os.environ[LATE_KV], problem, "unset that environment variable")
        if server_args.max_running_requests is None and server_args.device.startswith("cuda"):
            server_args.max_running_requests = MAX_RUNNING


@dataclass
class WhiFlashDraftInput(DFlashDraftInputV2):
    """What survives between rounds: each request's bonus token and length; and how room for the next one is made."""

    def prepare_for_decode(self, batch: Any) -> None:
        """Reserve KV slots for each request's next window.

        One window, where SGLang's own reserves two: the second is for its overlapped schedule, in which lengths lag a
        round behind. Slots that nobody will write are prompt tokens that the radix tree could have kept.
        """
        from sglang.srt.mem_cache.allocation import alloc_for_spec_decode
        from sglang.srt.runtime_context import get_spec

        window = get_spec().speculative_num_draft_tokens
        committed = [request.kv_committed_len for request in batch.reqs]
        allocated = [request.kv.kv_allocated_len for request in batch.reqs]
        reserved = [max(known, length + window) for known, length in zip(allocated, committed, strict=True)]
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


def draft_input(bonus_tokens: torch.Tensor, new_seq_lens: torch.Tensor) -> WhiFlashDraftInput:
    """SGLang's carrier of state between steps, for requests with the given bonus tokens and lengths [rows]."""
    nothing = bonus_tokens.new_empty((len(bonus_tokens), 0))  # the fields of other algorithms
    return WhiFlashDraftInput(
        topk_p=nothing,
        topk_index=nothing,
        bonus_tokens=bonus_tokens.to(torch.int64),
        new_seq_lens=new_seq_lens.to(torch.int64),
        hidden_states=nothing,
    )


def register_algorithm() -> None:
    """Make `--speculative-algorithm WHIFLASH` known to SGLang in this process."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import get_spec

    if get_spec(ALGORITHM) is not None:
        return

    @SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=False, spec_class=WhiFlashAlgorithm)
    def _worker_class(server_args: Any) -> type:
        from whiflash_sglang.worker import WhiFlashWorker

        return WhiFlashWorker


def install_hooks() -> None:
    """Register the hooks; SGLang applies them once all plugins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    components = "sglang.srt.model_executor.model_runner_components"
    # Captured layers: SGLang knows the layers of one drafter; ours need the union of both.
    HookRegistry.register(
        f"{components}.spec_aux_hidden_state.resolve_spec_aux_hidden_state_config", _capture_union, HookType.AROUND
    )
    # Radix keys: EAGLE-3's entry at a position depends on the next token, so that with it a prefix is shared only
    # together with its next token (bigram keys, as SGLang does it for its own EAGLE).
    HookRegistry.register("sglang.srt.mem_cache.registry.create_tree_cache", _bigram_keys, HookType.BEFORE)
    # Live figures: /server_info shows the scheduler's internal state, and has no place for a plugin's own.
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _add_figures, HookType.AFTER)
    # Reserve: SGLang keeps room for two windows of each running request when it admits and retracts; see
    # WhiFlashDraftInput.prepare_for_decode.
    HookRegistry.register(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode", _one_window, HookType.AROUND
    )
    # Longest request: SGLang lets one fill the whole pool, without room for its last verify window.
    HookRegistry.register(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info", _leave_room_for_a_window, HookType.AFTER
    )
    # Attention: SGLang takes fa3 or flashinfer where nothing is said, and rounds have been tried with triton only.
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs._get_default_attn_backend", _tried_attention, HookType.AROUND
    )
    # Refusals: SGLang names the algorithm of which ours counts as one of the family, and no mend; log probabilities,
    # which our rounds return, it refuses; hidden states, which they do not, it refuses only where steps overlap.
    HookRegistry.register(
        "sglang.srt.speculative.dflash_utils.validate_dflash_request", _name_ourselves, HookType.AROUND
    )
    # Dead ends: a grammar that allows no token leaves a sampler no probabilities, which ends the scheduler.
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias", _open_dead_ends, HookType.AFTER
    )
    # Signals: SGLang samples in the logits' own memory, and routers read the target's own distribution in rounds too.
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample", _keep_raw_logits, HookType.BEFORE
    )
    # Hints: judged where SGLang judges sampling parameters, in the HTTP process, which answers a ValueError with 400.
    judge = functools.partial(_judge_custom_params, active_config().drafter_names)
    HookRegistry.register("sglang.srt.sampling.sampling_params.SamplingParams.verify", judge, HookType.AFTER)


def install_http(server_args: Any) -> None:
    """What the HTTP process has beside: our routes, and hooks where requests come in and go out."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from whiflash_sglang.http_routes import Finished, routes

    finished = Finished()
    # Context: only here are the messages of a chat known, and so what its reply reacts to.
    chat = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
    HookRegistry.register(f"{chat}._convert_to_internal_request", _tell_context, HookType.AFTER)
    # Hints: the schemas of these routes know no `custom_params`, and drop them without a word.
    anthropic = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
    ollama = "sglang.srt.entrypoints.ollama.serving.OllamaServing"  # whose handle_chat fails by itself
    responses = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
    HookRegistry.register(f"{responses}.create_responses", _keep_custom_params, HookType.AROUND)
    HookRegistry.register(f"{anthropic}.handle_messages", _keep_custom_params, HookType.AROUND)
    HookRegistry.register(f"{ollama}.handle_generate", _keep_custom_params, HookType.AROUND)
    # Log probabilities: of a streamed chat's piece SGLang gives every token the alternatives of the first.
    HookRegistry.register(f"{chat}._process_logprobs_tokens", _each_its_own, HookType.AROUND)
    # Figures: a chat reply has no meta_info, which passes here for every request.
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    keep = functools.partial(_keep_finished, finished)
    HookRegistry.register(f"{manager}._handle_batch_output", keep, HookType.BEFORE)
    HookRegistry.register(f"{manager}.generate_request", _hand_on_custom_params, HookType.BEFORE)
    # Ending: SGLang waits for running requests without end, and takes new ones meanwhile.
    HookRegistry.register(f"{manager}.sigterm_watchdog", _end_soon, HookType.AROUND)
    # Admission: what the scheduler cannot decode or compute ends it; nothing between here and there judges it.
    asked_for = "sglang.srt.managers.io_struct.GenerateReqInput"
    HookRegistry.register(f"{asked_for}._handle_parallel_sampling", _judge_samples, HookType.AFTER)
    HookRegistry.register(f"{manager}._create_tokenized_object", _judge_names, HookType.BEFORE)
    HookRegistry.register(f"{manager}._dispatch_to_scheduler", _judge_request, HookType.BEFORE)
    # Secrets: /server_info shows all arguments to whoever may use the server, the operator's key among them.
    HookRegistry.register(f"{manager}.resolved_config_dict", _without_keys, HookType.AFTER)
    HookRegistry.register(f"{manager}.get_internal_state", _states_without_keys, HookType.AROUND)
    HookRegistry.apply_hooks()

    http_server.app.add_middleware(RefuseWhenEnding, is_ending=functools.partial(_is_ending, http_server))

    config = active_config()
    about = {"model": server_args.served_model_name, "router": config.router, "drafters": config.draft_paths}

    async def states(priors: bool = False) -> list[dict[str, Any]]:
        """One of each replica (`--dp-size`), with its priors or without."""
        found = await ask_schedulers(http_server.get_global_state().tokenizer_manager, priors)
        return sorted(found, key=replica_of)

    for_operators = auth_level(AuthLevel.ADMIN_OPTIONAL)
    # One by one: SGLang's guard finds no endpoint, and so no level, behind an included router.
    for route in routes(finished, states, about, for_operators).routes:
        http_server.app.add_api_route(route.path, route.endpoint, methods=[*route.methods])


raw_logits: list[torch.Tensor] = []
"""Of the target's newest prefill [requests, vocab], as they were before sampling; at most one."""


def _keep_raw_logits(model_runner: Any, logits_output: Any, forward_batch: Any) -> None:
    raw_logits[:] = [logits_output.next_token_logits.clone()]


def _capture_union(
    original: Any, *, server_args: Any, model_config: Any, spec_algorithm: Any, is_draft_worker: bool
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


def _bigram_keys(context: Any) -> None:
    if "e3" in active_config().drafter_names and context.server_args.speculative_algorithm == ALGORITHM:
        context.params.is_eagle = True


def _one_window(original: Any, server_args: Any = None) -> int:
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_len_per_decode

    return int(get_alloc_len_per_decode(server_args))


def _tried_attention(original: Any, server_args: Any, use_mla_backend: bool, model_config: Any) -> str:
    ours = server_args.speculative_algorithm == ALGORITHM and server_args.device.startswith("cuda")
    return TRIED_ATTENTION if ours else str(original(server_args, use_mla_backend, model_config))


def _leave_room_for_a_window(info: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    pool_tokens, max_request_len, max_prompt_len = info[0], info[4], info[5]
    room = pool_tokens - 1 - worker.server_args.speculative_num_draft_tokens
    excess = max(0, max_request_len - room)
    return (*info[:4], max_request_len - excess, max_prompt_len - excess, *info[6:])


def _name_ourselves(original: Any, request: Any, *args: Any, **kwargs: Any) -> str | None:
    refusal = original(request, *args, **kwargs)
    if refusal is not None and "return_logprob" in refusal:
        refusal = None  # ours returns them
    if refusal is None and request.return_hidden_states:
        refusal = f"{ALGORITHM} speculative decoding does not support return_hidden_states yet."
    if refusal is None:
        try:  # requests that have not come through SamplingParams.verify
            parse(request.sampling_params.custom_params, active_config().drafter_names)
        except HintError as error:
            return str(error)
        return None
    mend = "Leave it out of the request, or start the server with --whiflash-router off."
    return f"{refusal.replace('DFLASH', ALGORITHM)} {mend}"


def _open_dead_ends(result: None, sampling: Any, logits: torch.Tensor) -> None:
    if sampling.grammar_mask is not None:
        open_dead_ends(logits)


def _judge_custom_params(drafters: tuple[str, ...], result: Any, params: Any, *args: Any) -> None:
    from sglang.srt.sampling.sampling_params import CustomParamValue

    parse(params.custom_params, drafters)
    try:
        # What SGLang cannot decode on the scheduler's side would end the scheduler.
        msgspec.convert(params.custom_params, dict[str, CustomParamValue] | None)
    except msgspec.ValidationError as error:
        mend = "give numbers, text, truth values, null, or flat lists and objects of these"
        raise HintError("custom_params", None, str(error), mend) from error


def _judge_samples(result: None, asked: Any) -> None:
    judge_samples(asked.parallel_sample_num)


def _judge_names(manager: Any, asked: Any, *args: Any, **kwargs: Any) -> None:
    judge_names(asked.sampling_params)


def _judge_request(manager: Any, sent: Any) -> None:
    """Refuse a request that would end the scheduler, just before it is sent there.

    What the scheduler would refuse is refused here too: its refusals come as a reply without logprobs, and a stream
    that asked for them answers that with status 500.
    """
    from sglang.srt.managers import io_struct
    from sglang.srt.speculative import dflash_utils

    if isinstance(sent, io_struct.TokenizedGenerateReqInput):
        requests = [sent]
    elif isinstance(sent, io_struct.BatchTokenizedGenerateReqInput):
        requests = sent.batch
    else:
        return
    vocab_size = manager.model_config.vocab_size
    for request in requests:
        params = request.sampling_params
        typed = copy.copy(request)
        # Made by SGLang itself: an array of integers, and what is of no declared type.
        typed.input_ids = typed.mm_inputs = typed.mm_data_mooncake = typed.time_stats = None
        judge_types(params, "sampling_params", io_struct.msgpack_encode, io_struct.dec_hook)
        judge_types(typed, "request", io_struct.msgpack_encode, io_struct.dec_hook)
        judge_prompt(request.input_ids, vocab_size)
        judge_sampling(params, vocab_size)
        judge_grammars(params)
        refusal = dflash_utils.validate_dflash_request(request, False)
        if refusal is not None:
            raise ValueError(refusal)
        judge_logprobs(request.top_logprobs_num, vocab_size)


async def _keep_custom_params(original: Any, serving: Any, asked: Any, raw_request: Any = None) -> Any:
    """Keep what the body says beside the route's schema, for `_hand_on_custom_params`.

    Hints are judged here too: these routes answer what is found later with status 500, or within a stream.
    """
    from fastapi import HTTPException

    if raw_request is not None:
        raw_request.state.custom_params = (await raw_request.json()).get("custom_params")
        try:
            _judge_custom_params(active_config().drafter_names, None, raw_request.state)
        except HintError as error:
            raise HTTPException(400, str(error)) from error
    return await original(serving, asked, raw_request)


def _hand_on_custom_params(manager: Any, asked: Any, raw_request: Any = None) -> None:
    if kept := getattr(getattr(raw_request, "state", None), "custom_params", None):
        own = asked.sampling_params.get("custom_params") or {}
        asked.sampling_params = {**asked.sampling_params, "custom_params": {**kept, **own}}


def _tell_context(result: tuple[Any, Any], serving: Any, request: Any, *args: Any) -> None:
    adapted, _ = result
    context = context_params(message_context(request.messages))
    params = adapted.sampling_params
    params["custom_params"] = {**(params.get("custom_params") or {}), CONTEXT_FIELD: context}


def _each_its_own(original: Any, serving: Any, logprobs: Any, use_token_index: bool = False) -> Any:
    return original(serving, logprobs, use_token_index=True)


def _without_keys(arguments: dict[str, Any], *args: Any) -> dict[str, Any]:
    return {name: None if name in ("api_key", "admin_api_key") else value for name, value in arguments.items()}


async def _states_without_keys(original: Any, manager: Any) -> list[dict[str, Any]]:
    return [_without_keys(state) for state in await original(manager)]


async def ask_schedulers(manager: Any, priors: bool) -> list[dict[str, Any]]:
    """The state of every replica's scheduler, as `TokenizerManager.get_internal_state`.

    A document of priors takes as long as several rounds, and names tools: it is made where it is asked for, by the
    route that is theirs.
    """
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=ASKS_FOR_PRIORS if priors else None)
    ask = vars(manager)["get_internal_state_communicator"]  # made when the manager is
    return [reply.internal_state for reply in await ask(request)]


def replica_of(state: Mapping[str, Any]) -> int:
    """Which replica (`--dp-size`) a scheduler's state is of."""
    return int(state.get(RANKS_FIELD, {}).get("replica", 0))


def _keep_finished(finished: Any, manager: Any, batch: Any) -> None:
    from sglang.srt.managers.io_struct import (
        BatchStrOutput,
        BatchTokenIDOutput,
        unwrap_from_pickle,
        wrap_as_pickle,
    )

    if not isinstance(batch, BatchStrOutput | BatchTokenIDOutput) or batch.customized_info is None:
        return
    ended = [i for i, reason in enumerate(batch.finished_reasons) if reason is not None]
    if not ended:
        return
    shown = unwrap_from_pickle(batch.customized_info)
    for i in ended:
        request_id = batch.rids[i]
        shown["whiflash"][i] = [_readable(manager, figures) for figures in shown["whiflash"][i] if figures is not None]
        for figures in shown["whiflash"][i]:
            about = {
                "id": request_id,
                "finish_reason": batch.finished_reasons[i]["type"],
                "prompt_tokens": batch.prompt_tokens[i],
                "completion_tokens": batch.completion_tokens[i],
                "cached_tokens": batch.cached_tokens[i],
                "retractions": batch.retraction_counts[i],
            }
            finished.keep(request_id, {**about, **figures})
    batch.customized_info = wrap_as_pickle(shown)


def _readable(manager: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """A request's figures with the tokens of its trace as text, where this process has a tokenizer."""
    from whiflash_sglang.http_routes import with_texts

    if "trace" not in figures or manager.tokenizer is None:
        return figures
    return with_texts(figures, _token_texts(manager.tokenizer))


@functools.lru_cache(maxsize=1)
def _token_texts(tokenizer: Any) -> Any:
    from whiflash_sglang.http_routes import TokenTexts

    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return TokenTexts(decode, tokenizer.encode("a", add_special_tokens=False))


def _is_ending(http_server: Any) -> bool:
    serving = http_server.get_global_state()
    return serving is not None and serving.tokenizer_manager.gracefully_exit


async def _end_soon(original: Any, manager: Any) -> None:
    if not await requests_have_ended(manager):
        logger.error("WHIFLASH: requests did not end when they were aborted; the server ends without them")
        os.environ["SGL_FORCE_SHUTDOWN"] = "1"  # SGLang's own: do not wait for them
    await original(manager)


def _add_figures(result: Any, scheduler: Any, request: Any) -> Any:
    worker = scheduler.draft_worker
    if getattr(worker, "totals", None) is not None:
        # The request for it comes to every rank in the same step, so that ranks can be compared here.
        result.internal_state["whiflash"] = worker.totals.snapshot()
        result.internal_state[RANKS_FIELD] = {"replica": scheduler.ps.dp_rank or 0, **worker.ranks.snapshot()}
        if request.rid == ASKS_FOR_PRIORS:
            result.internal_state[PRIORS_FIELD] = worker.priors_document()
    return result


def active_config() -> WhiFlashConfig:
    """The configuration that the launcher put into the environment of this process."""
    return WhiFlashConfig.from_environ(os.environ)


def drafter_specs(config: WhiFlashConfig, server_args: Any) -> dict[str, DrafterSpec]:
    """The drafters' checkpoints by name, checked against the target's."""
    target = load_target_spec(server_args.model_path)
    return {name: load_drafter_spec(path, name, target) for name, path in config.draft_paths.items()}


def check_accelerator(server_args: Any) -> None:
    """Refuse what a GPU could not serve, of arguments that SGLang has resolved; nothing is loaded yet."""
    from sglang.srt.utils import get_device_memory_capacity

    if not server_args.device.startswith("cuda"):
        return
    target, config = load_target_spec(server_args.model_path), active_config()
    drafters = list(drafter_specs(config, server_args).values())
    drafting = server_args.speculative_draft_attention_backend
    check_attention({*server_args.get_attention_backends(), drafting} - {None}, target, drafters)
    capacity = get_device_memory_capacity(server_args.device)  # MiB
    if capacity is None or server_args.mem_fraction_static is None or server_args.quantization is not None:
        return  # what weights take is not known
    ranks = server_args.tp_size
    paths = {FLAG_TARGET: target.path} | {DRAFTER_FLAGS[spec.kind]: spec.path for spec in drafters}
    weights = sum(weight_bytes(flag, Path(path)) for flag, path in paths.items()) // ranks
    memory = Memory(int(capacity * 2**20), server_args.mem_fraction_static, weights)
    token_bytes = sum(kv_bytes(spec, 1, ranks) for spec in (target, *drafters))  # KV has a byte an element at least
    check_room(memory, token_bytes, server_args.speculative_num_draft_tokens)


def check_memory(config: WhiFlashConfig, specs: Mapping[str, DrafterSpec], target_runner: Any, requests: Any) -> None:
    """Refuse where a GPU has no room left for what WHIFLASH needs, before any of it is allocated.

    `requests`: SGLang's table of them (`ReqToTokenPool`).
    """
    if str(target_runner.device).startswith("cuda"):
        check_needs(torch.cuda.mem_get_info()[0], memory_needs(config, specs, target_runner, requests))


def memory_needs(
    config: WhiFlashConfig, specs: Mapping[str, DrafterSpec], target_runner: Any, requests: Any
) -> list[Need]:
    """Draft pools, rings and CUDA graphs."""
    element, tokens = target_runner.kv_cache_dtype.itemsize, target_runner.max_total_num_tokens
    server_args = target_runner.server_args
    num_slots, context = requests.req_to_token.shape
    graphs = server_args.cuda_graph_config.decode
    sizes = [] if graphs.backend == "disabled" else sorted({min(size, requests.size) for size in graphs.bs})
    drafts = {name: spec.num_queries for name, spec in specs.items()}
    windows = {1, *(config.eagle_steps + 1 if name == "e3" else width for name, width in drafts.items())}
    of_feature = target_runner.dtype.itemsize
    hidden = target_runner.model_config.hidden_size
    captures = len(captured_layers(specs.values())) + (config.router == "neural")  # which reads final hidden states
    pools = sum(tokens * kv_bytes(spec, element, server_args.tp_size) for spec in specs.values())
    rings = ring_bytes(num_slots, config.max_backlog, [spec.hidden_size * of_feature for spec in specs.values()])
    vocab_size = target_runner.model_config.vocab_size
    captured = graph_bytes(sizes, windows, drafts.values(), captures * hidden * of_feature, vocab_size, context)
    return [
        Need("draft pools", pools, FLAG_POOL, tokens),
        Need("features that wait for drafters", rings, FLAG_RUNNING, requests.size),
        Need("CUDA graphs", captured, FLAG_GRAPHS, max(sizes, default=0)),
    ]


def tp_ranks() -> Ranks:
    """The processes among which `--tp-size` has divided the model that this one serves a part of."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return Ranks(group.device_group, group.cpu_group) if group.world_size > 1 else Ranks()


def captured_layers(specs: Iterable[DrafterSpec]) -> tuple[int, ...]:
    """Target layers whose outputs are captured: the sorted union of what the drafters need."""
    return tuple(sorted({layer for spec in specs for layer in spec.layer_ids}))


def build_draft_runner(
    spec: DrafterSpec, server_args: Any, gpu_id: int, ps: Any, nccl_port: int, target_worker: Any
) -> DraftRunner:
    """Load one drafter with SGLang's own model and loader, beside the target."""
    from sglang.srt.speculative.draft_worker_common import build_draft_tp_worker

    target_runner = target_worker.model_runner
    args = copy.deepcopy(server_args)
    # Where `--dtype` names no type, SGLang takes the checkpoint's own. A drafter has to be of the target's: it reads
    # the target's features and embeddings as they are.
    dtype = str(target_runner.dtype).removeprefix("torch.")
    args.override("whiflash.drafter", speculative_draft_model_path=spec.path, dtype=dtype)
    bundle = build_draft_tp_worker(
        server_args=args,
        gpu_id=gpu_id,
        ps=replace(ps, pp_rank=0),
        nccl_port=nccl_port,
        target_model_config=target_runner.model_config,
        algo_label=ALGORITHM,
        # SGLang allows drafters only GPU backends; on a CPU the platform's own serves them as it serves the target.
        attention_backend_override=None if torch.cuda.is_available() else server_args.attention_backend,
    )
    if spec.kind == "e3":
        _share_embedding(bundle.draft_model, target_runner.model)
    return DraftRunner(spec, bundle.draft_worker, target_runner.spec_algorithm, target_runner.model)


def _share_embedding(draft_model: Any, target_model: Any) -> None:
    """EAGLE-3 uses the target's embedding, and its head too where the checkpoint has none of its own."""
    embedding, head = target_model.get_embed_and_head()
    if draft_model.load_lm_head_from_target:
        draft_model.set_embed_and_head(embedding, head)
    else:
        draft_model.set_embed(embedding)


def capture_final_hidden_states(target_model: Any) -> None:
    """Let the target return its final hidden states behind the captured features, in the same tensor.

    SGLang returns either. Given to its logits processor as one more captured layer, they take the way of the others:
    through pruning, CUDA graphs and the result of the forward.
    """

    def append(processor: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        input_ids, hidden, head, metadata, captured, *rest = args
        if captured is None:
            return None
        packed = isinstance(captured, torch.Tensor)
        captured = torch.cat([captured, hidden], dim=-1) if packed else [*captured, hidden]
        return (input_ids, hidden, head, metadata, captured, *rest), kwargs

    target_model.logits_processor.register_forward_pre_hook(append, with_kwargs=True)


def standing_batch(target_worker: Any, kv_table: torch.Tensor, num_rows: int, context: int, width: int) -> Any:
    """A decode batch of requests that nobody made, with `context` committed tokens each, to time rounds on.

    Only while no request holds a KV slot. Each row has slots of its own, as requests do (rows that share theirs find
    them in the processor's cache, and take less time); only where the pool is too small for that are some shared.
    """
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner = target_worker.model_runner
    device = kv_table.device
    windows = num_rows * width
    places = torch.arange(num_rows * context, dtype=kv_table.dtype, device=device)
    behind = places % (runner.max_total_num_tokens - windows - 1) + windows + 1  # slot 0 is nobody's
    window = torch.arange(1, windows + 1, dtype=kv_table.dtype, device=device)
    kv_table[:num_rows, :context] = behind.view(num_rows, context)
    kv_table[:num_rows, context : context + width] = window.view(num_rows, width)
    requests = [Req(f"standing-{row}", "", [0], SamplingParams(temperature=0)) for row in range(num_rows)]
    for row, request in enumerate(requests):
        request.req_pool_idx = row
    batch = ScheduleBatch(reqs=requests, model_config=runner.model_config, device=device)
    batch.spec_algorithm = runner.spec_algorithm
    batch.forward_mode = ForwardMode.DECODE
    batch.req_pool_indices = torch.arange(num_rows, device=device)
    batch.seq_lens_cpu = torch.full((num_rows,), context, dtype=torch.int64)
    batch.seq_lens = batch.seq_lens_cpu.to(device)
    batch.seq_lens_sum = num_rows * context
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, runner.model_config.vocab_size)
    batch.spec_info = draft_input(torch.zeros(num_rows, dtype=torch.int64, device=device), batch.seq_lens)
    return batch


def prompt_token(request: Any, position: int) -> int | None:
    """The token of a request's known text at `position`, None at its end (where the next token is being sampled)."""
    prompt = request.origin_input_ids
    if position < len(prompt):
        return int(prompt[position])
    position -= len(prompt)
    return int(request.output_ids[position]) if position < len(request.output_ids) else None


def asked(request: Any, config: WhiFlashConfig) -> Asked:
    """A request's hints and context. Of one that is refused for its hints, and only passes through, none."""
    try:
        return parse(request.sampling_params.custom_params, config.drafter_names)
    except HintError:
        return Asked()


class Pieces(dict[int, str]):
    """Token id -> the tokenizer's own piece, as they are asked for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            piece = piece.decode("latin-1")
        self[token] = piece or ""  # ids that only fill up the vocabulary have none
        return self[token]


def span_reader(server_args: Any, target_worker: Any) -> SpanReader:
    """Reads spans by the markers of the parsers that `--reasoning-parser` and `--tool-call-parser` name."""
    tokenizer = target_worker.tokenizer
    if tokenizer is None:
        logger.warning("WHIFLASH: without a tokenizer (--skip-tokenizer-init) all text counts as span `answer`")
        return SpanReader(Markers(), {})
    pieces = Pieces(tokenizer)
    markers = model_markers(server_args.reasoning_parser, server_args.tool_call_parser, tokenizer, pieces)
    turn_ends = frozenset({*(target_worker.model_config.hf_eos_token_id or ()), tokenizer.eos_token_id} - {None})
    return SpanReader(markers._replace(turn_ends=turn_ends), pieces)


MARKER_ATTRIBUTES = (
    ("bot_token", "eot_token"),
    ("tool_call_start_token", "tool_call_end_token"),
    ("TOOL_CALL_START", "TOOL_CALL_END"),
    ("bot", "suffix"),
)
"""What SGLang's detectors of tool calls name their markers, the outer one first."""


def model_markers(
    reasoning_parser: str | None, tool_call_parser: str | None, tokenizer: Any, pieces: Mapping[int, str]
) -> Markers:
    """The markers that SGLang's parsers look for, as joined pieces. Its detectors name them in several ways."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    def joined(marker: str | None) -> str:
        tokens = tokenizer.encode(marker.strip(), add_special_tokens=False) if marker else []
        # Some tokenizers put a space before a text's first word.
        return "".join([pieces[token] for token in tokens]).lstrip("▁Ġ ")

    markers = Markers()
    if reasoning_parser is not None:
        detector = ReasoningParser(reasoning_parser, tokenizer=tokenizer).detector
        markers = markers._replace(
            reasoning=Pair(joined(detector.think_start_token), joined(detector.think_end_token)),
            call_ends_reasoning=detector.tool_start_token is not None,
            begins_reasoning=detector.force_reasoning,
        )
    if tool_call_parser is not None:
        detector = FunctionCallParser([], tool_call_parser, tokenizer=tokenizer).detector
        found = [pair for pair in MARKER_ATTRIBUTES if getattr(detector, pair[0], "")]
        if found:
            opens, closes = (getattr(detector, name) for name in found[0])
            markers = markers._replace(tool_call=Pair(joined(opens), joined(closes)))
        else:
            logger.warning("WHIFLASH: tool calls of parser %s have no marker and count as `answer`", tool_call_parser)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = "".join(template.values())
    for marker, turn_ends in TURN_ENDS_AFTER_OUTPUT.items():
        if marker in (template or ""):
            return markers._replace(tool_output=ToolOutput(joined(marker), turn_ends))
    return markers


def metric_labels(server_args: Any) -> dict[str, str]:
    """The labels that SGLang gives its own metrics, as far as they tell one of our servers from another."""
    return {"model_name": server_args.served_model_name, "engine_type": "unified"}


def print_start_block(
    config: WhiFlashConfig,
    specs: dict[str, DrafterSpec],
    target_worker: Any,
    runners: dict[str, DraftRunner],
    widths: Iterable[int],
    router: str,
) -> None:
    """One block that says what is being served, and what it costs. `widths`: those that rounds verify."""
    runner = target_worker.model_runner
    tokens, lost = kv_tokens_lost(runner, runners.values())
    drafters = "; ".join(f"{name} {spec.path} (layers {list(spec.layer_ids)})" for name, spec in specs.items())
    backends = {"target": runner.server_args.attention_backend}
    backends |= {name: r.worker.model_runner.server_args.attention_backend for name, r in runners.items()}
    *others, width = sorted(widths)
    largest = max(max(r.graph_sizes, default=0) for r in runners.values())
    captured = f"widths {', '.join(map(str, others))} and {width}, and drafts, for batches of up to {largest}"
    lines = {
        "target": runner.server_args.model_path,
        "drafters": drafters,
        "router": router,
        "verify width": f"{width} (anchor and up to {width - 1} drafts)",
        "catch-up": f"{config.catch_up}, a drafter lags at most {config.max_backlog} tokens behind",
        "KV tokens": f"{tokens}, and {lost} more would fit without the draft pools",
        "attention": attention_line(backends, str(runner.device)),
        "requests": f"up to {runner.req_to_token_pool.size} at once ({FLAG_RUNNING})",
        "CUDA graphs": captured if largest else "none",
    }
    print("WhiFlash\n" + "\n".join(f"  {key:<13}{value}" for key, value in lines.items()), flush=True)


def attention_line(backends: Mapping[str, str], device: str) -> str:
    """The start block's line: the backend of the target and of each drafter, and whether rounds were tried with it."""
    line = ", ".join(f"{name} {backend}" for name, backend in backends.items())
    if not device.startswith("cuda"):
        return line
    if {*backends.values()} == {TRIED_ATTENTION}:
        return f"{line}; WHIFLASH's default on a GPU"
    return f"{line}; not tried yet: --attention-backend {TRIED_ATTENTION} is the default"


def kv_tokens_lost(target_runner: Any, runners: Iterable[DraftRunner]) -> tuple[int, int]:
    """KV tokens the pools hold, and how many more the memory of the draft pools would hold for the target alone."""
    tokens = target_runner.max_total_num_tokens
    draft_bytes = sum(sum(r.worker.model_runner.token_to_kv_pool.get_kv_size_bytes()) for r in runners)
    return tokens, int(tokens * draft_bytes / sum(target_runner.token_to_kv_pool.get_kv_size_bytes()))
