"""Fit a recorded history into a context: drop whole turns, oldest first, and only then shorten a message."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

Message = dict[str, Any]
CountTokens = Callable[[list[Message]], Awaitable[int]]

MARK = "\n[... {} characters left out ...]\n"
MAX_SHORTENINGS = 24
# A byte-level tokenizer yields at most one token per byte. A template adds a preamble for tools, and role markers.
TEMPLATE_PREAMBLE_TOKENS = 1024
TEMPLATE_TOKENS_PER_MESSAGE = 16


class Prompt(NamedTuple):
    """A prompt that fits, and how it was cut."""

    messages: list[Message]
    cut_turns: int
    shortened: bool


class PromptTooLong(ValueError):
    """A prompt that does not fit even after cutting and shortening."""


async def fit(history: list[Message], room: int, count_tokens: CountTokens) -> Prompt:
    """Cut `history` to `room` tokens. Raises PromptTooLong.

    Messages before the first assistant message (system and task) are kept; after them the oldest turns are dropped. A
    turn starts at a user or assistant message, which keeps tool calls and outputs together.
    """
    head, turns = split_turns(history)

    async def fits(number: int) -> bool:
        return await count_tokens(joined(head, turns[number:])) <= room

    most = max(len(turns) - 1, 0)  # the last turn stays
    low, high = 0, most
    if not await fits(0):
        low = 1
        while low < high:  # binary search for the smallest number of turns to drop
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
    """The messages before the first assistant message, and the turns from there on."""
    first = next((i for i, message in enumerate(history) if message["role"] == "assistant"), len(history))
    turns: list[list[Message]] = []
    for message in history[first:]:
        if message["role"] == "tool" and turns:
            turns[-1].append(message)
        else:
            turns.append([message])
    return history[:first], turns


def joined(head: list[Message], turns: list[list[Message]]) -> list[Message]:
    """Inverse of `split_turns`."""
    return [*head, *(message for turn in turns for message in turn)]


def shorten(messages: list[Message], share: float) -> list[Message]:
    """Cut the middle out of the longest text, so that about `share` of all text is left."""
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
    """Content as one text, from its text parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def upper_bound(messages: list[Message], tools: list[dict[str, Any]]) -> int:
    """Upper bound of the prompt's tokens, to avoid counting short prompts on the server."""
    # ASCII JSON is at least as long as the text's bytes, and as a template's own JSON.
    own = TEMPLATE_PREAMBLE_TOKENS + TEMPLATE_TOKENS_PER_MESSAGE * (len(messages) + 1)
    return len(json.dumps(messages)) + len(json.dumps(tools)) + own
