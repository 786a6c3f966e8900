"""Where a figure comes from: the versions and the commit that every benchmark's JSON line carries."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("whiflash-sglang", "openai", "sglang", "torch")


def provenance() -> dict[str, Any]:
    """`versions` of Python and what is installed here, and the `commit`; null for what there is none of."""
    versions = {name: _version(name) for name in DISTRIBUTIONS}
    return {"versions": {"python": platform.python_version(), **versions}, "commit": _commit()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD of the checkout that this file is in, and of no other that it happens to be installed in."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
