"""SGLang's own graph runner on a CPU: captured and replayed verify forwards are what eager ones are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_verify_forwards_are_captured_and_replayed(tmp_path):
    """In a process of its own, which imports Triton for its interpreter and makes SGLang's worker."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "tests.pretend_target", str(tmp_path)]
    environment = inherited | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "first width after the second" in result.stdout
