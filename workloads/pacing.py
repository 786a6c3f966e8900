"""When a session starts, and how long an agent's tools take: the clock of a replay.

    --concurrency N            closed loop: N sessions at a time, the next when one ends
    --arrivals poisson:RATE    open loop: RATE sessions a second on average, however slow the server is
    --arrivals recorded        open loop: each session when it was recorded to start (its first `timestamp_s`)

    --tool-time recorded | zero | scale:X    how long the client waits before a turn that follows tool outputs

Calls that an agent makes in one message run side by side, so that their longest duration counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from whiflash_workloads.schema import Session, ToolMessage


@dataclass(frozen=True)
class Arrivals:
    """Of an open loop. `rate` is None where sessions start as recorded."""

    rate: float | None = None  # sessions a second

    def starts(self, sessions: Sequence[Session], seed: int) -> list[float]:
        """Seconds after the replay's start at which each session starts, in the order of `sessions`."""
        return recorded_starts(sessions) if self.rate is None else poisson_starts(len(sessions), self.rate, seed)


def parse_arrivals(text: str) -> Arrivals:
    """`recorded` or `poisson:RATE`; raises ValueError."""
    if text == "recorded":
        return Arrivals()
    name, _, value = text.partition(":")
    rate = _number(value)
    if name != "poisson" or rate is None or rate == 0:
        raise ValueError(f"`{text}` is neither recorded nor poisson:RATE (sessions a second); give e.g. poisson:0.5")
    return Arrivals(rate)


def poisson_starts(count: int, rate: float, seed: int) -> list[float]:
    dice, now, starts = random.Random(seed), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate)
        starts.append(now)
    return starts


def recorded_starts(sessions: Sequence[Session]) -> list[float]:
    """Relative to the earliest; raises ValueError where a session does not say."""
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
    """What recorded durations are multiplied by: `recorded` 1, `zero` 0, `scale:X` X; raises ValueError."""
    if text in ("recorded", "zero"):
        return float(text == "recorded")
    name, _, value = text.partition(":")
    scale = _number(value)
    if name != "scale" or scale is None:
        raise ValueError(f"`{text}` is none of recorded, zero, scale:X; give e.g. scale:0.1")
    return scale


def tool_pause(session: Session, index: int, scale: float) -> float:
    """Seconds that the tools take whose outputs stand directly before message `index`."""
    durations = [0.0]
    for message in reversed(session.messages[:index]):
        if not isinstance(message, ToolMessage):
            break
        durations.append(message.tool_duration_s or 0.0)
    return scale * max(durations)


def untimed_outputs(sessions: Sequence[Session]) -> tuple[int, int]:
    """How many tool outputs have no duration, and how many there are."""
    outputs = [message for session in sessions for message in session.messages if isinstance(message, ToolMessage)]
    return sum(output.tool_duration_s is None for output in outputs), len(outputs)


def _number(text: str) -> float | None:
    """A finite number of at least 0, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
