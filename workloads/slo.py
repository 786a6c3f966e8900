"""Service-level objectives: limits per turn, and the share and rate of turns that meet all of them (goodput).

    --slo ttft_ms=500,tpot_ms=30,e2e_ms=4000

A failed turn meets none. A limit on a time that a turn does not have (TPOT of a one-token answer) is met.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whiflash_workloads.report import Turn

Limits = Mapping[str, float]
"""Name -> milliseconds."""
NAMES = ("ttft_ms", "tpot_ms", "e2e_ms")


def parse(text: str) -> dict[str, float]:
    """Parse `ttft_ms=500,e2e_ms=4000`. Raises ValueError, which names the part and the fix."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in NAMES:
            raise ValueError(f"`{name}` is not an objective; use {', '.join(f'{each}=MS' for each in NAMES)}")
        if name in limits:
            raise ValueError(f"`{name}` is given twice; give it once")
        limits[name] = _milliseconds(name, value)
    return limits


def _milliseconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}={text}`: `{text}` is not a number of milliseconds above 0; give e.g. {name}=500")
    return value


def keeps(turn: Turn, limits: Limits) -> bool:
    """Whether a turn meets all limits."""
    times = {"ttft_ms": turn.ttft_s, "tpot_ms": turn.tpot_s, "e2e_ms": turn.e2e_s}
    if turn.error is not None:
        return False
    return all(seconds is None or 1000 * seconds <= limits[name] for name, seconds in times.items() if name in limits)


def goodput(turns: Iterable[Turn], wall_s: float, limits: Limits) -> dict[str, Any]:
    """The number, share and rate per second of turns that meet all limits."""
    kept = [keeps(turn, limits) for turn in turns]
    good = sum(kept)
    return {
        "limits": dict(limits),
        "turns": good,
        "share": round(good / len(kept), 4) if kept else None,
        "turns_per_s": round(good / wall_s, 3) if wall_s else None,
    }
