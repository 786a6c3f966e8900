"""OpenAI chat messages: a record is {messages, tools}, as in fine-tuning data and request bodies, or a message list.

Messages and tools (or `functions`) are taken verbatim. `session_id` or `id` names the session; other fields are
ignored. Every assistant message except a first one is a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whiflash_workloads.adapted import tools_of
from whiflash_workloads.formats import Item
from whiflash_workloads.formats.foreign import Place, Raw, each, own_record
from whiflash_workloads.schema import NOTED, Session, TraceError

SOURCE = "openai"


def read(path: Path, items: Iterable[Item]) -> Iterator[Session | TraceError]:
    """The reader of this format; see `formats`."""
    return each(path, items, _convert)


def _convert(record: Any, place: Place) -> Raw:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise place.error("messages", "a record needs a list of messages here")
    messages = [checked(raw, place, f"messages.{i}") for i, raw in enumerate(record["messages"])]
    name = record.get("session_id") or record.get("id") or f"{place.path.stem}-{place.number + 1}"
    tools, messages = tools_of(record, messages)
    return own_record(str(name), SOURCE, messages, tools)


def checked(raw: Any, place: Place, field: str) -> Raw:
    """`raw`, if it is an object without our own fields; else raises TraceError."""
    if not isinstance(raw, dict):
        raise place.error(field, "a message is a JSON object")
    if clash := sorted(raw.keys() & NOTED):
        raise place.error(f"{field}.{clash[0]}", "is a field of our own format, not of OpenAI's messages")
    return raw
