"""The markers of every parser that SGLang has, as our span reader gets them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from whiflash_sglang.bridge.markers import Pieces, model_markers, span_reader
from whiflash_sglang.core.spans import ANSWER, REASONING, TOOL_CALL, Markers, Pair, Place, SpanReader

WITHOUT_MARKER = {"pythonic", "gigachat3"}  # calls are plain Python; the marker stands in a pattern only


class Tokenizer:
    """A token for every character, and none for whole markers. Puts a space before a text, as some do."""

    eos_token_id = 10

    def __init__(self, template: str | dict[str, str] | None = None):
        self.chat_template = template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord("▁"), *map(ord, text)]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return chr(token) if token else None

    def get_vocab(self) -> dict[str, int]:
        return {}


def markers(reasoning: str | None, tool_call: str | None, template: str | dict[str, str] | None = None) -> Markers:
    tokenizer = Tokenizer(template)
    return model_markers(reasoning, tool_call, tokenizer, Pieces(tokenizer))


def spans(found: Markers, *texts: str) -> list[str]:
    """The span after each of the texts."""
    reader = SpanReader(found, Pieces(Tokenizer()))
    place = Place(ANSWER, "")
    result = []
    for text in texts:
        place = reader.follow(place, [ord(character) for character in text])
        result.append(place.span)
    return result


@pytest.mark.parametrize("name", sorted(ReasoningParser.DetectorMap))
def test_every_reasoning_parser(name: str) -> None:
    found = markers(name, None)
    detector = ReasoningParser(name, tokenizer=Tokenizer()).detector
    texts = [detector.think_start_token, "so it is", detector.think_end_token]
    assert spans(found, *texts) == [REASONING, REASONING, ANSWER]


@pytest.mark.parametrize("name", sorted(FunctionCallParser.ToolCallParserEnum))
def test_every_tool_call_parser(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        opens, closes = markers(None, name).tool_call
    if name in WITHOUT_MARKER:
        assert (opens, closes) == ("", "")
        assert f"parser {name} has no markers" in caplog.text
    else:
        assert opens.strip() == opens != ""
        assert spans(markers(None, name), opens) == [TOOL_CALL]


def test_qwen() -> None:
    found = markers("qwen3", "qwen", "{{ '<tool_response>' }}")
    assert found.reasoning == Pair("<think>", "</think>")
    assert found.tool_call == Pair("<tool_call>", "</tool_call>"), "line ends belong to other tokens"
    assert found.call_ends_reasoning
    assert not found.begins_reasoning
    assert found.tool_output is not None
    assert found.tool_output[1] == 1
    assert spans(found, "<think>hm", "<tool_call>", '\n{"name"', "\n</tool_call>") == [
        REASONING,
        TOOL_CALL,
        TOOL_CALL,
        ANSWER,
    ]


def test_reasoning_without_an_opening_marker() -> None:
    assert markers("deepseek-r1", None).begins_reasoning
    assert markers("qwen3-thinking", None).begins_reasoning


def test_without_parsers_all_is_answer() -> None:
    assert markers(None, None, {"default": "no outputs"}) == Markers()
    assert spans(Markers(), "<think>") == [ANSWER]


def test_turn_ends_are_the_tokens_that_end_a_reply() -> None:
    worker = SimpleNamespace(tokenizer=Tokenizer(), model_config=SimpleNamespace(hf_eos_token_id={7, 8}))
    flags = SimpleNamespace(reasoning_parser="qwen3", tool_call_parser=None)
    assert span_reader(flags, worker).markers.turn_ends == {7, 8, 10}


def test_without_a_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    worker = SimpleNamespace(tokenizer=None)
    assert span_reader(SimpleNamespace(), worker).markers == Markers()
    assert "--skip-tokenizer-init" in caplog.text
