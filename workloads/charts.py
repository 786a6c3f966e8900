"""Geometry of the report's charts: values to percentages of a common scale. Pure functions; the template renders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Bar(NamedTuple):
    """One value as a bar. `share` is None if there is no value."""

    label: str
    shown: str
    share: float | None  # percent of the scale
    best: bool = False


class Tick(NamedTuple):
    """A labeled position on the scale."""

    shown: str
    at: float  # percent of the scale


class Strip(NamedTuple):
    """One distribution as a strip: thin p1 to p99, wider p5 to p95, widest p25 to p75, line at p50. In percent."""

    label: str
    shown: str
    p1: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float


class Panel(NamedTuple):
    """Strips on a common scale."""

    title: str
    strips: list[Strip]
    ticks: list[Tick]


def bars(values: Mapping[str, float | None], form: Callable[[float], str], best: str | None = None) -> list[Bar]:
    """One bar per label, scaled from 0 to the largest value. `best` marks the `max` or `min`, if given."""
    known = [value for value in values.values() if value is not None]
    top = max(known, default=0.0)
    winner = None if best is None or len(known) < 2 else (max if best == "max" else min)(known)
    return [
        Bar(label, "n/a", None) if value is None else Bar(label, form(value), percent(value, top), value == winner)
        for label, value in values.items()
    ]


def panel(title: str, quantiles: Mapping[str, Sequence[float]]) -> Panel:
    """Distributions of one quantity. `quantiles`: label -> percentiles 0 to 100; empty ones are dropped."""
    known = {label: cuts for label, cuts in quantiles.items() if cuts}
    ticks = scale(max((cuts[99] for cuts in known.values()), default=0.0))
    top = ticks[-1]
    strips = [
        Strip(
            label,
            " / ".join(number(cuts[p]) for p in (50, 95, 99)),
            *(percent(cuts[p], top) for p in (1, 5, 25, 50, 75, 95, 99)),
        )
        for label, cuts in known.items()
    ]
    return Panel(title, strips, [Tick(f"{tick:g}", percent(tick, top)) for tick in ticks])


def scale(top: float, steps: int = 4) -> list[float]:
    """About `steps` round numbers from 0 to at least `top`: scale(87) is 0, 25, 50, 75, 100."""
    if top <= 0:
        return [0.0, 1.0]
    rough = top / steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def percent(value: float, top: float) -> float:
    """`value` in percent of `top`, at most 100."""
    return round(min(100.0, 100 * value / top), 2) if top else 0.0


def number(value: float) -> str:
    """Format with three significant digits: 0.420, 4.20, 42.0, 4200."""
    if value == 0 or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}"
