"""Timing of a replay: session starts and tool durations.

    --concurrency N            closed loop: N concurrent sessions
    --arrivals poisson:RATE    open loop: RATE sessions per second on average, independent of the server's speed
    --arrivals recorded        open loop: each session at its recorded start (its first `timestamp_s`)

    --tool-time recorded | zero | scale:X    how long the client waits before a turn that follows tool outputs

Tool calls of one message are assumed to run in parallel, so the longest duration counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from whiflash_workloads.schema import Session, ToolMessage


@dataclass(frozen=True)
class Arrivals:
    """Arrivals of an open loop: Poisson with `rate`, or as recorded if it is None."""

    rate: float | None = None  # sessions per second

    def starts(self, sessions: Sequence[Session], seed: int) -> list[float]:
        """Start times in seconds from the replay's start, in the order of `sessions`."""
        return recorded_starts(sessions) if self.rate is None else poisson_starts(len(sessions), self.rate, seed)


def parse_arrivals(text: str) -> Arrivals:
    """Parse `recorded` or `poisson:RATE`. Raises ValueError."""
    if text == "recorded":
        return Arrivals()
    name, _, value = text.partition(":")
    rate = _number(value)
    if name != "poisson" or rate is None or rate == 0:
        raise ValueError(f"`{text}` is neither recorded nor poisson:RATE (sessions per second); give e.g. poisson:0.5")
    return Arrivals(rate)


def poisson_starts(count: int, rate: float, seed: int) -> list[float]:
    """`count` start times in seconds, at `rate` per second."""
    dice, now, starts = random.Random(seed), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate)
        starts.append(now)
    return starts


def recorded_starts(sessions: Sequence[Session]) -> list[float]:
    """Recorded start times in seconds, relative to the earliest. Raises ValueError if a session has none."""
    times = [session.messages[0].timestamp_s for session in sessions]
    for session, time in zip(sessions, times, strict=True):
        if time is None:
            raise ValueError(
                f"--arrivals recorded: the first message of session `{session.session_id}` has no timestamp_s; "
                "give traces with times, or --arrivals poisson:RATE"
            )
    known = [time for time in times if time is not None]
    return [time - min(known) for time in known]


def parse_tool_time(text: str) -> float:
    """The factor for recorded durations: `recorded` 1, `zero` 0, `scale:X` X. Raises ValueError."""
    if text in ("recorded", "zero"):
        return float(text == "recorded")
    name, _, value = text.partition(":")
    scale = _number(value)
    if name != "scale" or scale is None:
        raise ValueError(f"`{text}` is not one of recorded, zero, scale:X; give e.g. scale:0.1")
    return scale


def tool_pause(session: Session, index: int, scale: float) -> float:
    """Seconds to wait for the tool outputs directly before message `index`."""
    durations = [0.0]
    for message in reversed(session.messages[:index]):
        if not isinstance(message, ToolMessage):
            break
        durations.append(message.tool_duration_s or 0.0)
    return scale * max(durations)


def untimed_outputs(sessions: Sequence[Session]) -> tuple[int, int]:
    """The number of tool outputs without a duration, and of all tool outputs."""
    outputs = [message for session in sessions for message in session.messages if isinstance(message, ToolMessage)]
    return sum(output.tool_duration_s is None for output in outputs), len(outputs)


def _number(text: str) -> float | None:
    """A finite number >= 0, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
