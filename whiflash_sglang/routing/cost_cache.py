"""Cache of round costs from an earlier startup on a quiet machine, for startups with disturbed measurements.

One JSON file per combination of machine, versions, models and flags that affect costs, in
`$XDG_CACHE_HOME/whiflash/round-costs` (by default `~/.cache`). A file that cannot be read or written only logs a
warning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.routing.costs import Table, is_table

logger = logging.getLogger(__name__)


def machine() -> dict[str, Any]:
    """The properties of machine and software that round costs depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model()
    versions = {name: importlib.metadata.version(name) for name in ("whiflash-sglang", "sglang", "torch")}
    return {"device": device, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), **versions}


def cache_file(key: Mapping[str, Any]) -> Path:
    """The cache file of servers with this `key`, JSON data."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whiflash" / "round-costs"
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def load_table(file: Path) -> Table | None:
    """The table in `file`; None if it is missing or invalid."""
    try:
        table = json.loads(file.read_text())["round_ms"]
        if not is_table(table):
            raise ValueError("not a table of positive numbers")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("WHIFLASH: the cached round costs in %s cannot be used: %s", file, error)
        return None
    return table  # type: ignore[no-any-return]


def save_table(file: Path, table: Table, key: Mapping[str, Any]) -> None:
    """Write the table atomically."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"key": key, "round_ms": table}) + "\n")
        written.replace(file)
    except OSError as error:
        logger.warning("WHIFLASH: round costs cannot be cached in %s: %s", file, error)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
