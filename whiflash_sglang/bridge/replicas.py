"""Merge the figures of several replicas (`--dp-size`) of one HTTP server.

Each replica has its own KV pool, radix tree, drafters, measured costs, learned priors and counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = ("backlog_max",)
MEANS = ("backlog_mean", "round_ms", "not_drafted_share")  # unweighted, over replicas


def together(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the figures (`Totals.snapshot`) of all replicas: sum, max or mean by key."""
    keys = dict.fromkeys(key for figures in replicas for key in figures)
    result: dict[str, Any] = {}
    for key in keys:
        values = [figures[key] for figures in replicas if key in figures]
        if key in LARGEST:
            result[key] = max(values)
        else:
            result[key] = _over(values, len(values) if key in MEANS else 1)
    return result


def _over(values: Sequence[Any], divisor: int) -> Any:
    """The sum of numbers, or by key of (nested) dicts, divided by `divisor`."""
    if not isinstance(values[0], Mapping):
        total = sum(values)
        return total if divisor == 1 else round(total / divisor, 4)
    keys = dict.fromkeys(key for value in values for key in value)
    return {key: _over([value[key] for value in values if key in value], divisor) for key in keys}
