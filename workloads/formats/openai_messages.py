"""OpenAI chat messages: a record is {messages, tools}, as for fine-tuning and as a request body; or a list of messages.

Messages and tools (or `functions`) are taken as they are written. `id` or `session_id` names the session, if there is
one; other fields are not read. Every assistant message that has something before it is a turn.
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
    return each(path, items, _convert)


def _convert(record: Any, place: Place) -> Raw:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise place.error("messages", "a record needs a list of messages here")
    messages = [checked(raw, place, f"messages.{i}") for i, raw in enumerate(record["messages"])]
    name = record.get("session_id") or record.get("id") or f"{place.path.stem}-{place.number + 1}"
    tools, messages = tools_of(record, messages)
    return own_record(str(name), SOURCE, messages, tools)


def checked(raw: Any, place: Place, field: str) -> Raw:
    """`raw` with none of the fields that we note beside OpenAI's."""
    if not isinstance(raw, dict):
        raise place.error(field, "a message is a JSON object")
    if clash := sorted(raw.keys() & NOTED):
        raise place.error(f"{field}.{clash[0]}", "is a field of our own format, not of OpenAI's messages")
    return raw
