"""Tracks which span a request's text is in, from its committed tokens, and what its prompt ends with.

span            `reasoning`, `tool_call` or `answer`. A marker belongs to the span that it opens or closes
context kind    what the reply reacts to: `user`, or `tool_output` (the output of a tool)

    <think> Let me look . </think>  \\n  <tool_call> { "name" ... } </tool_call> <|im_end|>
    |------ reasoning -----------|  ans  |----------- tool_call --------------|  answer

Markers are searched in text, as in SGLang's parsers, but in the tokenizer's raw pieces (as `_the`). Pieces are joined
without decoding, and a marker is found for any tokenization of it. The current span decides which markers count: a
closing marker counts only while its span is open.

    reader = SpanReader(markers, pieces)
    place = reader.begin(prompt)                # the chat template may already open the reasoning
    place = reader.follow(place, tokens)        # place.span: the span of the next token

Costs one join and one search per row and round. Imports the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REASONING, TOOL_CALL, ANSWER = SPANS = ("reasoning", "tool_call", "answer")
USER, TOOL_OUTPUT = CONTEXT_KINDS = ("user", "tool_output")
MAX_TOOL_NAME = 128  # characters

TURN_ENDS_AFTER_OUTPUT = {
    "<\uff5ctool\u2581output\u2581begin\uff5c>": 0,
    "[TOOL_RESULTS]": 0,
    "<|observation|>": 0,
    "<|start_header_id|>ipython<|end_header_id|>": 1,
    "<tool_response>": 1,
}
"""Opening markers of tool outputs in known chat templates -> number of turn ends between the output and the reply.

In ChatML, an output is a turn of its own: `<tool_response>..</tool_response><|im_end|>`.
"""


class Pair(NamedTuple):
    """The opening and closing markers of a span, as joined pieces; "" if there is none."""

    opens: str
    closes: str


class ToolOutput(NamedTuple):
    """How a chat template marks the output of a tool."""

    marker: str  # as joined pieces
    turn_ends: int  # between it and the end of a prompt that ends with the output


class Markers(NamedTuple):
    """How a model marks its spans. Without markers, all text is `answer`."""

    reasoning: Pair = Pair("", "")
    tool_call: Pair = Pair("", "")
    call_ends_reasoning: bool = False  # a tool call ends the reasoning without a closing marker
    begins_reasoning: bool = False  # replies begin with reasoning, without an opening marker
    turn_ends: frozenset[int] = frozenset()  # token ids
    tool_output: ToolOutput | None = None


class Place(NamedTuple):
    """The reader's state at the end of a text."""

    span: str  # of the next token
    tail: str  # end of the text, which may hold the beginning of a marker


class Context(NamedTuple):
    """What a reply reacts to."""

    kind: str = USER
    tool: str | None = None  # name of the tool, if known


class SpanReader:
    """Follows texts of one model. `pieces`: token id -> the tokenizer's own piece."""

    def __init__(self, markers: Markers, pieces: Mapping[int, str]):
        self.markers = markers
        self.pieces = pieces
        call = markers.tool_call
        exits = {
            REASONING: {markers.reasoning.closes: ANSWER},
            # A closing marker without letters also occurs within calls. The call then lasts to the end of the reply.
            TOOL_CALL: {call.closes: ANSWER} if re.search(r"\w", call.closes) else {},
            ANSWER: {markers.reasoning.opens: REASONING, call.opens: TOOL_CALL},
        }
        if markers.call_ends_reasoning:
            exits[REASONING][call.opens] = TOOL_CALL
        self.exits = {span: {text: to for text, to in found.items() if text} for span, found in exits.items()}
        self.patterns = {span: _any_of(found) for span, found in self.exits.items()}
        self.keep = max(len(text) for text in (*markers.reasoning, *call)) - 1

    def begin(self, prompt: Sequence[int]) -> Place:
        """The place at the end of a prompt, from its last turn, which the reply continues."""
        turn = prompt[self._turn_begin(prompt, 0) :]
        read = self.follow(Place(ANSWER, ""), turn)
        if self.markers.begins_reasoning and self.markers.reasoning.closes not in self.text(turn):
            return Place(REASONING, read.tail)
        return read

    def follow(self, place: Place, tokens: Sequence[int]) -> Place:
        """The place after `tokens`."""
        if self.keep < 0:
            return place
        text = place.tail + self.text(tokens)
        span, at = place.span, 0
        while (pattern := self.patterns[span]) is not None and (found := pattern.search(text, at)) is not None:
            span, at = self.exits[span][found.group()], found.end()
        return Place(span, text[max(at, len(text) - self.keep) :])

    def context(self, prompt: Sequence[int]) -> Context:
        """The context of a reply to a prompt that is only known as tokens. The tool's name is then unknown."""
        output = self.markers.tool_output
        if output is None:
            return Context()
        end = self.text(prompt[self._turn_begin(prompt, output.turn_ends) :])
        return Context(TOOL_OUTPUT if output.marker in end else USER)

    def text(self, tokens: Sequence[int]) -> str:
        """The joined pieces of the tokens."""
        return "".join([self.pieces[token] for token in tokens])

    def _turn_begin(self, prompt: Sequence[int], turns_before: int) -> int:
        """Index after the turn end that is followed by `turns_before` others; 0 if there are fewer."""
        for i in range(len(prompt) - 1, -1, -1):
            if prompt[i] in self.markers.turn_ends:
                if turns_before == 0:
                    return i + 1
                turns_before -= 1
        return 0


def _any_of(texts: Mapping[str, str]) -> re.Pattern[str] | None:
    """Match any of `texts`, shorter ones first. The match then does not depend on how much text has arrived."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len)))) if texts else None


def message_context(messages: Sequence[Any]) -> Context:
    """The context of the reply to these chat messages. Messages are SGLang's, with `role`, `tool_calls`, ..."""
    for i in range(len(messages) - 1, -1, -1):
        message = messages[i]
        if message.role == "assistant":  # the reply continues it
            continue
        if message.role in ("tool", "function"):
            return Context(TOOL_OUTPUT, _called_tool(messages[:i], message))
        return Context()
    return Context()


def _called_tool(before: Sequence[Any], output: Any) -> str | None:
    """The tool of an output message: from its `name`, else from the call with its `tool_call_id`."""
    name = output.name
    if name is None and output.tool_call_id is not None:
        calls = (call for message in before if message.role == "assistant" for call in message.tool_calls or ())
        name = next((call.function.name for call in calls if call.id == output.tool_call_id), None)
    return name[:MAX_TOOL_NAME] if name else None
