"""Which servers of tests are forked, and which are started by `python -m`."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests import zygote

LAUNCHER = "whiflash_sglang.launch_server"


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How a server of this module that is given these variables is started."""
    monkeypatch.setattr(zygote, "Forked", lambda kind, module, arguments, output, late: (kind, module, arguments, late))
    monkeypatch.setattr(zygote, "python_m", lambda command, output, environment: ("python -m", command, environment))

    def spawned(module: str = LAUNCHER, python: str = sys.executable, **environment: str) -> Any:
        return zygote.spawn([python, "-m", module, "--port", "1"], None, environment)  # type: ignore[arg-type]

    return spawned


def test_variables_that_are_read_later_go_along(spawned: Any) -> None:
    kind, module, arguments, late = spawned(WHIFLASH_TEST_DUMPS="folder")
    assert (kind, module, arguments) == ("plain", LAUNCHER, ["--port", "1"])
    assert late["WHIFLASH_TEST_DUMPS"] == "folder" and late["WHIFLASH_PACK_WEIGHTS"] == "1" and "PATH" not in late


@pytest.mark.parametrize("changes", [{"SGLANG_TEST_RETRACT": "1"}, {"OMP_NUM_THREADS": "2"}])
def test_variables_that_are_read_while_importing_need_a_real_start(spawned: Any, changes: dict[str, str]) -> None:
    assert spawned(**changes) == ("python -m", [sys.executable, "-m", LAUNCHER, "--port", "1"], changes)


def test_servers_in_the_interpreter_come_from_another_process(spawned: Any) -> None:
    kind, *_, late = spawned("tests.pretend_cuda_graphs", TRITON_INTERPRET="1", PRETENDED_REPLAYS="file")
    assert kind == "interpreted" and late["PRETENDED_REPLAYS"] == "file"


def test_other_programs_need_a_real_start(spawned: Any) -> None:
    assert spawned("tests.stubborn_server")[0] == spawned(python="/usr/bin/python3")[0] == "python -m"
