"""tau-bench results: a list of {task_id, trial, reward, traj}; `traj` are OpenAI messages, without tool schemas."""

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


def _convert(entry: Any, place: Place) -> Raw:
    if not isinstance(entry, dict) or not isinstance(entry.get("traj"), list):
        raise place.error("traj", "tau-bench needs a list of messages here")
    messages = [message(raw, place, f"traj[{i}]") for i, raw in enumerate(entry["traj"])]
    return own_record(f"tau-bench-{entry.get('task_id', place.number)}-{entry.get('trial', 0)}", "tau-bench", messages)
