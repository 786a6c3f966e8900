"""Read recorded sessions from files, whatever format they are in (workloads/formats).

The format is told by the first record of a file. A file is one JSON document (a record, or a list of them) or JSON
lines, a record each.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whiflash_workloads.adapted import BYTE_ORDER_MARK
from whiflash_workloads.formats import Item, Record, format_of, reader
from whiflash_workloads.schema import SKIP, Session, TraceError

MEND = f"mend the file, {SKIP}"
EMPTY = "give a file with at least one session"


@dataclass(frozen=True)
class Loaded:
    """Sessions in file order, and a line for each record that was skipped."""

    sessions: tuple[Session, ...]
    skipped: tuple[str, ...] = ()
    changed: Mapping[str, int] = field(default_factory=dict)  # what is not as it was written, and how often


def load_traces(paths: Sequence[Path | str], skip_bad: bool = False, limit: int | None = None) -> Loaded:
    """The sessions of all files, or the first `limit` of them.

    A bad record raises TraceError, or with `skip_bad` is left out and counted.
    """
    sessions: list[Session] = []
    skipped: list[str] = []
    changed: Counter[str] = Counter()
    for path in map(Path, paths):
        for item in _read(path, changed):
            if isinstance(item, Session):
                sessions.append(item)
            elif skip_bad:
                skipped.append(str(item))
            else:
                raise item
    sessions = sessions[:limit]
    for session in sessions:
        changed.update(session.changed)
    return Loaded(tuple(sessions), tuple(skipped), dict(changed))


def _read(path: Path, changed: Counter[str]) -> Iterator[Session | TraceError]:
    try:
        text = path.read_text(encoding=_encoding(path))
    except OSError as error:
        yield TraceError(path, 0, "(file)", f"cannot be read ({error.strerror})", "give the path of a trace file")
        return
    except UnicodeDecodeError as error:
        yield TraceError(
            path, 0, "(file)", f"is not {error.encoding.upper()} ({error.reason})", "give a trace file in UTF-8"
        )
        return
    # At the start of a file, and of a line where files were joined.
    text, marks = re.subn("^\ufeff", "", text, flags=re.MULTILINE)
    if marks:
        changed[BYTE_ORDER_MARK] += marks
    items = _items(path, text)
    first = next((item.value for item in items if isinstance(item, Record) and isinstance(item.value, dict)), None)
    name = format_of(first) if first is not None else None
    if name is not None:
        yield from reader(name)(path, items)
        return
    # Without a record there may still be errors, which say more.
    yield from [item for item in items if isinstance(item, TraceError)] or [_of_no_format(path)]


def _encoding(path: Path) -> str:
    """UTF-8, or what a byte order mark says, which stays in the text."""
    with path.open("rb") as file:
        start = file.read(2)
    return {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(start, "utf-8")


def _of_no_format(path: Path) -> TraceError:
    return TraceError(path, 1, "(file)", "is in no trace format", "docs/traces.md lists the formats that are read")


def _items(path: Path, text: str) -> list[Item]:
    document = _whole_document(text)
    if document == [] or not text.strip():
        return [TraceError(path, 1, "(file)", "holds no session", EMPTY)]
    if isinstance(document, list) and isinstance(document[0], dict) and "role" in document[0]:
        return [Record(1, "", {"messages": document})]
    if isinstance(document, list):
        return [Record(1, f"[{i}].", entry) for i, entry in enumerate(document)]
    if isinstance(document, dict):
        return [Record(1, "", document)]
    if not any(isinstance(_whole_document(line), dict) for line in text.split("\n")):
        return [_unreadable(path, text)]
    return [_parsed(path, number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _whole_document(text: str) -> Any:
    """The text as one JSON value, or None where it is several of them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unreadable(path: Path, text: str) -> TraceError:
    """A file without a single line that is a record: one document, broken where JSON says."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return TraceError(path, error.lineno, f"(column {error.colno})", f"not JSON: {error.msg}", MEND)
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what can be read
        return TraceError(path, 1, "(file)", f"not read: {error}", MEND)
    return _of_no_format(path)


def _parsed(path: Path, number: int, line: str) -> Item:
    try:
        return Record(number, "", json.loads(line))
    except json.JSONDecodeError as error:
        return TraceError(path, number, f"(column {error.colno})", f"not JSON: {error.msg}", MEND)
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what can be read
        return TraceError(path, number, "(line)", f"not read: {error}", MEND)
