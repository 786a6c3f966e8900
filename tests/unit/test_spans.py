"""Spans of a text followed token by token, and what prompts end with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whiflash_sglang.core.spans import (
    ANSWER,
    REASONING,
    TOOL_CALL,
    TOOL_OUTPUT,
    USER,
    Context,
    Markers,
    Pair,
    Place,
    SpanReader,
    ToolOutput,
    message_context,
)

# Markers in one piece, in several, with other text at their edges; and text that only begins like one.
PIECES = [
    "<think>",
    "</think>",
    "<tool",
    "_call",
    ">",
    "</tool",
    "_call>x",
    "x<",
    "/",
    "think>",
    "tool_call>",
    "x",
    "\n",
]
QWEN = Markers(Pair("<think>", "</think>"), Pair("<tool_call>", "</tool_call>"), call_ends_reasoning=True)
DEEPSEEK = QWEN._replace(call_ends_reasoning=False, begins_reasoning=True)
ONLY_CALLS = Markers(tool_call=Pair("<tool_call>", "</tool_call>"))
ALL_MARKERS = [QWEN, DEEPSEEK, ONLY_CALLS, Markers()]


def read(reader: SpanReader, place: Place, text: str) -> Place:
    """Follow a text of single characters."""
    return reader.follow(place, [ord(character) for character in text])


def by_character(markers: Markers) -> SpanReader:
    return SpanReader(markers, {i: chr(i) for i in range(0x3000)})


def reference(markers: Markers, text: str, span: str) -> str:
    """The span at the end of `text`: every character looked at by itself, with all the text before it at hand."""
    seen = ""
    for character in text:
        seen += character
        ends = {
            REASONING: {markers.reasoning.closes: ANSWER},
            TOOL_CALL: {markers.tool_call.closes: ANSWER},
            ANSWER: {markers.reasoning.opens: REASONING, markers.tool_call.opens: TOOL_CALL},
        }[span]
        if span == REASONING and markers.call_ends_reasoning:
            ends[markers.tool_call.opens] = TOOL_CALL
        for marker, to in ends.items():
            if marker and seen.endswith(marker):
                span, seen = to, ""
                break
    return span


@given(
    st.sampled_from(ALL_MARKERS),
    st.lists(st.lists(st.integers(0, len(PIECES) - 1), max_size=6), max_size=12),
    st.sampled_from([REASONING, TOOL_CALL, ANSWER]),
)
def test_however_a_text_comes_its_spans_are_those_of_the_whole(
    markers: Markers, rounds: list[list[int]], span: str
) -> None:
    reader = SpanReader(markers, dict(enumerate(PIECES)))
    place, text = Place(span, ""), ""
    for tokens in rounds:
        place = reader.follow(place, tokens)
        text += "".join(PIECES[token] for token in tokens)
        assert place.span == reference(markers, text, span)


@pytest.mark.parametrize("session", range(6))
def test_demo_replies_have_the_spans_that_the_drafters_are_trained_with(session: int) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    from whiflash_sglang.startup.demo import DEMO_MODELS
    from whiflash_sglang.training.text import SPANS, render
    from whiflash_workloads.demo.generate import sessions

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
    ids, labels = render(list(sessions("heldout", 6))[session], tokenizer)
    reader = SpanReader(QWEN, {i: tokenizer.convert_ids_to_tokens(i) for i in set(ids.tolist())})
    place, found, expected = Place(ANSWER, ""), [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if SPANS[label] == "context":
            place = Place(ANSWER, "")
            continue
        before, place = place.span, reader.follow(place, [token])
        found.append(place.span if before == ANSWER else before)  # a marker belongs to what it opens or closes
        expected.append(SPANS[label])
    assert found == expected
    assert {REASONING, ANSWER} <= set(found)


def test_the_marker_that_closes_a_span_counts_only_there() -> None:
    reader = by_character(Markers(tool_call=Pair("[TOOL_CALLS] [", "[/TOOL_CALLS]")))
    place = read(reader, Place(ANSWER, ""), "see [/TOOL_CALLS] [TOOL_CALLS] [")
    assert place.span == TOOL_CALL
    assert read(reader, place, '{"a": [1]}[/TOOL_CALLS]').span == ANSWER


def test_a_call_that_a_bracket_closes_lasts_to_the_end() -> None:
    """A `]` stands in the call's own JSON: taken for the end, the rest of the call was `answer`."""
    reader = by_character(Markers(tool_call=Pair("[TOOL_CALLS] [", "]")))
    assert read(reader, Place(ANSWER, ""), '[TOOL_CALLS] [{"ids": [1, 2], "note": ""').span == TOOL_CALL


END = 0x2FFF  # ends a turn


def prompt(*turns: str) -> list[int]:
    """The last turn is not ended."""
    ids: list[int] = []
    for turn in turns:
        ids += [*map(ord, turn), END]
    return ids[:-1]


@pytest.mark.parametrize(
    ("markers", "turns", "span"),
    [
        (QWEN, ["user: hi", "\nassistant\n"], ANSWER),
        (QWEN, ["user: hi", "\nassistant\n<think>\n"], REASONING),
        (QWEN, ["user: hi", "\nassistant\n<think>\n\n</think>\n\n"], ANSWER),
        (QWEN, ["user: hi", "\nassistant\n<think>I may", "\nassistant\n"], ANSWER),
        (QWEN, ["user: what is <think>?", "\nassistant\n"], ANSWER),
        (QWEN, ["assistant\n<think>cut off"], REASONING),
        (DEEPSEEK, ["user: hi assistant:"], REASONING),
        (DEEPSEEK, ["user: hi assistant: <think>\n\n</think>"], ANSWER),
        (QWEN, [""], ANSWER),
    ],
)
def test_a_reply_begins_where_its_prompt_ends(markers: Markers, turns: list[str], span: str) -> None:
    assert by_character(markers._replace(turn_ends=frozenset([END]))).begin(prompt(*turns)).span == span


def test_a_marker_that_the_prompt_begins_and_the_reply_ends() -> None:
    reader = by_character(QWEN)
    assert read(reader, reader.begin(prompt("assistant <thi")), "nk>").span == REASONING


CHATML = QWEN._replace(turn_ends=frozenset([END]), tool_output=ToolOutput("<tool_response>", 1))
OTHER = QWEN._replace(turn_ends=frozenset([END]), tool_output=ToolOutput("<output>", 0))


@pytest.mark.parametrize(
    ("markers", "turns", "kind"),
    [
        (CHATML, ["user: hi", "\nassistant\n"], USER),
        (CHATML, ["assistant <tool_call>", "user\n<tool_response>1</tool_response>", "\nassistant\n"], TOOL_OUTPUT),
        (CHATML, ["user\n<tool_response>1</tool_response>", "assistant: 1", "user: ok", "\nassistant\n"], USER),
        (OTHER, ["user: hi assistant: call", "<output>1 assistant:"], TOOL_OUTPUT),
        (OTHER, ["user: hi assistant: call", "<output>1 assistant: one", "user: ok assistant:"], USER),
        (QWEN, ["user\n<tool_response>1", "\nassistant\n"], USER),
        (CHATML, [""], USER),
    ],
)
def test_context_from_tokens(markers: Markers, turns: list[str], kind: str) -> None:
    assert by_character(markers).context(prompt(*turns)) == Context(kind)


def message(role: str, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"role": role, "tool_calls": None, "tool_call_id": None, "name": None} | fields))


def call(call_id: str, name: str) -> SimpleNamespace:
    return SimpleNamespace(id=call_id, function=SimpleNamespace(name=name))


CALLS = message("assistant", tool_calls=[call("a", "get_order"), call("b", "run_sql")])


@pytest.mark.parametrize(
    ("messages", "context"),
    [
        ([], Context(USER)),
        ([message("system"), message("user")], Context(USER)),
        ([message("user"), CALLS, message("tool", tool_call_id="b")], Context(TOOL_OUTPUT, "run_sql")),
        ([CALLS, message("tool", tool_call_id="a"), message("user")], Context(USER)),
        ([CALLS, message("tool", tool_call_id="c")], Context(TOOL_OUTPUT)),
        ([message("tool", name="given")], Context(TOOL_OUTPUT, "given")),
        ([message("function", name="f" * 500)], Context(TOOL_OUTPUT, "f" * 128)),
        ([CALLS, message("tool", tool_call_id="a"), message("assistant")], Context(TOOL_OUTPUT, "get_order")),
    ],
)
def test_context_from_messages(messages: list[SimpleNamespace], context: Context) -> None:
    assert message_context(messages) == context
