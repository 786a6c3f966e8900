"""The agent benchmark: what it counts as solved and as the same, and that it can fail."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.fake_openai import BASE_URL, FakeOpenAI
from tests.scripts import load_script
from whiflash_agents import ChatWhiFlash
from whiflash_workloads.demo.expert import Session, plan
from whiflash_workloads.demo.tasks import Task, first_task

CANCEL = 17  # a seed whose first task is to cancel an order
FIGURES = {"rounds": 4, "rounds_by_drafter": {"df": 4}, "accepted_by_drafter": {"df": 12}, "switches": 0}


@pytest.fixture(scope="module")
def bench() -> Any:
    return load_script("agent_bench")


def replies(seed: int = CANCEL) -> list[dict[str, Any]]:
    """The expert's, to the first task of a session."""
    session = Session(seed)
    plan(session)[0](session)
    return [message for message in session.messages if message["role"] == "assistant"]


def model_of(said: list[dict[str, Any]], figures: dict[str, Any] | None = FIGURES) -> ChatWhiFlash:
    return ChatWhiFlash(model="fake", base_url=BASE_URL, api_key="none", **FakeOpenAI(said, figures=figures).clients())


@pytest.fixture
def task() -> Task:
    return first_task(CANCEL)


def test_an_agent_that_does_as_the_expert_is_counted(bench: Any, task: Task) -> None:
    on, off = (bench.do(task, model_of(replies())) for _ in range(2))
    figures = bench.summary({"entropy": [on], "off": [off]})
    assert (figures["tasks"], figures["solved"], figures["exact"], figures["same_as_off"]) == (1, 1, 1, 1)
    assert figures["acceptance_length"] == 4.0
    assert figures["solved_by_kind"] == {"cancel_order": "1 of 1"}
    assert figures["wall_time_off_over_on"] == pytest.approx(off.seconds / on.seconds, abs=0.001)


def test_ids_of_calls_are_no_difference(bench: Any, task: Task) -> None:
    """SGLang draws them anew for every request."""
    renamed = replies()
    renamed[0]["tool_calls"][0]["id"] = "call_other"
    on, off = bench.do(task, model_of(renamed)), bench.do(task, model_of(replies()))
    assert on.said == off.said


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_any_other_word_is_a_difference(bench: Any, task: Task, field: str) -> None:
    changed = replies()
    changed[-1] = changed[-1] | {field: changed[-1][field] + " Really."}
    on, off = bench.do(task, model_of(changed)), bench.do(task, model_of(replies()))
    figures = bench.summary({"entropy": [on], "off": [off]})
    assert figures["same_as_off"] == 0 and figures["solved"] == 1


def test_an_agent_without_an_answer_has_solved_nothing(bench: Any, task: Task) -> None:
    look, *_ = replies()
    endless = bench.do(task, model_of([look] * 50))
    silent = bench.do(task, model_of([{"content": ""}]))
    assert not endless.verdict.solved and not silent.verdict.solved


def test_without_figures_there_is_no_acceptance_length(bench: Any, task: Task) -> None:
    run = bench.do(task, model_of(replies(), figures=None))
    assert bench.summary({"entropy": [run], "off": [run]})["acceptance_length"] is None


@pytest.mark.parametrize(
    ("solved", "same", "error"),
    [(True, True, None), (False, True, "0 of 1 tasks solved, --min-solved 0.8"), (True, False, "differs from")],
)
def test_the_exit_tells(
    bench: Any, task: Task, monkeypatch: pytest.MonkeyPatch, solved: bool, same: bool, error: str | None
) -> None:
    wrong = [{"content": "I will not."}]
    on = bench.do(task, model_of(replies() if solved else wrong))
    off = bench.do(task, model_of(replies() if solved and same else wrong))
    monkeypatch.setattr(bench, "start_servers", lambda logs, stack: {"entropy": "", "off": ""})
    monkeypatch.setattr(bench, "warm_up", lambda url, spare: None)
    monkeypatch.setattr(bench, "measure", lambda models, tasks: {"entropy": [on], "off": [off]})
    monkeypatch.setattr(bench.server, "stop_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["agent_bench.py", "--tasks", "1"])
    if error is None:
        bench.main()
        return
    with pytest.raises(SystemExit, match=error):
        bench.main()
