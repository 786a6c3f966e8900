"""SGLang's own graph runner on a CPU: captured and replayed verify forwards are what eager ones are."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("sglang")

from whiflash_workloads import server


@pytest.mark.slow
def test_verify_forwards_are_captured_and_replayed(tmp_path):
    """In a process of its own, with Triton for its interpreter, which makes SGLang's worker."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.pretend_target", str(tmp_path)]
    with log.open("wb") as output:
        process = server.spawn(command, output, {"TRITON_INTERPRET": "1"})
    try:
        assert process.wait(900) == 0, log.read_text()
    finally:
        process.terminate()
    assert "first width after the second" in log.read_text()
