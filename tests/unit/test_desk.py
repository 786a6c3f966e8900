"""The example agent, its model scripted: what it asks, what its tools do, what it prints. Needs no server."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langgraph.errors import GraphRecursionError
from rich.console import Console

from tests.fake_openai import BASE_URL, FakeOpenAI
from whiflash_agents import ChatWhiFlash, desk
from whiflash_agents.desk import desk_agent, measured, show, steps
from whiflash_agents.figures import acceptance_length, drafter_shares
from whiflash_workloads.demo.expert import Session, plan
from whiflash_workloads.demo.tasks import first_task, judge, state_of
from whiflash_workloads.demo.world import TOOL_SCHEMAS, Desk
from whiflash_workloads.server import free_port

FIGURES = {
    "rounds": 4,
    "rounds_by_drafter": {"e3": 1, "df": 3},
    "accepted_by_drafter": {"df": 9, "e3": 2},
    "switches": 1,
}
EXAMPLES = [(desk.QUESTION, desk.DEFAULT_SEED), ("Cancel 9453, please.", 17)]  # that our texts print
SEEDS = {"where_is_my_order": 13, "what_did_they_spend": 1, "cancel_order": 17, "is_it_in_stock": 3}


def script(seed: int) -> list[dict[str, Any]]:
    """The messages of the expert's first task of a session."""
    session = Session(seed)
    plan(session)[0](session)
    return session.messages


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{name}", "type": "function", "function": function}


def agent_of(server: FakeOpenAI, shop: Desk) -> Any:
    return desk_agent(ChatWhiFlash(model="fake", base_url=BASE_URL, api_key="none", **server.clients()), shop)


@pytest.mark.parametrize("kind", SEEDS)
def test_the_model_sees_what_it_was_trained_on(kind: str) -> None:
    """Prompt, schemas and history are those of the traces: what the bundled target was trained on."""
    task = first_task(SEEDS[kind])
    assert task.kind == kind
    trace = script(task.seed)
    replies = [message for message in trace if message["role"] == "assistant"]
    server = FakeOpenAI(replies)
    shop = task.desk()
    *_, last = steps(agent_of(server, shop), task.question)
    assert judge(task, shop, last.message.text).exact
    assert [body["tools"] for body in server.bodies] == [TOOL_SCHEMAS] * len(replies)
    # SGLang's templates take no content for an empty one, as the API has it beside tool calls.
    history = [message | {"content": message["content"] or None} for message in trace[:-1]]
    assert server.bodies[-1]["messages"] == history


def test_two_calls_of_one_reply_are_both_answered() -> None:
    shop = Desk.create(3)
    order = shop.rows("SELECT id FROM orders WHERE status = 'pending'")[0]["id"]
    calls = [call("update_order", order_id=order, status="cancelled"), call("calculate", expression="1 + 1")]
    server = FakeOpenAI([{"content": "", "tool_calls": calls}, {"content": "done"}])
    found = [(step.message.type, step.message.name) for step in steps(agent_of(server, shop), "Do both.")]
    assert found == [("ai", None), ("tool", "update_order"), ("tool", "calculate"), ("ai", None)]
    assert shop.rows("SELECT status FROM orders WHERE id = ?", order) == [{"status": "cancelled"}]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (call("no_such_tool"), "no_such_tool is not a valid tool"),
        (call("lookup_order", order_id="x"), "no order x"),
        (call("lookup_order", id=1), "unexpected keyword argument"),
        (call("run_sql", sql="DELETE FROM orders"), "not authorized"),
    ],
)
def test_a_bad_call_is_answered_and_changes_nothing(bad: dict[str, Any], said: str) -> None:
    shop = Desk.create(3)
    before = state_of(shop)
    server = FakeOpenAI([{"content": "", "tool_calls": [bad]}, {"content": "sorry"}])
    output = [step.message for step in steps(agent_of(server, shop), "Do it.")][1]
    assert said in output.text and state_of(shop) == before


def test_an_agent_that_never_answers_is_stopped() -> None:
    server = FakeOpenAI([{"content": "", "tool_calls": [call("calculate", expression="1 + 1")]}] * 100)
    with pytest.raises(GraphRecursionError):
        list(steps(agent_of(server, Desk.create(3)), "Go on."))
    assert len(server.bodies) == desk.MAX_STEPS / 2


def test_steps_are_printed_with_what_drafting_did() -> None:
    replies = [
        {"content": "", "reasoning_content": "\nI look.\n", "tool_calls": [call("calculate", expression="1 + 1")]},
        {"content": "It is 2.", "reasoning_content": "Good."},
    ]
    out = io.StringIO()
    console = Console(file=out, width=200)
    for number, step in enumerate(steps(agent_of(FakeOpenAI(replies, figures=FIGURES), Desk.create(3)), "1 + 1?")):
        show(console, number + 1, step)
    printed = out.getvalue()
    for part in ("1. I look.", 'calls calculate({"expression": "1 + 1"})', 'calculate -> {"expression"', "It is 2."):
        assert part in printed
    assert printed.count("4 rounds: df 75% e3 25%, AL 3.75, 1 switches") == 2


def test_figures_of_a_reply_without_a_round() -> None:
    """A reply of one token comes from the prefill alone."""
    figures = {"rounds": 0, "rounds_by_drafter": {}, "accepted_by_drafter": {}, "switches": 0}
    assert acceptance_length(figures) is None and drafter_shares(figures) == {}
    assert measured(AIMessage("x", response_metadata={"whiflash": figures}), 0.5) == "None tokens in 500 ms, no rounds"


def test_no_figures_are_no_failure() -> None:
    assert "no speculation figures" in measured(AIMessage("x"), 0.5)


def test_the_default_shop_has_the_order_of_the_default_question() -> None:
    order = int("".join(filter(str.isdigit, desk.QUESTION)))
    assert Desk.create(desk.DEFAULT_SEED).rows("SELECT id FROM orders WHERE id = ?", order) == [{"id": order}]
    assert f'["{desk.QUESTION}"]' in (desk.__doc__ or "") and f"--seed {desk.DEFAULT_SEED}]" in (desk.__doc__ or "")


def test_the_manual_prints_examples_that_are_tried() -> None:
    """tests/e2e/test_agents.py asks them."""
    manual = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()
    asked = re.findall(r'agents\.desk "([^"]+)" .*--seed (\d+)', manual)
    assert {(question, int(seed)) for question, seed in asked} <= set(EXAMPLES)
    assert re.findall(r'QUESTION="([^"]+)"', manual) == [desk.QUESTION]


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    base_url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["desk", "hi", "--base-url", base_url])
    with pytest.raises(SystemExit, match=f"--base-url {base_url}: .*make serve"):
        desk.main()
