"""What a recorder keeps of sessions does not grow with the weeks that it runs."""

from __future__ import annotations

from typing import Any

import pytest

from whiflash_workloads.record import sessions
from whiflash_workloads.record.sessions import FORGET_AFTER_S, SessionBook

REPLY = {"role": "assistant", "content": "yes"}


def first(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"question {number}"}]


def ask(book: SessionBook, messages: list[dict[str, Any]], now: float) -> tuple[str, int]:
    """A request that is answered at once."""
    opened = book.open(None, [], messages)
    session, part = book.place(opened)
    book.advance(opened, session, part, REPLY, now)
    return session, part


def further(number: int) -> list[dict[str, Any]]:
    return [*first(number), REPLY, {"role": "user", "content": "and then?"}]


def test_a_session_that_nobody_goes_on_with_is_forgotten_after_a_day() -> None:
    book = SessionBook()
    for number in range(100):
        ask(book, first(number), now=float(number))
    late = 50.0 + FORGET_AFTER_S
    assert ask(book, further(80), late) == ("session-81", 1)
    assert len(book._tips) == 50, "those of the last day"
    assert ask(book, further(10), late) == ("session-101", 0), "a session of its own"
    assert ask(book, further(90), late) == ("session-91", 1)


def test_no_more_sessions_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_TIPS", 10)
    book = SessionBook()
    for number in range(1000):
        ask(book, first(number), now=float(number))
        if number % 7 == 0:  # one that fails and is tried again
            book.release(book.open(None, [], further(number)))
        assert len(book._tips) <= 10
    assert ask(book, further(995), 1000.0) == ("session-996", 1)
    assert ask(book, further(5), 1000.0) == ("session-1001", 0)
