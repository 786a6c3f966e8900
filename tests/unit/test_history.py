"""What stands before a turn, forced and live."""

from __future__ import annotations

import pytest

from tests.sessions import CALL, session
from whiflash_workloads.history import History, Reply

CALLS = (("own-1", "find_order", '{"id": 7}'), ("own-2", "find_order", "{}"))


def test_forced_history_is_as_recorded_whatever_was_answered() -> None:
    history = History(session())
    before = history.before(4)
    history.answer(2, Reply(content="something else"))
    assert history.before(4) == before
    assert before[2]["tool_calls"] == [CALL]
    assert history.divergences == 0


def test_times_are_not_sent() -> None:
    """A server would refuse fields that its API does not have, or show them to the model."""
    messages = [
        {"role": "user", "content": "Hello", "timestamp_s": 1.0},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "timestamp_s": 2.0},
        {"role": "tool", "tool_call_id": "call-1", "content": "{}", "timestamp_s": 3.0, "tool_duration_s": 0.5},
        {"role": "assistant", "content": "Hi"},
    ]
    sent = History(session(messages=messages)).before(3)
    assert not {key for message in sent for key in message} & {"timestamp_s", "tool_duration_s"}


def test_a_live_reply_takes_the_recorded_ones_place() -> None:
    history = History(session(), live=True)
    history.answer(2, Reply(reasoning="Look.", content="One moment.", calls=CALLS[:1]))
    *_, reply, output = history.before(4)
    assert reply == {
        "role": "assistant",
        "content": "One moment.",
        "reasoning_content": "Look.",
        # With the recorded id, so that the recorded output answers it.
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "find_order", "arguments": '{"id": 7}'}}
        ],
    }
    assert output["tool_call_id"] == "call-1"
    assert history.divergences == 0


def test_more_live_calls_than_recorded_keep_their_own_ids_and_diverge() -> None:
    history = History(session(), live=True)
    history.answer(2, Reply(calls=CALLS))
    calls = history.before(4)[2]["tool_calls"]
    assert [call["id"] for call in calls] == ["call-1", "own-2"]
    assert history.divergences == 1


def test_a_live_reply_without_the_recorded_call_diverges() -> None:
    history = History(session(), live=True)
    history.answer(2, Reply())
    assert history.before(4)[2] == {"role": "assistant", "content": ""}
    assert history.divergences == 1


@pytest.mark.parametrize("live", [False, True])
def test_the_marker_is_the_first_thing_of_every_prompt(live: bool) -> None:
    history = History(session(), "[run 1]", live)
    for index in (2, 4):
        assert history.before(index)[0] == {"role": "system", "content": "[run 1]\nYou help."}
    user_first = session(messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
    assert History(user_first, "[run 1]").before(1) == [
        {"role": "system", "content": "[run 1]"},
        {"role": "user", "content": "Hello"},
    ]


def test_the_text_of_a_reply_has_no_white_space_at_the_edges_of_its_parts() -> None:
    assert Reply(" Look.\n", "\n\nWait. ", CALLS[:1]).text == 'Look.Wait.find_order{"id": 7}'
