"""ChatWhiFlash and the example agent on the bundled models behind a real server, LangChain's standard tests too.

The bundled target knows the order desk only. Where LangChain's suite needs a model that knows more, its test is
switched off by the suite's own means, with the reason; the tests before it show the same at the desk. One server is
shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import httpx
import pytest

pytest.importorskip("sglang")
pytest.importorskip("langchain_tests")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel

from tests.unit.test_desk import EXAMPLES
from whiflash_agents import ChatWhiFlash
from whiflash_agents.desk import connect, conversation, desk_agent, steps
from whiflash_agents.figures import acceptance_length, drafter_shares
from whiflash_workloads.demo.tasks import Task, first_task, heldout_tasks, judge
from whiflash_workloads.demo.world import TOOL_SCHEMAS, Desk
from whiflash_workloads.server import running_server

# The suite has coroutines and leaves it to its user to say who runs them.
NOT_ASYNC = "ignore:.*is marked with '@pytest.mark.asyncio' but it is not an async function"
pytestmark = [pytest.mark.e2e, pytest.mark.asyncio, pytest.mark.filterwarnings(NOT_ASYNC)]

needs_other_tools = pytest.mark.xfail(reason="the bundled target calls the tools of its desk, and never any other")


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    log = tmp_path_factory.mktemp("agents") / "server.log"
    # Where a grammar lets it, this model writes blanks without end.
    flags = ("--demo", "--constrained-json-disable-any-whitespace")
    with running_server("whiflash_sglang.launch_server", *flags, log=log) as url:
        yield url


@pytest.fixture
def model(base_url: str) -> ChatWhiFlash:
    return connect(base_url)


def first(kind: str, answer: str) -> Task:
    """The first held-out task of a kind whose expert answer has `answer` in it."""
    return next(task for task in heldout_tasks(50) if task.kind == kind and answer in task.expert_answer)


TASKS = {"deed": first("cancel_order", "now cancelled"), "word": first("is_it_in_stock", "in stock")}


def sum_of(chunks: Iterable[AIMessageChunk]) -> AIMessageChunk:
    first_chunk, *rest = chunks
    return sum(rest, first_chunk)


@pytest.fixture
def has_figures(base_url: str) -> None:
    routes = httpx.get(f"{base_url}/openapi.json", timeout=600).json()["paths"]
    if not any(route.startswith("/whiflash/requests/") for route in routes):
        pytest.skip("this server has no route for the figures of a request")


# ---- the agent


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_agent_does_a_task(model: ChatWhiFlash, task: Task) -> None:
    desk = task.desk()
    *_, last = steps(desk_agent(model, desk), task.question)
    assert judge(task, desk, last.message.text).why == ""


@pytest.mark.parametrize(("question", "seed"), EXAMPLES)
def test_examples_that_we_print_are_answered_right(model: ChatWhiFlash, question: str, seed: int) -> None:
    """By what the tools gave: the database, and the facts that belong into the answer."""
    task, desk = first_task(seed), Desk.create(seed)
    assert task.question == question
    *_, last = steps(desk_agent(model, desk), question)
    assert judge(task, desk, last.message.text).why == ""


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_reasoning_is_a_block_and_its_tokens_are_counted(model: ChatWhiFlash, way: str) -> None:
    bound, history = model.bind_tools(TOOL_SCHEMAS), conversation(TASKS["deed"].question)
    reply = bound.invoke(history) if way == "invoke" else sum_of(bound.stream(history))
    reasoning, *_, call = reply.content_blocks
    assert reasoning == {"type": "reasoning", "reasoning": reply.additional_kwargs["reasoning_content"]}
    assert call["type"] == "tool_call"
    counted = reply.usage_metadata["output_token_details"]["reasoning"]
    assert 0 < counted < reply.usage_metadata["output_tokens"]


def test_the_next_turn_finds_the_whole_reply_in_the_cache(model: ChatWhiFlash) -> None:
    """Reasoning is sent back, so that a prompt extends what was generated. Without it the cached prefix ends there."""
    task = first("cancel_order", "cannot be cancelled")  # asked nowhere else: what is cached is of this test

    def cached_in_second_turn(session: ChatWhiFlash, keep: bool) -> tuple[int, int]:
        bound = session.bind_tools(TOOL_SCHEMAS)
        history = conversation(task.question)
        call = bound.invoke(history)
        assert call.tool_calls
        if not keep:
            del call.additional_kwargs["reasoning_content"]
        output = task.desk().call(call.tool_calls[0]["name"], call.tool_calls[0]["args"])
        reply = bound.invoke([*history, call, {"role": "tool", "tool_call_id": "x", "content": output}])
        return reply.usage_metadata["input_token_details"]["cache_read"], call.usage_metadata["total_tokens"]

    cached, so_far = cached_in_second_turn(model, keep=True)
    assert so_far - 3 <= cached <= so_far
    cached, so_far = cached_in_second_turn(model, keep=False)
    assert cached < so_far - 10


@pytest.mark.parametrize("way", ["ainvoke", "stream", "astream"])
async def test_every_way_gives_the_same_reply(model: ChatWhiFlash, way: str) -> None:
    bound, history = model.bind_tools(TOOL_SCHEMAS), conversation(TASKS["deed"].question)
    expected = bound.invoke(history)
    if way == "ainvoke":
        found = await bound.ainvoke(history)
    else:
        chunks = list(bound.stream(history)) if way == "stream" else [chunk async for chunk in bound.astream(history)]
        found = sum(chunks[1:], chunks[0])

    def said(reply: AIMessage) -> tuple[Any, ...]:
        calls = [(call["name"], call["args"]) for call in reply.tool_calls]
        # SGLang's parser of streams keeps or drops white space by where chunks end.
        return calls, reply.text.strip(), reply.additional_kwargs["reasoning_content"].strip()

    assert said(found) == said(expected) and expected.tool_calls
    assert found.usage_metadata["output_tokens"] == expected.usage_metadata["output_tokens"]
    assert found.response_metadata["finish_reason"] == "tool_calls"


class Status(BaseModel):
    """What the model can fill in without a string that it would have to end."""

    status: Literal["pending", "packed", "shipped", "delivered", "cancelled"]
    has_shipment: bool


def test_structured_output(model: ChatWhiFlash) -> None:
    # Told to think first, SGLang holds the grammar back until the thought ends, which away from the desk it may not.
    at_once = model.model_copy(update={"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}})
    found = at_once.with_structured_output(Status, include_raw=True).invoke([HumanMessage("Where is order 1042?")])
    assert isinstance(found["parsed"], Status), found


# ---- figures and hints


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_a_reply_has_the_figures_of_its_request(has_figures: None, model: ChatWhiFlash, way: str) -> None:
    reply = model.bind_tools(TOOL_SCHEMAS)
    history = conversation(TASKS["deed"].question)
    if way == "invoke":
        found: AIMessage = reply.invoke(history)
    else:
        start, *rest = reply.stream(history)
        found = sum(rest, start)
    figures = found.response_metadata["whiflash"]
    length = acceptance_length(figures)
    assert length is not None and sum(drafter_shares(figures).values()) == pytest.approx(1)
    # Every token but the first, which the prefill gives, comes from a round.
    assert abs(figures["rounds"] * length - found.usage_metadata["output_tokens"]) <= length + 8


@pytest.mark.parametrize(("route", "drafters"), [("e3", {"e3"}), ("df", {"df"}), ("off", set())])
def test_a_route_is_followed(has_figures: None, model: ChatWhiFlash, route: str, drafters: set[str]) -> None:
    bound = model.with_hints(route=route).bind_tools(TOOL_SCHEMAS)
    figures = bound.invoke(conversation(TASKS["deed"].question)).response_metadata["whiflash"]
    assert set(figures["drafted_by_drafter"]) == drafters


# ---- LangChain's standard tests


class TestStandard(ChatModelIntegrationTests):
    base_url: ClassVar[str]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, base_url: str) -> None:
        cls.base_url = base_url

    @property
    def chat_model_class(self) -> type[ChatWhiFlash]:
        return ChatWhiFlash

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "whiflash-demo",
            "base_url": f"{self.base_url}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 100,
            # Away from its desk the model thinks and says nothing, and the suite wants a text.
            "extra_body": {"separate_reasoning": False},
        }

    @property
    def has_tool_choice(self) -> bool:
        """Off: forced by a grammar, a call to a tool that is not the desk's is a string that never ends."""
        return False

    @property
    def has_structured_output(self) -> bool:
        """Off: within a grammar that lets strings be of any length, this model's strings never end."""
        return False

    # Images, audio, PDF, JSON mode and Anthropic's format are off by default, and stay off: it is a text model, and
    # the only one that the server has, so there is none to override it with.

    @needs_other_tools
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @needs_other_tools
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @needs_other_tools
    def test_bind_runnables_as_tools(self, model: BaseChatModel) -> None:
        super().test_bind_runnables_as_tools(model)

    @needs_other_tools
    def test_tool_calling_with_no_arguments(self, model: BaseChatModel) -> None:
        super().test_tool_calling_with_no_arguments(model)

    @needs_other_tools
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @needs_other_tools
    def test_unicode_tool_call_integration(
        self, model: BaseChatModel, *, tool_choice: str | None = None, force_tool_call: bool = True
    ) -> None:
        super().test_unicode_tool_call_integration(model, tool_choice=tool_choice, force_tool_call=force_tool_call)
