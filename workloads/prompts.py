"""Make a recorded history fit a server's context: whole turns are left out first, then a message is shortened.

A turn is a user message, or an assistant message with the tool outputs that answer it. The oldest go first; the system
message and the last turn stay. Where even these are too long, the longest message loses its middle.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

MARK = "\n[...]\n"  # in place of what a shortened message has lost
STEPS = 64  # a message is shortened to so many 64ths

ChatMessage = dict[str, Any]
Count = Callable[[Sequence[ChatMessage]], Awaitable[int]]


class Prompt(NamedTuple):
    messages: list[ChatMessage]
    cut_turns: int = 0
    shortened: bool = False


class TooLongError(ValueError):
    """Messages that do not fit even without their texts."""


async def fit(messages: Sequence[ChatMessage], room: int, count: Count) -> Prompt:
    """As many of the newest turns as take at most `room` tokens by `count`."""
    if await count(messages) <= room:
        return Prompt(list(messages))
    system, turns = split(messages)

    def without(cut: int) -> list[ChatMessage]:
        return [*system, *(message for turn in turns[cut:] for message in turn)]

    async def fits(cut: int) -> bool:
        return await count(without(cut)) <= room

    last = max(len(turns) - 1, 0)
    cut = await _first(fits, 1, last)
    if cut is not None:
        return Prompt(without(cut), cut)
    return Prompt(await _shorten(without(last), room, count), last, shortened=True)


def split(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[list[ChatMessage]]]:
    """The system messages at the start, and the turns behind them."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[ChatMessage]] = []
    for message in messages[start:]:
        if message["role"] == "tool" and turns:
            turns[-1].append(message)
        else:
            turns.append([message])
    return list(messages[:start]), turns


async def _shorten(messages: list[ChatMessage], room: int, count: Count) -> list[ChatMessage]:
    """Texts cut in their middle, the longest message first and the next only if that is not enough."""
    messages = list(messages)
    for i in sorted(range(len(messages)), key=lambda i: len(messages[i]["content"] or ""), reverse=True):
        original, text = messages[i], messages[i]["content"] or ""
        if len(text) <= len(MARK):
            break

        def less(lost: int, original: ChatMessage = original, text: str = text) -> ChatMessage:
            half = len(text) * (STEPS - lost) // STEPS // 2
            return {**original, "content": text[:half] + MARK + text[len(text) - half :]}

        async def fits(lost: int, i: int = i, less: Callable[[int], ChatMessage] = less) -> bool:
            return await count([*messages[:i], less(lost), *messages[i + 1 :]]) <= room

        lost = await _first(fits, 1, STEPS)
        messages[i] = less(STEPS if lost is None else lost)
        if lost is not None:
            return messages
    raise TooLongError(f"the prompt takes more than {room} tokens even without its texts")


async def _first(fits: Callable[[int], Awaitable[bool]], low: int, high: int) -> int | None:
    """The smallest of low..high that fits, where all behind it do too; None if none does."""
    if low > high or not await fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if await fits(middle):
            high = middle
        else:
            low = middle + 1
    return high
