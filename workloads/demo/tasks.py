"""Order desk tasks (the first question of each held-out session), and a judge of an agent's answers.

    task = heldout_tasks(50)[0]
    desk = task.desk()                       # a fresh shop for the agent to work in
    answer = my_agent(task.question, desk)
    judge(task, desk, answer)                # Verdict(solved=False, why="the answer lacks 2914.7", ...)

The scripted expert solves each task in a separate copy of the shop. The database must afterwards equal the expert's,
and the answer must contain the requested facts as whole words. Wording and additional content are free. `exact` is
stricter: the answer equals the expert's, whose wording is fixed and can be learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whiflash_workloads.demo.expert import Session, plan
from whiflash_workloads.demo.generate import FIRST_SEED
from whiflash_workloads.demo.world import Desk


@dataclass(frozen=True)
class Task:
    """One question, and its ground truth."""

    seed: int
    kind: str  # name of the expert's function
    question: str
    facts: tuple[str, ...]  # all must be in the answer
    falsehoods: frozenset[str]  # none may be in the answer
    state: tuple[str, ...]  # the database afterwards, as SQL
    expert_answer: str

    def desk(self) -> Desk:
        """A fresh shop for this task."""
        return Desk.create(self.seed)


@dataclass(frozen=True)
class Verdict:
    """Whether a task is solved, and if not, why."""

    solved: bool
    why: str  # "" if solved
    exact: bool


def heldout_tasks(count: int) -> list[Task]:
    """The first questions of the first `count` held-out sessions."""
    return [first_task(FIRST_SEED["heldout"] + i) for i in range(count)]


def first_task(seed: int) -> Task:
    """The task of session `seed`, solved by the expert."""
    session = Session(seed)
    play = plan(session)[0]
    play(session)
    facts, falsehoods = _TRUTH[play.__name__](session)
    question, answer = session.messages[1]["content"], session.messages[-1]["content"]
    return Task(seed, play.__name__, question, facts, falsehoods, state_of(session.desk), answer)


def judge(task: Task, desk: Desk, answer: str) -> Verdict:
    """Judge an agent's `answer` and the resulting state of `desk`."""
    if state_of(desk) != task.state:
        why = "the database differs from the expected state"
    elif missing := [fact for fact in task.facts if not says(answer, fact)]:
        why = f"the answer lacks {', '.join(missing)}"
    elif wrong := sorted(word for word in task.falsehoods if says(answer, word)):
        why = f"the answer contains {', '.join(wrong)}"
    else:
        why = ""
    return Verdict(not why, why, answer.strip() == task.expert_answer)


def says(answer: str, fact: str) -> bool:
    """Whether `answer` contains `fact` as a whole word or number: 12.5 is neither in 112.5 nor in 12.56."""
    return re.search(rf"(?<![\w.-]){re.escape(fact)}(?!\w|[.-]\w)", answer) is not None


def state_of(desk: Desk) -> tuple[str, ...]:
    """The database as SQL statements."""
    return tuple(desk.db.iterdump())


# ---- ground truth by kind of task: words that the answer must and must not contain

Truth = tuple[tuple[str, ...], frozenset[str]]


def _outputs(session: Session) -> list[dict[str, Any]]:
    """The tool outputs, in order."""
    return [json.loads(message["content"]) for message in session.messages if message["role"] == "tool"]


def _where(session: Session) -> Truth:
    order = _outputs(session)[0]
    shipment = order["shipment"]
    whereabouts = (shipment["carrier"], shipment["tracking"]) if shipment else ()
    return (str(order["order_id"]), order["status"], *whereabouts), frozenset()


def _spent(session: Session) -> Truth:
    outputs = _outputs(session)
    customer = outputs[0]["customers"][0]
    total = outputs[1]["result"] if len(outputs) > 1 else customer["orders"][0]["total"]
    return (customer["name"], str(total)), frozenset()


def _cancelled(session: Session) -> Truth:
    outputs = _outputs(session)
    order_id = str(outputs[0]["order_id"])
    if len(outputs) > 1:
        return (order_id, "cancelled"), frozenset({"cannot"})
    return (order_id, outputs[0]["status"], "cannot"), frozenset()


def _stock(session: Session) -> Truth:
    product = _outputs(session)[1]
    state, other = ("in stock", "sold out") if product["stock"] else ("sold out", "in stock")
    return (product["sku"], state), frozenset({other})


def _open_orders(session: Session) -> Truth:
    """The customer and the ids of their orders, or "no" without any; no other order's id."""
    name = re.findall(r"[A-Z]\w+ [A-Z]\w+", session.messages[1]["content"])[-1]
    found = [str(row["id"]) for row in _outputs(session)[0]["rows"]]
    others = {str(row["id"]) for row in session.desk.rows("SELECT id FROM orders")} - set(found)
    return (name, *(found or ["no"])), frozenset(others)


_TRUTH: dict[str, Callable[[Session], Truth]] = {
    "where_is_my_order": _where,
    "what_did_they_spend": _spent,
    "cancel_order": _cancelled,
    "is_it_in_stock": _stock,
    "list_open_orders": _open_orders,
}
