"""Prompts cut to a context: whole turns, the oldest first, and as few as will do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whiflash_workloads.fitting import Message, Prompt, PromptTooLong, fit, joined, shorten, split_turns, upper_bound

SYSTEM = {"role": "system", "content": "be helpful"}
TASK = {"role": "user", "content": "find order seven"}


def said(words: int = 3) -> Message:
    return {"role": "assistant", "content": " ".join(["said"] * words)}


def asked(words: int = 3) -> Message:
    return {"role": "user", "content": " ".join(["asked"] * words)}


def called(words: int = 3) -> list[Message]:
    """A call of two tools and their outputs."""
    calls = [{"id": str(i), "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(2)]
    outputs = [{"role": "tool", "tool_call_id": str(i), "content": " ".join(["out"] * words)} for i in range(2)]
    return [{"role": "assistant", "content": None, "tool_calls": calls}, *outputs]


async def count_words(messages: list[Message]) -> int:
    return sum(len((message.get("content") or "").split()) for message in messages)


async def count_characters(messages: list[Message]) -> int:
    return sum(len(message.get("content") or "") for message in messages)


def fitted(history: list[Message], room: int, count: Any = count_words) -> Prompt:
    return asyncio.run(fit(history, room, count))


# Turns


def test_what_stands_before_the_first_assistant_message_is_the_head() -> None:
    head, turns = split_turns([SYSTEM, TASK, *called(), said(), asked(), said()])
    assert head == [SYSTEM, TASK]
    assert turns == [called(), [said()], [asked()], [said()]]


@pytest.mark.parametrize("history", [[], [SYSTEM, TASK]])
def test_no_assistant_message_no_turns(history: list[Message]) -> None:
    assert split_turns(history) == (history, [])


def test_an_opening_assistant_message_leaves_no_head() -> None:
    assert split_turns([said(), asked()]) == ([], [[said()], [asked()]])


# Cutting


def test_a_prompt_that_fits_is_left_alone() -> None:
    history = [SYSTEM, TASK, *called(), said()]
    assert fitted(history, 14) == Prompt(history, 0, False)


@pytest.mark.parametrize(
    ("room", "cut"), [(29, 0), (28, 1), (20, 1), (19, 2), (17, 2), (16, 3), (14, 3), (13, 4), (11, 4)]
)
def test_as_few_turns_as_will_do(room: int, cut: int) -> None:
    """Words: head 5, a call with outputs 6 + 2 turns of 3, then 6 and 6."""
    history = [SYSTEM, TASK, *called(), said(), asked(), *called(), *called()]
    sizes = [6, 3, 3, 6, 6]
    assert 5 + sum(sizes) == 29
    prompt = fitted(history, room)
    assert prompt.cut_turns == next(n for n in range(6) if 5 + sum(sizes[n:]) <= room) and not prompt.shortened
    assert prompt.messages[:2] == [SYSTEM, TASK]
    assert prompt.messages[2:] == joined([], split_turns(history)[1][prompt.cut_turns :])


def test_a_call_goes_with_its_outputs() -> None:
    prompt = fitted([SYSTEM, TASK, *called(20), said(), asked()], 40)
    assert prompt == Prompt([SYSTEM, TASK, said(), asked()], 1, False)


def test_the_last_turn_stays_and_is_shortened() -> None:
    prompt = fitted([SYSTEM, TASK, said(), asked(), *called(400)], 600)
    assert (prompt.cut_turns, prompt.shortened) == (2, True)
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant", "tool", "tool"]
    assert prompt.messages[:2] == [SYSTEM, TASK]


# Shortening


def test_a_task_that_alone_is_too_long_loses_its_middle() -> None:
    task = {"role": "user", "content": "begin " + "middle " * 2000 + "end"}
    (message,) = fitted([task], 500).messages
    assert message["role"] == "user"
    assert message["content"].startswith("begin middle") and message["content"].endswith("middle end")
    assert "characters left out" in message["content"]
    assert 250 < len(message["content"].split()) <= 500


def test_shortening_says_how_much_and_changes_one_message_only() -> None:
    messages = [SYSTEM, {"role": "user", "content": "a" * 500 + "b" * 500}, said()]
    shortened = shorten(messages, 0.5)
    assert [shortened[0], shortened[2]] == [SYSTEM, said()]
    begin, mark, end = shortened[1]["content"].split("\n")
    assert set(begin) == {"a"} and set(end) == {"b"} and len(begin) == len(end)
    assert mark == f"[... {1000 - len(begin) - len(end)} characters left out ...]"
    assert messages[1]["content"] == "a" * 500 + "b" * 500


@pytest.mark.parametrize("room", [1, 0, -5])
def test_a_prompt_that_cannot_fit(room: int) -> None:
    with pytest.raises(PromptTooLong, match=f"cannot be cut to {room}; serve with a larger --context-length"):
        fitted([SYSTEM, TASK, *called(50)], room)


def test_calls_that_alone_are_too_long_are_not_shortened() -> None:
    """Arguments without their middle would be no JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"text": "x" * 900})}}

    async def count(messages: list[Message]) -> int:
        return len(json.dumps(messages))

    with pytest.raises(PromptTooLong):
        fitted([TASK, {"role": "assistant", "content": None, "tool_calls": [call]}], 700, count)


# Properties

texts = st.text(max_size=120)
turns_of_any_kind = st.one_of(
    texts.map(lambda text: [{"role": "assistant", "content": text}]),
    texts.map(lambda text: [{"role": "user", "content": text}]),
    st.lists(texts, min_size=1, max_size=3).map(
        lambda outputs: [
            {"role": "assistant", "content": None},
            *({"role": "tool", "tool_call_id": "1", "content": text} for text in outputs),
        ]
    ),
)
histories = st.tuples(texts, st.lists(turns_of_any_kind, max_size=8)).map(
    lambda parts: [SYSTEM, {"role": "user", "content": parts[0]}, *joined([], parts[1])]
)


@given(histories, st.integers(200, 800))
def test_what_is_fitted_fits_and_is_a_suffix(history: list[Message], room: int) -> None:
    try:
        prompt = fitted(history, room, count_characters)
    except PromptTooLong:
        return
    head, turns = split_turns(history)
    kept = joined(head, turns[prompt.cut_turns :])
    assert asyncio.run(count_characters(prompt.messages)) <= room
    assert [message["role"] for message in prompt.messages] == [message["role"] for message in kept]
    assert prompt.shortened or prompt.messages == kept
    if prompt.cut_turns:  # one turn less would not have been enough
        assert asyncio.run(count_characters(joined(head, turns[prompt.cut_turns - 1 :]))) > room


messages_of_any_kind = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.none() | st.text(max_size=60)},
    optional={
        "reasoning_content": st.text(max_size=60),
        "tool_calls": st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": texts})}), max_size=2
        ),
    },
)
tools_of_any_kind = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(texts, texts, max_size=3)})
)


@given(st.lists(messages_of_any_kind, max_size=6), tools_of_any_kind)
def test_a_byte_level_tokenizer_makes_no_more_tokens_than_the_bound(messages: list[Message], tools: list[Any]) -> None:
    """One token for each byte of a ChatML prompt, but one for each of its marks."""
    tokens = 0
    for message in messages:
        text = [message["role"], message["content"] or "", message.get("reasoning_content", "")]
        for call in message.get("tool_calls", ()):
            text += [call["function"]["name"], call["function"]["arguments"]]
        tokens += len("".join(text).encode()) + 3
    tokens += sum(len(json.dumps(tool, ensure_ascii=False).encode()) for tool in tools)
    assert upper_bound(messages, tools) >= tokens


def test_the_bound_counts_what_a_template_escapes_in_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": 'say "' + '"\x00\n' * 100}}
    assert upper_bound([], [tool]) >= len(json.dumps(tool, ensure_ascii=False).encode())
