"""SWE-agent trajectories (`.traj`): `history` has the messages, `trajectory` the steps with execution times.

A tool output names its call in `tool_call_ids`. Demonstrations (`is_demo`) are part of the prompt and not turns. Step
times are used only if there is one step per reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whiflash_workloads.formats import Item
from whiflash_workloads.formats.foreign import Place, Raw, each, message, own_record
from whiflash_workloads.schema import Session, TraceError


def read(path: Path, items: Iterable[Item]) -> Iterator[Session | TraceError]:
    """The reader of this format; see `formats`."""
    return each(path, items, _convert)


def _convert(document: Any, place: Place) -> Raw:
    if not isinstance(document, dict) or not isinstance(document.get("history"), list):
        raise place.error("history", "SWE-agent needs a list of messages here")
    history = document["history"]
    messages = [message(raw, place, f"history[{i}]", _answered(raw)) for i, raw in enumerate(history)]
    for raw, made in zip(history, messages, strict=True):
        if made["role"] == "assistant" and raw.get("is_demo"):
            made["asked"] = False
    _note_durations(messages, document.get("trajectory"))
    return own_record(f"swe-agent-{place.path.stem}", "swe-agent", messages)


def _answered(raw: Any) -> str | None:
    ids = raw.get("tool_call_ids") if isinstance(raw, dict) else None
    return ids[0] if isinstance(ids, list) and ids else None


def _note_durations(messages: list[Raw], steps: Any) -> None:
    """Set each tool output's duration to the execution time of its step."""
    seconds = (
        [step.get("execution_time") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    )
    replies = [made for made in messages if made["role"] == "assistant" and made.get("asked", True)]
    if len(seconds) != len(replies):
        return
    step = -1
    for made in messages:
        if made["role"] == "assistant" and made.get("asked", True):
            step += 1
        elif made["role"] == "tool" and step >= 0 and isinstance(seconds[step], int | float):
            made["tool_duration_s"] = seconds[step]
