"""Which span a request's text is in, read from its committed tokens, and what its prompt ends with.

span            `reasoning`, `tool_call` or `answer`. A marker belongs to the span that it opens or closes
context kind    what the reply reacts to: `user`, or `tool_output`, the output of a tool

    <think> Let me look . </think>  \\n  <tool_call> { "name" ... } </tool_call> <|im_end|>
    |------ reasoning -----------|  ans  |----------- tool_call --------------|  answer

Markers are looked for in text, as SGLang's parsers do it, but in the text of the tokenizer's own pieces (as `_the`):
they can be joined without decoding, and a marker is found however the model cut it into tokens. Which markers count
depends on the span that the text is in: a closing marker is one only where its span is open.

    reader = SpanReader(markers, pieces)
    place = reader.begin(prompt)                # a template may have opened the reasoning already
    place = reader.follow(place, tokens)        # place.span: where the next token will stand

Costs a join and a search for each row of a round. Imports the standard library only.
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
"""What opens a tool's output in known chat templates, and how many turns end between it and the reply.

In ChatML an output is a turn of its own, `<tool_response>..</tool_response><|im_end|>`; others end no turn there.
"""


class Pair(NamedTuple):
    """A marker that opens a span and the one that closes it, as joined pieces; "": there is none."""

    opens: str
    closes: str


class ToolOutput(NamedTuple):
    marker: str  # as joined pieces
    turn_ends: int  # that may follow it in a prompt which ends with the output


class Markers(NamedTuple):
    """How a model marks its spans. Without any, all its text is `answer`."""

    reasoning: Pair = Pair("", "")
    tool_call: Pair = Pair("", "")
    call_ends_reasoning: bool = False  # a tool call needs no closing marker of the reasoning before it
    begins_reasoning: bool = False  # replies are reasoning from their first token on, without a marker
    turn_ends: frozenset[int] = frozenset()  # token ids
    tool_output: ToolOutput | None = None


class Place(NamedTuple):
    """How far a text has been read."""

    span: str  # of the next token
    tail: str  # the end of the text, in which a marker may have begun


class Context(NamedTuple):
    """What a reply reacts to."""

    kind: str = USER
    tool: str | None = None  # whose output it is, where that is known


class SpanReader:
    """Follows texts of one model. `pieces`: token id -> the tokenizer's own piece."""

    def __init__(self, markers: Markers, pieces: Mapping[int, str]):
        self.markers = markers
        self.pieces = pieces
        call = markers.tool_call
        exits = {
            REASONING: {markers.reasoning.closes: ANSWER},
            # A closing marker of punctuation alone also stands within a call: the call then lasts to the reply's end.
            TOOL_CALL: {call.closes: ANSWER} if re.search(r"\w", call.closes) else {},
            ANSWER: {markers.reasoning.opens: REASONING, call.opens: TOOL_CALL},
        }
        if markers.call_ends_reasoning:
            exits[REASONING][call.opens] = TOOL_CALL
        self.exits = {span: {text: to for text, to in found.items() if text} for span, found in exits.items()}
        self.patterns = {span: _any_of(found) for span, found in self.exits.items()}
        self.keep = max(len(text) for text in (*markers.reasoning, *call)) - 1

    def begin(self, prompt: Sequence[int]) -> Place:
        """The place at the end of a prompt: read from its last turn, which is what the reply goes on with."""
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
        """What a prompt of which only the tokens are known ends with."""
        output = self.markers.tool_output
        if output is None:
            return Context()
        end = self.text(prompt[self._turn_begin(prompt, output.turn_ends) :])
        return Context(TOOL_OUTPUT if output.marker in end else USER)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join([self.pieces[token] for token in tokens])

    def _turn_begin(self, prompt: Sequence[int], turns_before: int) -> int:
        """Index behind the turn end that has `turns_before` others behind it; 0 where there are not as many."""
        for i in range(len(prompt) - 1, -1, -1):
            if prompt[i] in self.markers.turn_ends:
                if turns_before == 0:
                    return i + 1
                turns_before -= 1
        return 0


def _any_of(texts: Mapping[str, str]) -> re.Pattern[str] | None:
    """Matches any of `texts`, a shorter one first: what is found does not depend on how much text is there yet."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len)))) if texts else None


def message_context(messages: Sequence[Any]) -> Context:
    """What the reply to these chat messages reacts to. A message has SGLang's attributes: `role`, `tool_calls`, ..."""
    for i in range(len(messages) - 1, -1, -1):
        message = messages[i]
        if message.role == "assistant":  # the reply goes on with it
            continue
        if message.role in ("tool", "function"):
            return Context(TOOL_OUTPUT, _called_tool(messages[:i], message))
        return Context()
    return Context()


def _called_tool(before: Sequence[Any], output: Any) -> str | None:
    """The name of the tool whose output a message is: its own word, or that of the call which it answers."""
    name = output.name
    if name is None and output.tool_call_id is not None:
        calls = (call for message in before if message.role == "assistant" for call in message.tool_calls or ())
        name = next((call.function.name for call in calls if call.id == output.tool_call_id), None)
    return name[:MAX_TOOL_NAME] if name else None
