"""A streamed chat completion as it arrives: its parts, its counts, and when each piece came."""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

from whiflash_workloads.history import Reply


class Times(NamedTuple):
    """Seconds on the client's clock, from the request's start."""

    ttft_s: float | None = None  # to the first piece of text; None if nothing came
    tpot_s: float | None = None  # between two tokens, on average; None with fewer than two
    e2e_s: float | None = None  # to the end of the stream
    gaps_s: tuple[float, ...] = ()  # between one piece of text and the next (ITL); a piece may be several tokens


class Incoming:
    """Takes chunks in; `pieces` are the moments at which text came."""

    def __init__(self) -> None:
        self.id = ""
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: dict[int, list[str]] = {}  # by the call's number: id, name, pieces of the arguments
        self.usage: Any = None
        self.finished = False
        self.began = self.ended = time.perf_counter()
        self.pieces: list[float] = []

    def end(self) -> None:
        self.ended = time.perf_counter()

    def take(self, chunk: Any) -> None:
        self.id = chunk.id or self.id
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.finished = self.finished or choice.finish_reason is not None
            if self._take_delta(choice.delta):
                self.pieces.append(time.perf_counter())

    def _take_delta(self, delta: Any) -> bool:
        """Whether there was any text in it."""
        # `reasoning_content` is an extension that the client's types do not have.
        reasoning, content = (delta.model_extra or {}).get("reasoning_content"), delta.content
        self.reasoning += [reasoning] if reasoning else []
        self.content += [content] if content else []
        called = False
        for call in delta.tool_calls or ():
            if call.function is None:
                continue
            known = self.calls.setdefault(call.index, [call.id or "", ""])
            known[1] += call.function.name or ""
            known += [call.function.arguments] if call.function.arguments else []
            called = called or bool(call.function.name or call.function.arguments)
        return bool(reasoning or content or called)

    def reply(self) -> Reply:
        calls = tuple((id_, name, "".join(pieces)) for id_, name, *pieces in self.calls.values())
        return Reply("".join(self.reasoning), "".join(self.content), calls)

    def times(self, num_tokens: int) -> Times:
        e2e_s = self.ended - self.began
        if not self.pieces:
            return Times(e2e_s=e2e_s)
        first, last = self.pieces[0], self.pieces[-1]
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(self.pieces))
        return Times(first - self.began, (last - first) / (num_tokens - 1) if num_tokens > 1 else None, e2e_s, gaps)
