"""Printing for readers that may leave before the end (`| head`): that is no failure, and nothing is said of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import rich.console


class Console(rich.console.Console):
    """rich's, which would end the program where a reader has left."""

    def on_broken_pipe(self) -> None:
        raise  # called where BrokenPipeError is handled


@contextlib.contextmanager
def to_readers() -> Iterator[None]:
    """The end of a command, which prints what it has done. A reader that leaves ends the block quietly.

    Nothing but printing belongs in it. stdout goes nowhere from then on, as Python would fail once more when it ends.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
