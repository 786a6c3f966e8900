"""Print to pipes that may be closed early (`| head`) without an error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import rich.console


class Console(rich.console.Console):
    """rich's Console, which would exit on a broken pipe."""

    def on_broken_pipe(self) -> None:
        raise  # re-raise the BrokenPipeError being handled


@contextlib.contextmanager
def to_readers() -> Iterator[None]:
    """Context for a command's final output. A closed pipe ends the block quietly; put only printing in it.

    Afterwards stdout is /dev/null, because Python would fail again on exit.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
