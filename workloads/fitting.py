"""Make a recorded history fit a context: the oldest turns go first, whole, and only then is a message shortened."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

Message = dict[str, Any]
CountTokens = Callable[[list[Message]], Awaitable[int]]

MARK = "\n[... {} characters left out ...]\n"
MAX_SHORTENINGS = 24
# A byte-level tokenizer makes at most one token of a byte. A template adds a preamble on tools, and role markers.
TEMPLATE_PREAMBLE_TOKENS = 1024
TEMPLATE_TOKENS_PER_MESSAGE = 16


class Prompt(NamedTuple):
    messages: list[Message]
    cut_turns: int
    shortened: bool


class PromptTooLong(ValueError):
    """A prompt that does not fit even when it is cut and shortened."""


async def fit(history: list[Message], room: int, count_tokens: CountTokens) -> Prompt:
    """`history` within `room` tokens.

    What stands before the first assistant message (system and task) stays; behind it the oldest turns are left out. A
    turn begins at a user or assistant message, so that a tool call and its output go together.
    """
    head, turns = split_turns(history)

    async def fits(number: int) -> bool:
        return await count_tokens(joined(head, turns[number:])) <= room

    most = max(len(turns) - 1, 0)  # the last turn stays
    low, high = 0, most
    if not await fits(0):
        low = 1
        while low < high:  # the smallest number of turns to leave out
            middle = (low + high) // 2
            low, high = (low, middle) if await fits(middle) else (middle + 1, high)
    low = min(low, most)
    messages = joined(head, turns[low:])
    shortened = False
    for _ in range(MAX_SHORTENINGS):
        tokens = await count_tokens(messages)
        if tokens <= room:
            return Prompt(messages, low, shortened)
        messages, shortened = shorten(messages, room / tokens), True
    raise PromptTooLong(f"a prompt of {tokens} tokens cannot be cut to {room}; serve with a larger --context-length")


def split_turns(history: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Messages before the first assistant message, and the turns from there on."""
    first = next((i for i, message in enumerate(history) if message["role"] == "assistant"), len(history))
    turns: list[list[Message]] = []
    for message in history[first:]:
        if message["role"] == "tool" and turns:
            turns[-1].append(message)
        else:
            turns.append([message])
    return history[:first], turns


def joined(head: list[Message], turns: list[list[Message]]) -> list[Message]:
    return [*head, *(message for turn in turns for message in turn)]


def shorten(messages: list[Message], share: float) -> list[Message]:
    """The longest text loses its middle, so that about `share` of all text is left."""
    texts = [_text(message) for message in messages]
    lengths = [len(text) for text in texts]
    longest = max(range(len(messages)), key=lengths.__getitem__)
    surplus = max(64, int(sum(lengths) * (1 - share)))
    keep = max(0, lengths[longest] - surplus) // 2
    text = texts[longest]
    left_out = len(text) - 2 * keep
    content = text[:keep] + MARK.format(left_out) + text[len(text) - keep :]
    return [*messages[:longest], {**messages[longest], "content": content}, *messages[longest + 1 :]]


def _text(message: Message) -> str:
    """Content as one text; of content parts those that are text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def upper_bound(messages: list[Message], tools: list[dict[str, Any]]) -> int:
    """Tokens that the prompt has at most; saves asking the server about short ones."""
    # As ASCII JSON no text is shorter than its bytes, nor than a template's own JSON of it.
    own = TEMPLATE_PREAMBLE_TOKENS + TEMPLATE_TOKENS_PER_MESSAGE * (len(messages) + 1)
    return len(json.dumps(messages)) + len(json.dumps(tools)) + own
