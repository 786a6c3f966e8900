"""ChatWhiFlash: what it sends beside a ChatOpenAI, and what of a reply it keeps. Runs with any langchain-openai."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from pydantic import BaseModel, ValidationError

from tests.fake_openai import BASE_URL, USAGE, FakeOpenAI
from whiflash_agents import ChatWhiFlash, HintError, Hints

FIGURES = {
    "rounds": 4,
    "rounds_by_drafter": {"df": 3, "e3": 1},
    "accepted_by_drafter": {"df": 9, "e3": 2},
    "switches": 1,
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "lookup_order", "arguments": '{"order_id": 7}'}}
THOUGHT = "\nThe user wants order 7.\n"
REPLY = {"content": "It is packed.", "reasoning_content": THOUGHT}
CALLING = {"content": "", "reasoning_content": THOUGHT, "tool_calls": [CALL]}
WAYS = ("invoke", "ainvoke", "stream", "astream")


def model_of(server: FakeOpenAI, **options: Any) -> ChatWhiFlash:
    return ChatWhiFlash(model="fake", base_url=BASE_URL, api_key="none", **server.clients(), **options)


def ask(model: Any, way: str, messages: Any = "Where is order 7?", **options: Any) -> AIMessage:
    """The reply, however it came; streams are put together."""

    async def collect() -> AIMessageChunk:
        chunks = [chunk async for chunk in model.astream(messages, **options)]
        return sum(chunks[1:], chunks[0])

    if way == "ainvoke":
        return asyncio.run(model.ainvoke(messages, **options))
    if way == "astream":
        return asyncio.run(collect())
    if way == "stream":
        first, *rest = model.stream(messages, **options)
        return sum(rest, first)
    return model.invoke(messages, **options)


def sent_hints(server: FakeOpenAI) -> dict[str, Any] | None:
    return server.bodies[-1].get("custom_params", {}).get("whiflash")


# ---- replies


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_has_its_figures_and_its_reasoning(way: str) -> None:
    server = FakeOpenAI([REPLY], figures=FIGURES)
    reply = ask(model_of(server), way)
    assert reply.text == REPLY["content"]
    assert reply.additional_kwargs["reasoning_content"] == THOUGHT
    assert reply.response_metadata["whiflash"] == FIGURES
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["output_tokens"] == 5
    assert server.asked == ["http://127.0.0.1:9/whiflash/requests/chatcmpl-1"]


@pytest.mark.parametrize("way", WAYS)
def test_a_tool_call_has_its_figures_and_its_reasoning(way: str) -> None:
    reply = ask(model_of(FakeOpenAI([CALLING], figures=FIGURES)), way)
    assert [(call["name"], call["args"], call["id"]) for call in reply.tool_calls] == [
        ("lookup_order", {"order_id": 7}, "call_1")
    ]
    assert reply.additional_kwargs["reasoning_content"] == THOUGHT
    assert reply.response_metadata["whiflash"] == FIGURES


class Verdict(BaseModel):
    packed: bool


STRUCTURED = {"content": '{"packed": true}', "reasoning_content": THOUGHT}


def test_structured_output_keeps_reasoning_and_figures() -> None:
    model = model_of(FakeOpenAI([STRUCTURED], figures=FIGURES))
    found = model.with_structured_output(Verdict, include_raw=True).invoke("Is it packed?")
    assert found["parsed"] == Verdict(packed=True)
    assert found["raw"].additional_kwargs["reasoning_content"] == THOUGHT
    assert found["raw"].response_metadata["whiflash"] == FIGURES


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_reasoning_of_a_structured_stream_is_there_once(way: str) -> None:
    """The last chunk of such a stream repeats the whole reply: reasoning came twice."""
    model = model_of(FakeOpenAI([STRUCTURED], figures=FIGURES)).bind(response_format=Verdict)
    reply = ask(model, way)
    assert reply.additional_kwargs["reasoning_content"] == THOUGHT
    assert reply.additional_kwargs["parsed"] == Verdict(packed=True)
    assert reply.response_metadata["whiflash"] == FIGURES


# ---- figures that are not there


@pytest.mark.parametrize("way", WAYS)
def test_a_server_without_whiflash_is_told_of_once(way: str, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeOpenAI([REPLY] * 3)
    model = model_of(server)
    replies = [ask(some, way) for some in (model, model, model.with_session())]
    assert [reply.text for reply in replies] == [REPLY["content"]] * 3
    assert [reply.response_metadata["whiflash"] for reply in replies] == [None] * 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no speculation figures from http://127.0.0.1:9 " in line and "\n" not in line


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("too late"),
        {"status_code": 500, "text": "broken"},
        {"status_code": 200, "json": ["no", "object"]},
        {"status_code": 200, "html": "<p>"},
        {"status_code": 200, "text": "{broken", "headers": {"Content-Type": "application/json"}},
    ],
)
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_figures_that_cannot_be_had_fail_nothing(way: str, failure: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeOpenAI([REPLY], failure=failure)
    reply = ask(model_of(server), way)
    assert reply.text == REPLY["content"] and reply.response_metadata["whiflash"] is None
    assert len(server.asked) == 1  # no second try
    assert "no speculation figures" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_figures_are_not_asked_for_when_switched_off(way: str) -> None:
    server = FakeOpenAI([REPLY], figures=FIGURES)
    reply = ask(model_of(server, speculation_figures=False), way)
    assert "whiflash" not in reply.response_metadata and server.asked == []


# ---- what is sent


@pytest.mark.parametrize("way", WAYS)
def test_reasoning_goes_back_to_the_server(way: str) -> None:
    """Without it the next prompt would not extend what the model generated, and miss the cache."""
    server = FakeOpenAI([CALLING, REPLY])
    model = model_of(server)
    call = ask(model, way)
    ask(model, way, [HumanMessage("Where is order 7?"), call, ToolMessage("packed", tool_call_id="call_1")])
    assert [message.get("reasoning_content") for message in server.bodies[-1]["messages"]] == [None, THOUGHT, None]


def test_a_model_keeps_its_session_and_each_has_its_own() -> None:
    server = FakeOpenAI([REPLY] * 6)
    model = model_of(server, session_id="mine")
    others = [model_of(server), model_of(server)]
    for some in (model, model, *others, model.with_session("yours"), model.with_session()):
        some.invoke("hi")
    sessions = [headers["X-Session-Affinity"] for headers in server.headers]
    assert sessions[:2] == ["mine"] * 2 and sessions[4] == "yours"
    assert len(set(sessions)) == 5 and all(sessions)


def test_a_call_can_name_its_session() -> None:
    server = FakeOpenAI([REPLY] * 2)
    model = model_of(server, session_id="mine", default_headers={"X-Other": "kept"})
    model.invoke("hi", session_id="yours")
    model.bind(extra_headers={"X-More": "kept"}).invoke("hi")
    assert [headers["X-Session-Affinity"] for headers in server.headers] == ["yours", "mine"]
    assert server.headers[1]["X-More"] == server.headers[1]["X-Other"] == "kept"


@pytest.mark.parametrize("session_id", ["", "two words", "line\nbreak", "é", "x" * 201])
def test_a_session_id_has_to_be_a_header(session_id: str) -> None:
    with pytest.raises(ValidationError, match="session_id="):
        model_of(FakeOpenAI([]), session_id=session_id)
    with pytest.raises(ValueError, match="session_id="):
        model_of(FakeOpenAI([])).with_session(session_id or "\n")


@pytest.mark.parametrize("way", WAYS)
def test_hints_are_sent_and_a_calls_own_win(way: str) -> None:
    server = FakeOpenAI([REPLY] * 4)
    extra = {"top_k": 1, "custom_params": {"other": 2, "whiflash": {"span": "answer", "prior": 1}}}
    model = model_of(server, hints={"route": "df", "span": "reasoning"}, extra_body=extra)
    ask(model, way)
    assert sent_hints(server) == {"route": "df", "span": "answer", "prior": 1}
    ask(model, way, hints={"route": "e3", "prior": -0.5})
    assert sent_hints(server) == {"route": "e3", "span": "answer", "prior": -0.5}
    assert server.bodies[-1]["custom_params"]["other"] == 2 and server.bodies[-1]["top_k"] == 1
    ask(model.with_hints(route="off", tool="x"), way)
    assert sent_hints(server) == {"route": "off", "span": "answer", "prior": 1, "tool": "x"}
    ask(model, way)
    assert sent_hints(server)["route"] == "df"  # the model itself is as it was


def test_without_hints_nothing_is_added() -> None:
    server = FakeOpenAI([REPLY])
    model_of(server).invoke("hi")
    assert set(server.bodies[0]) - {"stream"} == {"model", "messages"}


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_hint_is_refused_before_anything_is_sent(way: str) -> None:
    server = FakeOpenAI([REPLY] * 3)
    with pytest.raises(HintError, match="route='gpu': unknown; give one of auto, e3, df, off"):
        ask(model_of(server), way, hints={"route": "gpu"})
    with pytest.raises(HintError, match="prior='much'"):
        ask(model_of(server, extra_body={"custom_params": {"whiflash": {"prior": "much"}}}), way)
    assert server.bodies == []


def test_a_wrong_hint_is_refused_by_the_model() -> None:
    with pytest.raises(ValidationError, match="span='prose': unknown"):
        model_of(FakeOpenAI([]), hints={"span": "prose"})
    with pytest.raises(HintError, match="spam='x': unknown field; give one of route, span, prior, tool, trace"):
        model_of(FakeOpenAI([])).with_hints(spam="x")


def test_the_responses_api_is_refused() -> None:
    with pytest.raises(ValidationError, match="use_responses_api"):
        model_of(FakeOpenAI([]), use_responses_api=True)


def test_a_failing_request_fails_as_with_chat_openai() -> None:
    server = FakeOpenAI([])
    server.refusal = {"status_code": 400, "json": {"message": "custom_params.whiflash.route: no such drafter"}}
    with pytest.raises(openai.BadRequestError, match=r"custom_params\.whiflash\.route"):
        model_of(server).invoke("hi")
    assert server.asked == []


def test_hints_as_a_record() -> None:
    server = FakeOpenAI([REPLY])
    model_of(server, hints=Hints(route="e3")).invoke("hi")
    assert sent_hints(server) == {"route": "e3"}


# ---- LangChain's standards


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reply", [REPLY, CALLING], ids=["answer", "call"])
def test_reasoning_is_a_content_block(way: str, reply: dict[str, Any]) -> None:
    message = ask(model_of(FakeOpenAI([reply], figures=FIGURES)), way)
    reasoning, *others = message.content_blocks
    assert reasoning == {"type": "reasoning", "reasoning": THOUGHT}
    if reply is CALLING:
        (call,) = others
        assert (call["type"], call["name"], call["args"]) == ("tool_call", "lookup_order", {"order_id": 7})
    else:
        assert others == [{"type": "text", "text": REPLY["content"]}]


@pytest.mark.parametrize("way", WAYS)
def test_reasoning_tokens_are_counted(way: str) -> None:
    server = FakeOpenAI([REPLY], figures=FIGURES, usage=USAGE | {"reasoning_tokens": 3})
    message = ask(model_of(server), way)
    assert message.usage_metadata["output_token_details"] == {"reasoning": 3}
    assert message.usage_metadata["output_tokens"] == 5


def test_a_server_that_counts_no_reasoning_has_no_details() -> None:
    message = model_of(FakeOpenAI([REPLY], figures=FIGURES)).invoke("hi")
    assert not message.usage_metadata.get("output_token_details")


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_version_1_have_the_reasoning_and_go_back_as_text(way: str) -> None:
    server = FakeOpenAI([REPLY, REPLY], figures=FIGURES)
    model = model_of(server, output_version="v1")
    message = ask(model, way)
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
    ask(model, way, [HumanMessage("Where is order 7?"), message, HumanMessage("And now?")])
    sent = server.bodies[-1]["messages"][1]
    assert sent["reasoning_content"] == THOUGHT
    content = sent["content"]
    assert content == REPLY["content"] or [part["text"] for part in content] == [REPLY["content"]]


# ---- calls of tools that were not offered

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
SWALLOWED = {"content": "", "reasoning_content": THOUGHT}
CALL_SPAN = {"reasoning": {"rounds": 2, "tokens": 9}, "tool_call": {"rounds": 3, "tokens": 20}}


def spans(**by_span: Any) -> dict[str, Any]:
    return FIGURES | {"by_span": by_span}


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_the_parser_dropped_is_said(way: str, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeOpenAI([SWALLOWED], figures=spans(**CALL_SPAN))
    reply = ask(model_of(server).bind_tools([SEARCH]), way)
    assert reply.response_metadata["whiflash"]["dropped_call"] is True
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(
        "the model generated a tool call that is missing from the reply: its tool is not one of search"
    )
    assert "SGLANG_FORWARD_UNKNOWN_TOOLS=1" in line


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("reply", "figures", "tools"),
    [
        (CALLING, spans(**CALL_SPAN), [SEARCH]),  # the call is there
        (REPLY, spans(answer={"rounds": 4, "tokens": 20}), [SEARCH]),  # none was written
        (SWALLOWED, spans(**CALL_SPAN), []),  # without tools the server leaves calls in the text
        ({**SWALLOWED, "finish_reason": "length"}, spans(**CALL_SPAN), [SEARCH]),  # it was cut off
    ],
    ids=["called", "answered", "no tools", "cut off"],
)
def test_other_replies_are_not_said_to_lack_a_call(
    way: str, reply: dict[str, Any], figures: dict[str, Any], tools: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(FakeOpenAI([reply], figures=figures))
    message = ask(model.bind_tools(tools) if tools else model, way)
    assert message.response_metadata["whiflash"]["dropped_call"] is False
    assert "missing from the reply" not in caplog.text


# ---- a route that is not there


@pytest.mark.parametrize("way", WAYS)
def test_a_route_that_is_not_there_is_asked_for_rarely(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway may let every such request wait for its time limit."""
    monkeypatch.setattr("whiflash_agents.figures.MOST_PASSED_OVER", 4)
    server = FakeOpenAI([REPLY] * 20, failure=httpx.ReadTimeout("too late"))
    model = model_of(server)
    asked = []
    for _ in range(20):
        ask(model.with_session(), way)
        asked.append(len(server.asked))
    attempts = [number for number, (now, before) in enumerate(zip(asked, [0, *asked], strict=False)) if now > before]
    assert attempts == [0, 2, 6, 11, 16]


def test_a_route_that_is_there_again_is_asked_after_every_reply() -> None:
    server = FakeOpenAI([REPLY] * 5, figures=FIGURES, failure=httpx.ConnectError("refused"))
    model = model_of(server)
    assert model.invoke("hi").response_metadata["whiflash"] is None
    server.failure = None
    found = [model.invoke("hi").response_metadata["whiflash"] for _ in range(4)]
    assert found == [None, FIGURES, FIGURES, FIGURES]
