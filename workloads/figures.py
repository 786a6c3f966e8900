"""Figures of measured turns, as pure functions: percentiles, cache by prompt depth, speculation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whiflash_workloads.speculation import breakdown, by_drafter, plain

if TYPE_CHECKING:
    from whiflash_workloads.report import Totals, Turn

PERCENTILES = (50, 95, 99)
DEPTHS = (1, 2, 4, 8, 16)
"""Upper bounds of the turn number buckets; a last bucket takes all deeper turns."""
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def latencies(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """Name -> sorted values in milliseconds."""
    seconds: dict[str, Iterable[float | None]] = {
        "ttft_ms": (turn.ttft_s for turn in turns),
        "tpot_ms": (turn.tpot_s for turn in turns),
        "itl_ms": (gap for turn in turns for gap in turn.gaps_s),
        "e2e_ms": (turn.e2e_s for turn in turns),
    }
    return {name: sorted(1000 * each for each in values if each is not None) for name, values in seconds.items()}


def quantiles(values: Sequence[float]) -> list[float]:
    """Percentiles 0 to 100 of sorted values; empty without values."""
    if not values:
        return []
    inner = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else list(values) * 99
    return [round(value, 3) for value in (values[0], *inner, values[-1])]


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """`{name}_p50` etc. of sorted values; None without values."""
    cuts = quantiles(values)
    return {f"{name}_p{percent}": cuts[percent] if cuts else None for percent in PERCENTILES}


def by_depth(turns: Iterable[Turn]) -> dict[str, dict[str, Any]]:
    """Prompt tokens, cached tokens and TTFT by the turn's number in its session."""
    buckets: dict[str, list[Turn]] = {label: [] for label in depth_labels()}
    for turn in turns:
        buckets[depth_label(turn.depth)].append(turn)
    return {label: _depth_figures(found) for label, found in buckets.items() if found}


def _depth_figures(turns: Sequence[Turn]) -> dict[str, Any]:
    prompt, cached = sum(turn.prompt_tokens for turn in turns), sum(turn.cached_tokens for turn in turns)
    ttft_ms = latencies(turns)["ttft_ms"]
    return {
        "turns": len(turns),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "cached_share": round(cached / prompt, 4) if prompt else None,
        "ttft_ms_p50": percentiles("ttft_ms", ttft_ms)["ttft_ms_p50"],
    }


def depth_labels() -> list[str]:
    """1, 2, 3-4, 5-8, 9-16, 17+"""
    ends = zip((0, *DEPTHS), DEPTHS, strict=False)
    return [*(f"{last}" if first + 1 == last else f"{first + 1}-{last}" for first, last in ends), f"{DEPTHS[-1] + 1}+"]


def depth_label(depth: int) -> str:
    """The bucket of turn number `depth`, from 1."""
    return depth_labels()[sum(depth > last for last in DEPTHS)]


def acceptance_length(turns: Sequence[Turn]) -> float | None:
    """Acceptance length over the turns that have figures; None without any."""
    known = [turn.speculation for turn in turns if turn.speculation is not None]
    rounds = sum(each.rounds for each in known)
    accepted = sum(sum(each.accepted_by_drafter.values()) for each in known)
    return round(1 + accepted / rounds, 3) if rounds else None


def speculation(turns: Sequence[Turn], totals: Totals | None) -> dict[str, Any]:
    """AL by drafter, span, context kind and tool, over turns with figures. Without any, by drafter from the totals."""
    known = [turn.speculation for turn in turns if turn.speculation is not None]
    found = breakdown(known)
    if not known and totals is not None:
        accepted: Mapping[str, int] = totals.get("accepted_by_drafter", {})
        found["by_drafter"] = plain(by_drafter(totals["rounds_by_drafter"], accepted)) if accepted else {}
    return {"turns": len(known), **found}
