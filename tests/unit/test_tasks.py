"""Tasks of the order desk: the expert solves them all, and the judge sees what is wrong."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest

from whiflash_workloads.demo.expert import TASKS, solve
from whiflash_workloads.demo.tasks import Task, first_task, heldout_tasks, judge, says
from whiflash_workloads.demo.world import Desk


def done(task: Task) -> Desk:
    """The shop after the expert has done `task`."""
    desk = task.desk()
    for message in solve(task.seed)["messages"][1:]:
        if message["role"] == "assistant" and not message.get("tool_calls"):
            return desk
        for call in message.get("tool_calls", ()):
            desk.call(call["function"]["name"], json.loads(call["function"]["arguments"]))
    raise AssertionError("a session without an answer")


def of_kind(kind: str, answer: str) -> Task:
    """The first held-out task of a kind whose expert answer has `answer` in it."""
    return next(task for task in heldout_tasks(200) if task.kind == kind and answer in task.expert_answer)


def test_the_expert_solves_every_task() -> None:
    tasks = heldout_tasks(100)
    assert {task.kind for task in tasks} == {task.__name__ for task in TASKS}
    for task in tasks:
        verdict = judge(task, done(task), "\n\n" + task.expert_answer)
        assert verdict.solved and verdict.exact, (task.question, verdict)


def test_tasks_are_the_first_questions_of_the_heldout_sessions() -> None:
    for task in heldout_tasks(20):
        messages = solve(task.seed)["messages"]
        assert task.question == messages[1]["content"]
        assert task.expert_answer == next(m["content"] for m in messages if m["role"] == "assistant" and m["content"])


def test_an_answer_to_another_question_solves_nothing() -> None:
    tasks = heldout_tasks(40)
    for task, other in pairwise(tasks):
        assert not judge(task, done(task), other.expert_answer).solved
        assert not judge(task, done(task), "").solved


@pytest.mark.parametrize(
    ("kind", "answer", "changed", "to"),
    [
        ("where_is_my_order", "is shipped", r"Tracking: \w\w", "Tracking: ZZ"),
        ("where_is_my_order", "no shipment", r"is \w+\.", "is lost."),
        ("what_did_they_spend", "orders:", r"spent \d", "spent 9"),
        ("what_did_they_spend", "one order", r"^\w+ ", "David "),
        ("cancel_order", "cannot", r"cannot", "can"),
        ("is_it_in_stock", "in stock", r"in stock", "sold out"),
        ("is_it_in_stock", "in stock", r"-\d", "-0"),
        ("list_open_orders", "\n- ", r"- \d", "- 0"),
        ("list_open_orders", "has no", r"^\w+ ", "David "),
        ("list_open_orders", "has no", r"no ", "some "),
    ],
)
def test_a_wrong_fact_is_seen(kind: str, answer: str, changed: str, to: str) -> None:
    task = of_kind(kind, answer)
    wrong = re.sub(changed, to, task.expert_answer, count=1)
    assert wrong != task.expert_answer
    verdict = judge(task, done(task), wrong)
    assert not verdict.solved and not verdict.exact and verdict.why


def test_an_order_of_somebody_else_is_seen() -> None:
    task = of_kind("list_open_orders", "\n- ")
    other = sorted(task.falsehoods)[0]
    verdict = judge(task, done(task), f"{task.expert_answer}\n- {other}")
    assert not verdict.solved and other in verdict.why


def test_what_nobody_asked_for_is_free() -> None:
    task = of_kind("is_it_in_stock", "in stock")
    verdict = judge(task, done(task), re.sub(r"pieces in \w+", "pieces in Lyon or so", task.expert_answer))
    assert verdict.solved and not verdict.exact


def test_words_without_the_deed_solve_nothing() -> None:
    task = of_kind("cancel_order", "now cancelled")
    assert judge(task, done(task), task.expert_answer).solved
    assert judge(task, task.desk(), task.expert_answer).why == "the database differs from the expected state"


def test_a_deed_that_nobody_asked_for_is_seen() -> None:
    task = of_kind("where_is_my_order", "is shipped")
    desk = done(task)
    desk.call("update_order", {"order_id": int(task.facts[0]), "status": "cancelled"})
    assert not judge(task, desk, task.expert_answer).solved


@pytest.mark.parametrize(
    ("answer", "fact", "expected"),
    [
        ("the sum is 12.5.", "12.5", True),
        ("the sum is 112.5", "12.5", False),
        ("the sum is 12.56", "12.5", False),
        ("the sum is 12", "12.5", False),
        ("order 1234-5", "1234", False),
        ("unshipped", "shipped", False),
        ("is shipped: yes", "shipped", True),
        ("in-stock", "stock", False),
    ],
)
def test_a_fact_stands_for_itself(answer: str, fact: str, expected: bool) -> None:
    assert says(answer, fact) is expected


def test_the_same_seed_gives_the_same_task() -> None:
    assert first_task(5) == first_task(5)
