"""The order desk: traces that are what the tools really said, repeatable and apart from the training data."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from whiflash_workloads.demo.expert import solve
from whiflash_workloads.demo.generate import FIRST_SEED, MAX_SESSIONS, sessions
from whiflash_workloads.demo.world import Desk
from whiflash_workloads.loaders import load_traces

BUNDLED = Path(__file__).parents[2] / "workloads" / "demo" / "traces" / "heldout.jsonl"


def test_the_bundled_traces_are_what_the_generator_gives() -> None:
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(sessions("heldout", len(lines)))


def test_the_bundled_traces_are_valid_sessions() -> None:
    loaded = load_traces([BUNDLED])
    assert len(loaded.sessions) >= 40 and not loaded.skipped
    for session in loaded.sessions:
        assert [message.role for message in session.messages[:3]] == ["system", "user", "assistant"]
        assert session.messages[-1].role == "assistant"


def test_splits_are_disjoint_ranges_of_seeds() -> None:
    assert all(first + MAX_SESSIONS <= second for first, second in pairwise(sorted(FIRST_SEED.values())))
    with pytest.raises(ValueError, match="--sessions"):
        sessions("train", MAX_SESSIONS + 1)


def test_tool_outputs_are_those_of_the_desk() -> None:
    """Run every recorded call again, in order, on the same desk: the outputs are the recorded ones."""
    for seed in range(500, 520):
        desk = Desk.create(seed)
        outputs = {}
        for message in solve(seed)["messages"]:
            for call in message.get("tool_calls", ()):
                function = call["function"]
                outputs[call["id"]] = desk.call(function["name"], json.loads(function["arguments"]))
            if message["role"] == "tool":
                assert outputs[message["tool_call_id"]] == message["content"]


def test_wording_and_worlds_vary() -> None:
    texts = [json.dumps(solve(seed)["messages"]) for seed in range(700, 720)]
    assert len(set(texts)) == len(texts)
    assert all("reasoning_content" in text for text in texts)


def test_a_cancelled_order_stays_cancelled() -> None:
    desk = Desk.create(3)
    order = desk.rows("SELECT id FROM orders WHERE status = 'pending' LIMIT 1")[0]["id"]
    assert "error" not in json.loads(desk.call("update_order", {"order_id": order, "status": "cancelled"}))
    assert json.loads(desk.call("lookup_order", {"order_id": order}))["status"] == "cancelled"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no_such_tool", {}),
        ("lookup_order", {}),
        ("lookup_order", {"order_id": "x"}),
        ("run_sql", {"sql": "DELETE FROM orders"}),
        ("run_sql", {"sql": "SELECT * FROM nowhere"}),
        ("calculate", {"expression": "__import__('os')"}),
        ("calculate", {"expression": "1 / 0"}),
        ("calculate", {"expression": "1 +"}),
        ("update_order", {"order_id": 1, "status": "lost"}),
    ],
)
def test_a_failing_call_answers_with_an_error(name: str, arguments: dict) -> None:
    desk = Desk.create(3)
    before = desk.rows("SELECT count(*) AS n FROM orders")
    assert "error" in json.loads(desk.call(name, arguments))
    assert desk.rows("SELECT count(*) AS n FROM orders") == before


def test_tools_may_be_called_from_any_thread() -> None:
    """LangGraph runs the calls of one reply in threads; SQLite refused all but the first thread, as a tool error."""
    desk = Desk.create(3)
    orders = [row["id"] for row in desk.rows("SELECT id FROM orders")]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda order: json.loads(desk.call("lookup_order", {"order_id": order})), orders * 4))
    assert [order["order_id"] for order in found] == orders * 4
