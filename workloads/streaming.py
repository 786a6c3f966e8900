"""Accumulate a streamed chat completion: its parts, usage, and arrival times."""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

from whiflash_workloads.history import Reply


class Times(NamedTuple):
    """Latencies in seconds on the client's clock."""

    ttft_s: float | None = None  # from the request to the first text; None without output
    tpot_s: float | None = None  # mean time between tokens; None with fewer than two
    e2e_s: float | None = None  # from the request to the end of the stream
    gaps_s: tuple[float, ...] = ()  # between text chunks (ITL); a chunk may have several tokens


class Incoming:
    """Accumulates chunks; `pieces` are the arrival times of text."""

    def __init__(self) -> None:
        self.id = ""
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: dict[int, list[str]] = {}  # call index -> id, name, argument pieces
        self.usage: Any = None
        self.finished = False
        self.began = self.ended = time.perf_counter()
        self.pieces: list[float] = []

    def end(self) -> None:
        """Mark the end of the stream."""
        self.ended = time.perf_counter()

    def take(self, chunk: Any) -> None:
        """Add a chunk of OpenAI's client."""
        self.id = chunk.id or self.id
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.finished = self.finished or choice.finish_reason is not None
            if self._take_delta(choice.delta):
                self.pieces.append(time.perf_counter())

    def _take_delta(self, delta: Any) -> bool:
        """Add a delta; returns whether it had any text."""
        # `reasoning_content` is an extension that is missing in the client's types.
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
        """The reply so far."""
        calls = tuple((id_, name, "".join(pieces)) for id_, name, *pieces in self.calls.values())
        return Reply("".join(self.reasoning), "".join(self.content), calls)

    def times(self, num_tokens: int) -> Times:
        """Latencies of a reply of `num_tokens` tokens."""
        e2e_s = self.ended - self.began
        if not self.pieces:
            return Times(e2e_s=e2e_s)
        first, last = self.pieces[0], self.pieces[-1]
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(self.pieces))
        return Times(first - self.began, (last - first) / (num_tokens - 1) if num_tokens > 1 else None, e2e_s, gaps)
