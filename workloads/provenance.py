"""Provenance of a measurement: versions, commit and hardware, for the benchmarks' JSON lines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("whiflash-sglang", "sglang", "torch", "transformers", "openai")


def provenance() -> dict[str, Any]:
    """`versions` by package (None if not installed), `commit` (None outside a checkout), `hardware` (`gpu` may be
    None)."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    hardware = {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu_model()}
    return {"versions": versions, "commit": _commit(), "hardware": hardware}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu_model() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() or None
