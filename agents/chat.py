"""`ChatWhiFlash`: LangChain's ChatOpenAI with sessions, router hints, reasoning and speculation figures.

    model = ChatWhiFlash(model="whiflash-demo", base_url="http://127.0.0.1:30000/v1", api_key="none", temperature=0)
    reply = model.bind_tools(tools).invoke(messages)
    reply.response_metadata["whiflash"]         # rounds, drafts and switches of this reply (agents/figures.py)
    reply.additional_kwargs["reasoning_content"]

All of ChatOpenAI's features work unchanged. Added:

- A session id, sent as the headers `X-Session-Affinity` and `X-SMG-Routing-Key` (SGLang's gateway), which lets a load
  balancer route an agent to the server that has its prefix cached. Set it with `ChatWhiFlash(session_id=...)`,
  `model.with_session(...)` or `session_id=...` in a call; the default is a new id per instance.
- Hints for the router (agents/hints.py): `ChatWhiFlash(hints={"route": "df"})`, `model.with_hints(span="answer")`,
  `hints={...}` in a call, or `extra_body={"custom_params": {"whiflash": {...}}}`. Precedence: call, `extra_body`,
  instance. The server detects the current span and the last tool in the messages by itself.
- Each reply's speculation figures, unless `speculation_figures=False`. They cost one small request after the reply.
- The model's reasoning, which ChatOpenAI drops in both directions: also in `content_blocks`, and counted in
  `usage_metadata`. It is sent back with the history, so the next prompt extends the generated text and hits the cache.
- A warning if the model calls a tool that it was not offered. SGLang's parsers drop such a call, and the reply is empty
  and ends with `stop`. `response_metadata["whiflash"]["dropped_call"]` is then true.

Supports chat completions only, not OpenAI's Responses API.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr

from whiflash_agents.figures import FigureReader, Figures
from whiflash_agents.hints import Hints, hints_in

log = logging.getLogger(__name__)

SESSION_HEADER = "X-Session-Affinity"
GATEWAY_HEADER = "X-SMG-Routing-Key"  # used by SGLang's gateway with policy `manual`
FIGURES = "whiflash"  # in response_metadata
REASONING = "reasoning_content"  # in additional_kwargs, and in the messages of requests and replies
DROPPED_CALL = "dropped_call"  # in the figures
# In response_metadata. With ChatOpenAI's provider, `content_blocks` would omit the reasoning.
PROVIDER = {"model_provider": "whiflash"}


def new_session_id() -> str:
    """A random session id."""
    return uuid.uuid4().hex


def checked_session_id(session_id: str) -> str:
    """`session_id`, if it is a valid header value; else raises ValueError."""
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", session_id):
        raise ValueError(f"session_id={session_id!r}: not a valid header; give 1 to 200 visible ASCII characters")
    return session_id


class ChatWhiFlash(ChatOpenAI):
    """A chat model for a WhiFlash server; see the module docstring. Other OpenAI servers work, but without figures."""

    session_id: Annotated[str, AfterValidator(checked_session_id)] = Field(default_factory=new_session_id)
    hints: Annotated[Hints, BeforeValidator(Hints.parse)] = Hints()
    speculation_figures: bool = True

    # By default, ChatOpenAI requests token counts of streams only from OpenAI's own servers.
    stream_usage: bool | None = True
    use_responses_api: Literal[False] = False

    _figures: FigureReader = PrivateAttr(default_factory=FigureReader)

    def with_session(self, session_id: str | None = None) -> Self:
        """A copy of this model with another session id (default: a new one). Copies share connections."""
        return self.model_copy(update={"session_id": checked_session_id(session_id or new_session_id())})

    def with_hints(self, **hints: Any) -> Self:
        """A copy of this model with these hints; fields that are not given keep their values. Raises HintError."""
        return self.model_copy(update={"hints": Hints.parse(hints).over(self.hints)})

    # ---- LangChain

    @property
    def _llm_type(self) -> str:
        return "whiflash-chat"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: `langchain_core.load` only supports its own list of classes."""
        return False

    # ---- requests

    def _get_request_payload(
        self,
        input_: LanguageModelInput,
        *,
        stop: list[str] | None = None,
        session_id: str | None = None,
        hints: Hints | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = self._convert_input(input_).to_messages()
        payload = super()._get_request_payload(messages, stop=stop, **kwargs)
        for message, sent in zip(messages, payload["messages"], strict=True):
            if isinstance(message, AIMessage) and (reasoning := message.additional_kwargs.get(REASONING)):
                sent[REASONING] = reasoning
        session = dict.fromkeys((SESSION_HEADER, GATEWAY_HEADER), checked_session_id(session_id or self.session_id))
        payload["extra_headers"] = session | dict(payload.get("extra_headers") or {})
        extra_body = payload.get("extra_body")
        payload["extra_body"] = Hints.parse(hints).over(hints_in(extra_body)).over(self.hints).into(extra_body)
        return payload

    # ---- replies

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        body = response if isinstance(response, dict) else response.model_dump()
        for generation, choice in zip(result.generations, body["choices"], strict=True):
            _keep_reasoning(generation.message, choice["message"])
            _count_reasoning(generation.message, body.get("usage"))
            generation.message.response_metadata |= PROVIDER
        result.llm_output |= PROVIDER
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        converted = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        body = chunk.get("chunk") or chunk  # with a response format, OpenAI's client wraps chunks
        if converted is None:
            return None
        converted.message.response_metadata |= PROVIDER
        _count_reasoning(converted.message, body.get("usage"))
        if not body.get("choices"):
            return converted
        choice = body["choices"][0]
        _keep_reasoning(converted.message, choice["delta"])
        if choice.get("finish_reason"):
            converted.message.response_metadata["id"] = body["id"]
        return converted

    def _get_generation_chunk_from_completion(self, completion: openai.BaseModel) -> ChatGenerationChunk:
        chunk = super()._get_generation_chunk_from_completion(completion)
        # This chunk repeats the whole reply, but the reasoning has already been streamed.
        chunk.message.additional_kwargs.pop(REASONING, None)
        return chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = super()._generate(messages, stop=stop, run_manager=run_manager, **kwargs)
        if self.speculation_figures:
            _put(self._figures.read(self.root_client, result.llm_output.get("id")), result, kwargs)
        return result

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = await super()._agenerate(messages, stop=stop, run_manager=run_manager, **kwargs)
        if self.speculation_figures:
            _put(await self._figures.aread(self.root_async_client, result.llm_output.get("id")), result, kwargs)
        return result

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        response_id, called, ending = None, False, None
        for chunk in super()._stream(messages, stop=stop, run_manager=run_manager, **kwargs):
            response_id = chunk.message.response_metadata.get("id", response_id)
            called |= bool(chunk.message.tool_call_chunks)
            ending = (chunk.generation_info or {}).get("finish_reason", ending)
            yield chunk
        if self.speculation_figures and response_id is not None:
            figures = self._figures.read(self.root_client, response_id)
            last = _chunk_of(_with_dropped_call(figures, called, ending, kwargs))
            if run_manager:
                run_manager.on_llm_new_token("", chunk=last)
            yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        response_id, called, ending = None, False, None
        async for chunk in super()._astream(messages, stop=stop, run_manager=run_manager, **kwargs):
            response_id = chunk.message.response_metadata.get("id", response_id)
            called |= bool(chunk.message.tool_call_chunks)
            ending = (chunk.generation_info or {}).get("finish_reason", ending)
            yield chunk
        if self.speculation_figures and response_id is not None:
            figures = await self._figures.aread(self.root_async_client, response_id)
            last = _chunk_of(_with_dropped_call(figures, called, ending, kwargs))
            if run_manager:
                await run_manager.on_llm_new_token("", chunk=last)
            yield last


def _keep_reasoning(message: BaseMessage, sent: Mapping[str, Any] | None) -> None:
    if sent and (reasoning := sent.get(REASONING)):
        message.additional_kwargs[REASONING] = reasoning


def _count_reasoning(message: BaseMessage, usage: Mapping[str, Any] | None) -> None:
    """Copy SGLang's `reasoning_tokens`, which is not one of OpenAI's fields, to `usage_metadata`."""
    counted = getattr(message, "usage_metadata", None)
    if counted is not None and isinstance(tokens := (usage or {}).get("reasoning_tokens"), int):
        counted["output_token_details"] = {"reasoning": tokens, **(counted.get("output_token_details") or {})}


def _put(figures: Figures | None, result: ChatResult, request: Mapping[str, Any]) -> None:
    messages = [generation.message for generation in result.generations]
    called = any(message.tool_calls or message.invalid_tool_calls for message in messages)
    endings = [(generation.generation_info or {}).get("finish_reason") for generation in result.generations]
    figures = _with_dropped_call(figures, called, endings[0], request)
    for message in messages:
        message.response_metadata[FIGURES] = figures


def _with_dropped_call(
    figures: Figures | None, called: bool, ending: str | None, request: Mapping[str, Any]
) -> Figures | None:
    """Add to the figures whether the server dropped a tool call, and log a warning if so."""
    if figures is None or "by_span" not in figures:
        return figures
    offered = [tool.get("function", {}).get("name") for tool in request.get("tools") or ()]
    dropped = bool(offered) and "tool_call" in figures["by_span"] and not called and ending != "length"
    if dropped:
        log.warning(
            "the model generated a tool call that is missing from the reply: its tool is not one of %s, or the call "
            "cannot be parsed; offer the tool, or start the server with SGLANG_FORWARD_UNKNOWN_TOOLS=1 to get the raw "
            "call",
            ", ".join(map(str, offered)),
        )
    return figures | {DROPPED_CALL: dropped}


def _chunk_of(figures: Figures | None) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata={FIGURES: figures}))
