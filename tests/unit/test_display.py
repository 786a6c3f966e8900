"""What a replay shows while it runs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from whiflash_workloads.display import Display
from whiflash_workloads.report import Turn


def turn(error: str | None = None) -> Turn:
    return Turn("s", 2, "", 100, 40, 0 if error else 10, 0.1, 0.01, 0, False, error)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_for_terminals_and_failures_are_for_all(is_terminal: bool) -> None:
    file = io.StringIO()
    options: dict[str, Any] = {
        "file": file,
        "force_terminal": is_terminal,
        "width": 100,
        "soft_wrap": True,
        "highlight": False,
    }
    with Display(3, Console(**options)) as display:
        display.show(turn())
        display.show(turn("HTTP [500]"))
        display.bar.refresh()
    written = file.getvalue()
    assert "failed: s, message 2: HTTP [500]" in written
    assert ("2/3" in written and "10 tokens, 1 failed" in written) == is_terminal
