"""A scripted expert for the order desk: solves generated tasks with the real tools, with varied reasoning texts.

`solve(seed)` plays one session and returns it as a trace: the user asks, the expert reasons, calls tools and answers;
some sessions have follow-up questions. Reasoning sentences are randomized, which makes them hard to predict. Calls and
answers copy ids, names and numbers from tool outputs, which makes them predictable.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from whiflash_workloads.demo.world import TOOL_SCHEMAS, USUAL, Desk, Lexicon

SYSTEM = "You run an order desk. Think first, use the tools, and answer only with what they show."

OPENERS = [
    "The user wants {goal}.",
    "I am asked for {goal}.",
    "So the question is about {goal}.",
    "They need {goal}, as far as I can tell.",
    "This is a request for {goal}.",
    "Right, the goal here is {goal}.",
]
BEFORE_CALL = [
    "To find out I should call {tool}",
    "The best way is {tool}",
    "I will start with {tool}",
    "For that {tool} fits",
    "Let me use {tool}",
    "I need {tool}",
]
REASONS = [
    " because it holds the details.",
    ", since nothing is known yet.",
    ", which should tell me more.",
    " before I say anything.",
    " and then decide.",
    " to be sure.",
    ".",
]
FINDINGS = [
    "The output says {fact}.",
    "I see that {fact}.",
    "Now it is clear that {fact}.",
    "According to the tool, {fact}.",
    "Good, {fact}.",
    "It turns out that {fact}.",
]
DOUBTS = [
    "I should not guess here.",
    "Nothing else in the record looks odd.",
    "That is what I expected.",
    "The rest of the output does not matter for this.",
    "It is worth checking one more thing.",
    "Let me keep the reply short.",
    "There may be more to it, but the question was simple.",
    "",
    "",
]
CLOSERS = [
    "I can answer now.",
    "That is enough to reply.",
    "No further call is needed.",
    "So I will tell the user.",
    "Time to write the answer.",
]


class Session:
    """A session under construction: messages, the desk, and a random generator."""

    def __init__(self, seed: int, lexicon: Lexicon = USUAL):
        self.rng = random.Random(f"session-{seed}")
        self.desk = Desk.create(seed, lexicon)
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        self.calls = 0

    def pick(self, options: list[str], **values: object) -> str:
        """A random option, formatted with `values`."""
        return self.rng.choice(options).format(**values)

    def think(self, *sentences: str) -> str:
        """Join non-empty sentences."""
        return " ".join(sentence for sentence in sentences if sentence)

    def ask(self, text: str) -> None:
        """Add a user message."""
        self.messages.append({"role": "user", "content": text})

    def call(self, reasoning: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Record reasoning, a tool call and its output. Returns the parsed output."""
        self.calls += 1
        call_id = f"call_{self.calls}"
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        self.messages.append(
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": reasoning,
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            }
        )
        output = self.desk.call(name, arguments)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        return json.loads(output)

    def answer(self, reasoning: str, text: str) -> None:
        """Add an answer with its reasoning."""
        self.messages.append({"role": "assistant", "content": text, "reasoning_content": reasoning})

    def open(self, goal: str, tool: str) -> str:
        """Reasoning before the first call."""
        plan = self.pick(BEFORE_CALL, tool=tool) + self.pick(REASONS)
        return self.think(self.pick(OPENERS, goal=goal), self.pick(DOUBTS), plan)

    def go_on(self, fact: str, tool: str) -> str:
        """Reasoning between calls."""
        plan = self.pick(BEFORE_CALL, tool=tool) + self.pick(REASONS)
        return self.think(self.pick(FINDINGS, fact=fact), self.pick(DOUBTS), plan)

    def close(self, fact: str) -> str:
        """Reasoning before the answer."""
        return self.think(self.pick(FINDINGS, fact=fact), self.pick(DOUBTS), self.pick(CLOSERS))

    def look_up(self, goal: str, order_id: int) -> dict[str, Any]:
        """Start with `goal` and look up an order."""
        return self.call(self.open(goal, "lookup_order"), "lookup_order", order_id=order_id)

    def order(self) -> dict[str, Any]:
        """A random order of the shop."""
        orders = self.desk.rows("SELECT o.*, c.name FROM orders o JOIN customers c ON c.id = o.customer_id")
        return self.rng.choice(orders)


def where_is_my_order(session: Session) -> None:
    order_id = session.order()["id"]
    session.ask(
        session.pick(
            ["Where is order {n}?", "Has order {n} been shipped?", "What is the status of my order {n}?"], n=order_id
        )
    )
    found = session.call(
        session.open(f"the whereabouts of order {order_id}", "lookup_order"), "lookup_order", order_id=order_id
    )
    shipment = found["shipment"]
    if shipment is None:
        session.answer(
            session.close(f"order {order_id} is {found['status']} and has no shipment"),
            f"Order {order_id} is {found['status']}. It was placed on {found['placed']} and has no shipment.",
        )
        return
    session.answer(
        session.close(f"order {order_id} went out with {shipment['carrier']}"),
        f"Order {order_id} is {found['status']}. Carrier: {shipment['carrier']}. Tracking: {shipment['tracking']}. "
        f"Shipment: {shipment['status']}. ETA: {shipment['eta']}.",
    )


def what_did_they_spend(session: Session) -> None:
    name = session.order()["name"]
    session.ask(session.pick(["How much did {n} spend in total?", "What is the sum of all orders of {n}?"], n=name))
    found = session.call(session.open(f"the total of {name}", "search_customers"), "search_customers", query=name)
    customer = found["customers"][0]
    totals = [order["total"] for order in customer["orders"]]
    if len(totals) == 1:
        session.answer(
            session.close(f"{name} has one order"), f"{name} has one order, {customer['orders'][0]['id']}: {totals[0]}."
        )
        return
    expression = " + ".join(str(total) for total in totals)
    reasoning = session.go_on(f"{name} has {len(totals)} orders", "calculate")
    result = session.call(reasoning, "calculate", expression=expression)["result"]
    ids = ", ".join(str(order["id"]) for order in customer["orders"])
    session.answer(session.close(f"the sum is {result}"), f"{name} spent {result} in {len(totals)} orders: {ids}.")


def cancel_order(session: Session) -> None:
    order_id = session.order()["id"]
    session.ask(
        session.pick(["Please cancel order {n}.", "I want to cancel order {n}.", "Cancel {n}, please."], n=order_id)
    )
    found = session.call(
        session.open(f"a cancellation of order {order_id}", "lookup_order"), "lookup_order", order_id=order_id
    )
    status = found["status"]
    if status not in ("pending", "packed"):
        session.answer(
            session.close(f"order {order_id} is already {status}"),
            f"Order {order_id} is already {status} and cannot be cancelled.",
        )
        return
    reasoning = session.go_on(f"order {order_id} is still {status}", "update_order")
    session.call(reasoning, "update_order", order_id=order_id, status="cancelled")
    session.answer(
        session.close(f"order {order_id} is cancelled now"),
        f"Order {order_id} was {status} and is now cancelled. The total of {found['total']} is refunded.",
    )


def is_it_in_stock(session: Session) -> None:
    order_id = session.order()["id"]
    session.ask(
        session.pick(
            ["Can I get the first item of order {n} again?", "Is the first item of order {n} in stock?"], n=order_id
        )
    )
    found = session.call(
        session.open(f"the stock of an item of order {order_id}", "lookup_order"), "lookup_order", order_id=order_id
    )
    item = found["items"][0]
    reasoning = session.go_on(f"the first item is {item['sku']}, a {item['name']}", "check_stock")
    product = session.call(reasoning, "check_stock", sku=item["sku"])
    state = "in stock" if product["stock"] else "sold out"
    session.answer(
        session.close(f"{item['sku']} is {state}"),
        f"The {product['name']} {product['sku']} is {state}: {product['stock']} pieces in {product['warehouse']}, "
        f"{product['price']} each.",
    )


def list_open_orders(session: Session) -> None:
    name = session.order()["name"]
    status = session.rng.choice(["pending", "packed", "shipped"])
    session.ask(session.pick(["Which orders of {n} are {s}?", "List the {s} orders of {n}."], n=name, s=status))
    sql = (
        "SELECT o.id, o.placed, o.total FROM orders o JOIN customers c ON c.id = o.customer_id "
        f"WHERE c.name = '{name}' AND o.status = '{status}' ORDER BY o.id"
    )
    found = session.call(session.open(f"the {status} orders of {name}", "run_sql"), "run_sql", sql=sql)
    if not found["rows"]:
        session.answer(session.close(f"no order of {name} is {status}"), f"{name} has no {status} orders.")
        return
    lines = "\n".join(f"- {row['id']} placed {row['placed']}, total {row['total']}" for row in found["rows"])
    session.answer(
        session.close(f"{found['count']} of the orders match"), f"{name} has {found['count']} {status}:\n{lines}"
    )


TASKS: list[Callable[[Session], None]] = [
    where_is_my_order,
    what_did_they_spend,
    cancel_order,
    is_it_in_stock,
    list_open_orders,
]


def plan(session: Session) -> list[Callable[[Session], None]]:
    """The tasks that the user of a session asks for, in order."""
    return session.rng.sample(TASKS, session.rng.choice([1, 1, 2, 2, 3]))


def solve(seed: int, lexicon: Lexicon = USUAL) -> dict[str, Any]:
    """One session as a trace. Deterministic for a seed and lexicon."""
    session = Session(seed, lexicon)
    for task in plan(session):
        task(session)
    return {
        "schema_version": 1,
        "session_id": f"desk-{seed}",
        "source": "demo",
        "tools": TOOL_SCHEMAS,
        "messages": session.messages,
    }
