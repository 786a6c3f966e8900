"""Our own JSON lines (workloads/schema.py): whole sessions, or parts, which are merged here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from whiflash_workloads.formats import Item, Record
from whiflash_workloads.schema import SCHEMA_VERSION, SKIP, AssistantMessage, Message, Part, Session, TraceError, parse

NOT_IN_ORDER = f"keep the lines of a session in their original order, {SKIP}"


@dataclass
class _Growing:
    """A session whose parts are being read. In the output it has the position of its first part."""

    first: Part
    parts: int = 0
    messages: list[Message] = field(default_factory=list)

    def add(self, part: Part) -> None:
        if part.resent is not None:
            self.messages[-1] = self.messages[-1].model_copy(update={"resent": part.resent})
        self.messages += part.messages
        self.parts += 1

    def session(self) -> Session:
        return Session(
            schema_version=SCHEMA_VERSION,
            session_id=self.first.session_id,
            source=self.first.source,
            tools=self.first.tools,
            messages=self.messages,
        )


def read(path: Path, items: Iterable[Item]) -> Iterator[Session | TraceError]:
    """The reader of this format; see `formats`."""
    found: list[Session | TraceError | _Growing] = []
    growing: dict[str, _Growing] = {}
    for item in items:
        try:
            if isinstance(item, TraceError):
                raise item
            if isinstance(item.value, dict) and "part" in item.value:
                _add(path, item, growing, found)
            else:
                found.append(parse(Session, item.value, path, item.line, item.where))
        except TraceError as error:
            found.append(error)
    yield from (item.session() if isinstance(item, _Growing) else item for item in found)


def _add(path: Path, item: Record, growing: dict[str, _Growing], found: list[Session | TraceError | _Growing]) -> None:
    part = parse(Part, item.value, path, item.line, item.where)
    if not isinstance(part.messages[-1], AssistantMessage):
        raise TraceError(path, item.line, f"{item.where}messages", "does not end with the reply", NOT_IN_ORDER)
    if part.part == 0 and part.session_id not in growing:
        growing[part.session_id] = _Growing(part)
        found.append(growing[part.session_id])
    expected = growing[part.session_id].parts if part.session_id in growing else 0
    if part.part != expected:
        problem = f"is {part.part}, but the next part of session `{part.session_id}` is {expected}"
        raise TraceError(path, item.line, f"{item.where}part", problem, NOT_IN_ORDER)
    growing[part.session_id].add(part)
