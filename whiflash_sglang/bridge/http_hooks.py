"""Hooks and routes of the HTTP process. Every hook has a comment with its reason."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whiflash_sglang.bridge.admission import (
    judge_grammars,
    judge_logprobs,
    judge_names,
    judge_prompt,
    judge_samples,
    judge_sampling,
    judge_types,
)
from whiflash_sglang.bridge.scheduler_hooks import ASKS_FOR_PRIORS, RANKS_FIELD, _judge_custom_params
from whiflash_sglang.bridge.shutdown import RefuseWhenEnding, requests_have_ended
from whiflash_sglang.core.errors import HintError
from whiflash_sglang.core.hints import CONTEXT_FIELD, context_params
from whiflash_sglang.core.spans import message_context
from whiflash_sglang.startup.config import active_config

if TYPE_CHECKING:
    from sglang.srt.entrypoints.http_server import _GlobalState
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

    from whiflash_sglang.bridge.http_routes import Finished

logger = logging.getLogger(__name__)


def install_http(server_args: ServerArgs) -> None:
    """Install our routes, and hooks on incoming requests and outgoing results."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from whiflash_sglang.bridge.http_routes import Finished, routes

    finished = Finished()
    # Context: chat messages, and so what the reply reacts to, are known only here.
    chat = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
    HookRegistry.register(f"{chat}._convert_to_internal_request", _tell_context, HookType.AFTER)
    # Hints: the schemas of these routes lack `custom_params` and silently drop it.
    anthropic = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
    ollama = "sglang.srt.entrypoints.ollama.serving.OllamaServing"  # its handle_chat fails without our hooks, too
    responses = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
    HookRegistry.register(f"{responses}.create_responses", _keep_custom_params, HookType.AROUND)
    HookRegistry.register(f"{anthropic}.handle_messages", _keep_custom_params, HookType.AROUND)
    HookRegistry.register(f"{ollama}.handle_generate", _keep_custom_params, HookType.AROUND)
    # Logprobs: in a streamed chat chunk, SGLang gives every token the top logprobs of the first.
    HookRegistry.register(f"{chat}._process_logprobs_tokens", _each_its_own, HookType.AROUND)
    # Figures: chat replies have no meta_info, but every request's meta_info passes through here.
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    keep = functools.partial(_keep_finished, finished)
    HookRegistry.register(f"{manager}._handle_batch_output", keep, HookType.BEFORE)
    HookRegistry.register(f"{manager}.generate_request", _hand_on_custom_params, HookType.BEFORE)
    # Shutdown: SGLang waits for running requests without a limit, and accepts new ones meanwhile.
    HookRegistry.register(f"{manager}.sigterm_watchdog", _end_soon, HookType.AROUND)
    # Admission: requests that the scheduler cannot decode or compute would crash it, and are not validated later.
    asked_for = "sglang.srt.managers.io_struct.GenerateReqInput"
    HookRegistry.register(f"{asked_for}._handle_parallel_sampling", _judge_samples, HookType.AFTER)
    HookRegistry.register(f"{manager}._create_tokenized_object", _judge_names, HookType.BEFORE)
    HookRegistry.register(f"{manager}._dispatch_to_scheduler", _judge_request, HookType.BEFORE)
    # Secrets: /server_info shows all arguments, including the admin key, to every user.
    HookRegistry.register(f"{manager}.resolved_config_dict", _without_keys, HookType.AFTER)
    HookRegistry.register(f"{manager}.get_internal_state", _states_without_keys, HookType.AROUND)
    HookRegistry.apply_hooks()

    http_server.app.add_middleware(RefuseWhenEnding, is_ending=functools.partial(_is_ending, http_server))

    config = active_config()
    about = {"model": server_args.served_model_name, "router": config.router, "drafters": config.draft_paths}

    async def states(priors: bool = False) -> list[dict[str, Any]]:
        """The state of each replica (`--dp-size`), optionally with its priors."""
        found = await ask_schedulers(http_server.get_global_state().tokenizer_manager, priors)
        return sorted(found, key=replica_of)

    for_operators = auth_level(AuthLevel.ADMIN_OPTIONAL)
    # One by one: SGLang's auth guard does not find the endpoints, and so the auth levels, of an included router.
    for route in routes(finished, states, about, for_operators).routes:
        http_server.app.add_api_route(route.path, route.endpoint, methods=[*route.methods])


def _judge_samples(result: None, asked: GenerateReqInput) -> None:
    judge_samples(asked.parallel_sample_num)


def _judge_names(manager: TokenizerManager, asked: GenerateReqInput, *args: Any, **kwargs: Any) -> None:
    judge_names(asked.sampling_params)


def _judge_request(manager: TokenizerManager, sent: Any) -> None:
    """Reject a request that would crash the scheduler, just before it is sent there.

    Also rejects what the scheduler would reject: its errors arrive as replies without logprobs, which streams with
    logprobs turn into status 500.
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
        # Built by SGLang itself, or not of the declared type.
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
    """Keep the body's `custom_params`, which is not in the route's schema, for `_hand_on_custom_params`.

    Validates hints too: these routes report later errors with status 500, or within a stream.
    """
    from fastapi import HTTPException

    if raw_request is not None:
        raw_request.state.custom_params = (await raw_request.json()).get("custom_params")
        try:
            _judge_custom_params(active_config().drafter_names, None, raw_request.state)
        except HintError as error:
            raise HTTPException(400, str(error)) from error
    return await original(serving, asked, raw_request)


def _hand_on_custom_params(manager: TokenizerManager, asked: GenerateReqInput, raw_request: Any = None) -> None:
    if kept := getattr(getattr(raw_request, "state", None), "custom_params", None):
        own = asked.sampling_params.get("custom_params") or {}
        asked.sampling_params = {**asked.sampling_params, "custom_params": {**kept, **own}}


def _tell_context(
    result: tuple[GenerateReqInput, Any], serving: OpenAIServingChat, request: ChatCompletionRequest, *args: Any
) -> None:
    adapted, _ = result
    context = context_params(message_context(request.messages))
    params = adapted.sampling_params
    params["custom_params"] = {**(params.get("custom_params") or {}), CONTEXT_FIELD: context}


def _each_its_own(original: Any, serving: OpenAIServingChat, logprobs: Any, use_token_index: bool = False) -> Any:
    return original(serving, logprobs, use_token_index=True)


def _without_keys(arguments: dict[str, Any], *args: Any) -> dict[str, Any]:
    return {name: None if name in ("api_key", "admin_api_key") else value for name, value in arguments.items()}


async def _states_without_keys(original: Any, manager: TokenizerManager) -> list[dict[str, Any]]:
    return [_without_keys(state) for state in await original(manager)]


async def ask_schedulers(manager: TokenizerManager, priors: bool) -> list[dict[str, Any]]:
    """The state of every replica's scheduler, like `TokenizerManager.get_internal_state`.

    Priors are added only on request: they take as long as several rounds to build, and contain tool names.
    """
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=ASKS_FOR_PRIORS if priors else None)
    ask = vars(manager)["get_internal_state_communicator"]  # made when the manager is
    return [reply.internal_state for reply in await ask(request)]


def replica_of(state: Mapping[str, Any]) -> int:
    """The replica (`--dp-size`) that a scheduler's state belongs to."""
    return int(state.get(RANKS_FIELD, {}).get("replica", 0))


def _keep_finished(finished: Finished, manager: TokenizerManager, batch: Any) -> None:
    from sglang.srt.managers.io_struct import BatchStrOutput, BatchTokenIDOutput, unwrap_from_pickle, wrap_as_pickle

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


def _readable(manager: TokenizerManager, figures: dict[str, Any]) -> dict[str, Any]:
    """A request's figures, with the token ids of its trace as text if this process has a tokenizer."""
    from whiflash_sglang.bridge.http_routes import with_texts

    if "trace" not in figures or manager.tokenizer is None:
        return figures
    return with_texts(figures, _token_texts(manager.tokenizer))


@functools.lru_cache(maxsize=1)
def _token_texts(tokenizer: Any) -> Any:
    from whiflash_sglang.bridge.http_routes import TokenTexts

    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return TokenTexts(decode, tokenizer.encode("a", add_special_tokens=False))


def _is_ending(http_server: Any) -> bool:
    serving: _GlobalState | None = http_server.get_global_state()
    return serving is not None and serving.tokenizer_manager.gracefully_exit


async def _end_soon(original: Any, manager: TokenizerManager) -> None:
    if not await requests_have_ended(manager):
        logger.error("WHIFLASH: some requests did not end after abort; shutting down without them")
        os.environ["SGL_FORCE_SHUTDOWN"] = "1"  # SGLang's own: do not wait for them
    await original(manager)
