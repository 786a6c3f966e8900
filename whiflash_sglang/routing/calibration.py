"""The output of `python -m whiflash_sglang.calibrate`, a file that the server reads (`--whiflash-calibration`).

    {"format": "whiflash-calibration", "format_version": 1, "models": {identity.py}, "sessions": 48,
     "acceptance_length": {"df": 5.1, "e3": 4.9},
     "entropy": {"threshold": 0.1, "edges": [0.003, 0.1], "gains": [-1.5, -0.2, 1.9]},
     "neural": {"threshold": 0.4} or null, ...}

`gains` [k + 1] are the mean gains of EAGLE-3 over DFlash in accepted tokens, for entropies below, between and above the
ascending `edges` [k], in nats. Thresholds maximize tokens per millisecond on the machine of `costs_ms`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.routing.costs import Table, is_table
from whiflash_sglang.routing.identity import Identity, parsing
from whiflash_sglang.startup.config import FLAG_CALIBRATION

FORMAT, FORMAT_VERSION = "whiflash-calibration", 1


@dataclass(frozen=True)
class Calibration:
    """The fields of the file that the server uses."""

    acceptance_length: Mapping[str, float]  # by drafter
    entropy_threshold: float  # nats
    edges: tuple[float, ...]  # nats
    gains: tuple[float, ...]  # tokens
    neural_threshold: float | None  # tokens; None if no neural router was calibrated
    costs_ms: Table | None = None  # of the machine that calibrated


def load_calibration(path: str, identity: Identity) -> Calibration:
    """Read a calibration and check that it fits the models. Raises CheckpointError."""
    fix = "create one with `python -m whiflash_sglang.calibrate`"
    content = identity.read(FLAG_CALIBRATION, path, FORMAT, FORMAT_VERSION, fix)
    with parsing(FLAG_CALIBRATION, path):
        calibration = _parse(content)
    numbers = (*calibration.acceptance_length.values(), calibration.entropy_threshold, *calibration.edges)
    if not all(map(math.isfinite, (*numbers, *calibration.gains, calibration.neural_threshold or 0.0))):
        raise CheckpointError(FLAG_CALIBRATION, path, "holds NaN or infinite values", "create it again")
    if calibration.costs_ms is not None and not is_table(calibration.costs_ms):
        problem = "`costs_ms` must hold positive numbers by drafter, batch size and context"
        raise CheckpointError(FLAG_CALIBRATION, path, problem, "create it again")
    if len(calibration.gains) != len(calibration.edges) + 1 or any(a >= b for a, b in pairwise(calibration.edges)):
        problem = "`entropy` needs ascending edges and one more gain than edges"
        raise CheckpointError(FLAG_CALIBRATION, path, problem, "create it again")
    return calibration


def _parse(content: Mapping[str, Any]) -> Calibration:
    entropy, neural = content["entropy"], content["neural"]
    return Calibration(
        acceptance_length={name: float(content["acceptance_length"][name]) for name in ("df", "e3")},
        entropy_threshold=float(entropy["threshold"]),
        edges=tuple(map(float, entropy["edges"])),
        gains=tuple(map(float, entropy["gains"])),
        neural_threshold=None if neural is None else float(neural["threshold"]),
        costs_ms=content.get("costs_ms"),
    )


def save_calibration(file: Path, calibration: Calibration, identity: Identity, **about: Any) -> None:
    """Write the file. `about`: more fields for the reader, such as sessions, costs and results by threshold."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "models": identity.to_json(),
        "acceptance_length": dict(calibration.acceptance_length),
        "entropy": {
            "threshold": calibration.entropy_threshold,
            "edges": list(calibration.edges),
            "gains": list(calibration.gains),
        },
        "neural": None if calibration.neural_threshold is None else {"threshold": calibration.neural_threshold},
        **about,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
