"""Load recorded sessions from files in any supported format (workloads/formats).

The format is detected from a file's first record. A file is one JSON document (a record or a list of records) or JSON
lines with one record each.
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

FIX = f"fix the file, {SKIP}"
EMPTY = "give a file with at least one session"


@dataclass(frozen=True)
class Loaded:
    """Sessions in file order, and an error message for each skipped record."""

    sessions: tuple[Session, ...]
    skipped: tuple[str, ...] = ()
    changed: Mapping[str, int] = field(default_factory=dict)  # kind of conversion (adapted.py) -> count


def load_traces(paths: Sequence[Path | str], skip_bad: bool = False, limit: int | None = None) -> Loaded:
    """Load the sessions of all files, at most `limit`. Raises TraceError for a bad record, unless `skip_bad`."""
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
    # At the start of the file, or of a line if files were concatenated.
    text, marks = re.subn("^\ufeff", "", text, flags=re.MULTILINE)
    if marks:
        changed[BYTE_ORDER_MARK] += marks
    items = _items(path, text)
    first = next((item.value for item in items if isinstance(item, Record) and isinstance(item.value, dict)), None)
    name = format_of(first) if first is not None else None
    if name is not None:
        yield from reader(name)(path, items)
        return
    # If there are parse errors, they say more than "unknown format".
    yield from [item for item in items if isinstance(item, TraceError)] or [_of_no_format(path)]


def _encoding(path: Path) -> str:
    """UTF-8, or the encoding of the byte order mark, which stays in the text."""
    with path.open("rb") as file:
        start = file.read(2)
    return {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(start, "utf-8")


def _of_no_format(path: Path) -> TraceError:
    return TraceError(path, 1, "(file)", "has an unknown format", "see docs/traces.md for the supported formats")


def _items(path: Path, text: str) -> list[Item]:
    document = _whole_document(text)
    if document == [] or not text.strip():
        return [TraceError(path, 1, "(file)", "contains no sessions", EMPTY)]
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
    """The text as one JSON value, or None if it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unreadable(path: Path, text: str) -> TraceError:
    """The error for a file without a valid record: a broken JSON document, or an unknown format."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return TraceError(path, error.lineno, f"(column {error.colno})", f"not JSON: {error.msg}", FIX)
    except (ValueError, RecursionError) as error:  # a number that is too large, or nested too deeply
        return TraceError(path, 1, "(file)", f"not read: {error}", FIX)
    return _of_no_format(path)


def _parsed(path: Path, number: int, line: str) -> Item:
    try:
        return Record(number, "", json.loads(line))
    except json.JSONDecodeError as error:
        return TraceError(path, number, f"(column {error.colno})", f"not JSON: {error.msg}", FIX)
    except (ValueError, RecursionError) as error:  # a number that is too large, or nested too deeply
        return TraceError(path, number, "(line)", f"not read: {error}", FIX)
