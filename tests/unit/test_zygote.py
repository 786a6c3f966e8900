"""Which servers of tests are forked, and which are started by `python -m`."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from tests import zygote

LAUNCHER = "whiflash_sglang.launch_server"


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How a server with these variables, and this module, is started."""
    monkeypatch.setattr(zygote, "Forked", lambda module, arguments, output, late: ("forked", module, arguments, late))
    monkeypatch.setattr(zygote, "python_m", lambda command, output, variables: ("python -m", command, variables))

    def spawned(module: str = LAUNCHER, python: str = sys.executable, **changes: str) -> tuple[Any, ...]:
        variables = {"OMP_NUM_THREADS": "1", **os.environ, **changes}
        found: tuple[Any, ...] = zygote.spawn([python, "-m", module, "--port", "1"], None, variables)  # type: ignore[arg-type]
        return found

    return spawned


def test_variables_that_are_read_later_go_along(spawned: Any) -> None:
    how, module, arguments, late = spawned(WHIFLASH_TEST_DUMPS="folder")
    assert (how, module, arguments) == ("forked", LAUNCHER, ["--port", "1"])
    assert late["WHIFLASH_TEST_DUMPS"] == "folder" and "PATH" not in late


@pytest.mark.parametrize("changes", [{"SGLANG_TEST_RETRACT": "1"}, {"TRITON_INTERPRET": "1"}, {"OMP_NUM_THREADS": "2"}])
def test_variables_that_are_read_while_importing_need_a_real_start(spawned: Any, changes: dict[str, str]) -> None:
    how, command, variables = spawned(**changes)
    assert how == "python -m" and command[1:] == ["-m", LAUNCHER, "--port", "1"]
    assert variables.items() >= changes.items()


def test_other_programs_need_a_real_start(spawned: Any) -> None:
    assert spawned("tests.stubborn_server")[0] == spawned(python="/usr/bin/python3")[0] == "python -m"
