"""Round costs: milliseconds by part of the round, batch size and context length.

A round consists of its drafts and the rest (route, catch-up, verify, accept, commit). The rest depends on the verify
width, and so on the widest drafter of the round. `none` is a round without drafts, of width 1:

    round_ms({"df": 3, "e3": 1}, num_rows=4, context=900) = draft["df"](3) + draft["e3"](1) + rest["df"](4)

Both are measured at startup at a few batch sizes and contexts (`measure`), with linear interpolation and extrapolation.
While serving, rounds correct the cells that they touch (`observe`) in proportion to each cell's variance. A cell that
serving has not seen moves at once; a cell that was confirmed often moves slowly. The machine's speed varies as a whole,
so a deviation of sure cells mostly changes a common factor (`speed`). This is a Kalman filter whose state is the table
and the speed. It recovers from a wrong table within a few rounds of each kind.

Cells bound each other. Time never decreases with rows, width or context, and grows at most in proportion:

    v[i] <= v[j] * product over the three of max(1, i / j)          for all cells i, j of one part

A pause of the machine only increases a measurement, so at startup every cell is lowered to the bound from the others.
While serving, unsure cells are kept within the bounds from sure ones.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

NONE = "none"

BATCH_SIZES = (1, 4, 16, 64)
CONTEXTS = (256, 1024, 4096)  # attention time is linear in the context once KV exceeds the caches
MAX_PASSES = 5  # over the whole table at startup
BUDGET_S = 6.0  # seconds of measured rounds; the overhead adds about half as much

SURE = 3.0  # rounds seen, from which a cell is sure
_MAX_SEEN = 20.0  # rounds; bounds a cell's certainty
_NOISE = 0.3  # standard deviation of a round's time, relative
_SPEED = 0.3  # standard deviation of the machine's speed between rounds, relative
_OUTLIER = 1.2  # factor; larger deviations of sure cells are clipped to it, as pauses
_DISTURBED = 1.3  # factor between the two fastest runs of a cell, above which measurements are disturbed
WRONG = 2.0  # factor between a round and unsure cells, above which the cells were wrong


class Cell:
    """One entry of the table: milliseconds, and the number of served rounds that confirm it."""

    __slots__ = ("ms", "seen")

    def __init__(self, ms: float = 0.0):
        self.ms = ms
        self.seen = 0.0


class Grid:
    """The cells [context][batch size] of one part of a round, for one drafter."""

    def __init__(self, width: int, batch_sizes: Sequence[int], contexts: Sequence[int]):
        self.width = width
        self.batch_sizes, self.contexts = tuple(batch_sizes), tuple(contexts)
        self.cells = [[Cell() for _ in self.batch_sizes] for _ in self.contexts]

    def cell(self, num_rows: int, context: int) -> Cell:
        """The cell of a batch size and context of the table."""
        return self.cells[self.contexts.index(context)][self.batch_sizes.index(num_rows)]

    def at(self, num_rows: int, context: float) -> float:
        """Milliseconds, interpolated or extrapolated."""
        column = _first_at_or_above(self.batch_sizes, num_rows)
        by_context = [on_line(self.batch_sizes, [cell.ms for cell in cells], num_rows, column) for cells in self.cells]
        return on_line(self.contexts, by_context, context, _first_at_or_above(self.contexts, context))

    def around(self, num_rows: int, context: float) -> Iterator[tuple[Cell, float]]:
        """The cells that `at` interpolates between, with their weights; the outermost ones beyond the table."""
        for row, down in _weights(self.contexts, context):
            for column, across in _weights(self.batch_sizes, num_rows):
                yield self.cells[row][column], down * across

    def places(self) -> Iterator[tuple[Cell, tuple[int, int, int]]]:
        """Every cell with its coordinates."""
        for context, cells in zip(self.contexts, self.cells, strict=True):
            for num_rows, cell in zip(self.batch_sizes, cells, strict=True):
                yield cell, (self.width, num_rows, context)


class RoundCosts:
    """The cost table. `widths`: verify width by drafter. Cells are zero until `set_round` or `measure` fills them.

    `observe` updates it while serving. `disturbed` is the reason if startup could not measure it well, else None.
    """

    def __init__(self, widths: Mapping[str, int], batch_sizes: Sequence[int], contexts: Sequence[int]):
        self.widths = {**widths, NONE: 1}
        self.batch_sizes, self.contexts = tuple(batch_sizes), tuple(contexts)
        self.draft = {name: Grid(1, batch_sizes, contexts) for name in widths}
        self.rest = {name: Grid(width, batch_sizes, contexts) for name, width in self.widths.items()}
        self.speed = 1.0
        self.disturbed: str | None = None
        self.num_wrong = 0  # rounds for which unsure cells were off by more than WRONG

    def set_round(self, name: str, num_rows: int, context: int, draft_ms: float, rest_ms: float) -> None:
        """Set the cells of a round with all `num_rows` rows at `name`. `num_rows` and `context` are the table's."""
        self.rest[name].cell(num_rows, context).ms = rest_ms
        if name != NONE:
            self.draft[name].cell(num_rows, context).ms = draft_ms

    def round_ms(self, counts: Mapping[str, int], num_rows: int, context: float) -> float:
        """Expected wall time of a round of `num_rows` rows. `counts`: rows drafted for, by drafter."""
        return self.speed * sum(grid.at(rows, context) for grid, rows in self._parts(counts, num_rows))

    def observe(
        self, counts: Mapping[str, int], num_rows: int, context: float, ms: float, probed: Mapping[str, int] = {}
    ) -> float:
        """Correct the table by a round that took `ms`. Returns the ratio of `ms` to the expected time.

        `probed`: rows drafted for but not verified, by drafter (`types.Probe`).
        """
        parts = [*self._parts(counts, num_rows), *((self.draft[name], rows) for name, rows in probed.items())]
        expected = sum(grid.at(rows, context) for grid, rows in parts)
        off_by = ms / max(self.speed * expected, 1e-9)
        bounded = min(_OUTLIER, max(1 / _OUTLIER, off_by))
        touched = [found for grid, rows in parts for found in grid.around(rows, context)]
        is_sure = all(cell.seen >= SURE for cell, _ in touched)
        self.num_wrong += not is_sure and max(off_by, 1 / off_by) > WRONG
        seen_ms = expected * (bounded if is_sure else off_by)
        # A cell's variance decreases with the rounds seen. A tiny value is not surer than a plausible one.
        variances = [weight * max(cell.ms, seen_ms / 4) ** 2 / (1 + cell.seen) for cell, weight in touched]
        of_speed = (_SPEED * seen_ms) ** 2
        total = (_NOISE * seen_ms) ** 2 + of_speed
        total += sum(weight * variance for (_, weight), variance in zip(touched, variances, strict=True))
        for (cell, weight), variance in zip(touched, variances, strict=True):
            cell.ms = max(cell.ms + (seen_ms - expected) * variance / total, seen_ms / 1000)
            cell.seen = min(cell.seen + weight, _MAX_SEEN)
        self.speed *= 1 + (bounded - 1) * of_speed / total
        if any(cell.seen - weight < SURE <= cell.seen for cell, weight in touched):  # a newly sure cell bounds others
            self._bound_unsure()
        return off_by

    def is_sure(self, counts: Mapping[str, int], num_rows: int, context: float) -> bool:
        """Whether serving has confirmed all cells that `round_ms` uses for such a round."""
        return all(
            cell.seen >= SURE for grid, rows in self._parts(counts, num_rows) for cell, _ in grid.around(rows, context)
        )

    def tidy(self) -> float:
        """Lower every cell to the bound from the others. Returns the largest factor that a cell was lowered by."""
        most = 1.0
        for grids in self._families():
            places = [place for grid in grids for place in grid.places()]
            known = [(cell.ms, at) for cell, at in places]
            for cell, at in places:
                lowered = min(ms * _growth(other, at) for ms, other in known)
                if math.isfinite(cell.ms) and lowered > 0:
                    most = max(most, cell.ms / lowered)
                cell.ms = lowered
        return most

    def adopt(self, table: Table) -> None:
        """Take the shape of `table`, measured on a quiet machine. The scale is from our own measurements."""
        every = itertools.product(self.widths, self.batch_sizes, self.contexts)
        factors = {place: _read(table, *place) / self._arm_ms(*place) for place in every}
        scale = 1 / sorted(factors.values())[-1 - len(factors) // 4]  # disturbances only add time
        for (name, rows, context), factor in factors.items():
            for grids in (self.rest, self.draft):
                if name in grids:
                    grids[name].cell(rows, context).ms *= scale * factor

    def snapshot(self) -> Table:
        """Milliseconds of a round by drafter (`none`: no drafts), batch size and context."""
        return {
            name: {
                str(rows): {str(context): round(self._arm_ms(name, rows, context), 4) for context in self.contexts}
                for rows in self.batch_sizes
            }
            for name in self.widths
        }

    def health(self) -> dict[str, int]:
        """Counters for the totals: 1 if startup measured badly, and rounds for which unsure cells were wrong."""
        return {"disturbed": int(self.disturbed is not None), "wrong": self.num_wrong}

    def _arm_ms(self, name: str, num_rows: int, context: float) -> float:
        return self.round_ms({} if name == NONE else {name: num_rows}, num_rows, context)

    def _parts(self, counts: Mapping[str, int], num_rows: int) -> list[tuple[Grid, int]]:
        drafting = {name: rows for name, rows in counts.items() if rows}
        widest = max(drafting, key=self.widths.__getitem__, default=NONE)
        return [(self.rest[widest], num_rows), *((self.draft[name], rows) for name, rows in drafting.items())]

    def _families(self) -> list[list[Grid]]:
        """Grids whose cells bound each other."""
        return [list(self.rest.values()), *([grid] for grid in self.draft.values())]

    def _bound_unsure(self) -> None:
        for grids in self._families():
            places = [place for grid in grids for place in grid.places()]
            sure = [(cell.ms, at) for cell, at in places if cell.seen >= SURE]
            if sure:
                for cell, at in places:
                    if cell.seen < SURE:
                        most = min(ms * _growth(other, at) for ms, other in sure)
                        least = max(ms / _growth(at, other) for ms, other in sure)
                        cell.ms = max(min(cell.ms, most), min(least, most))


Table = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Milliseconds of a round by drafter, batch size and context, as from `RoundCosts.snapshot`."""


def is_table(value: object) -> bool:
    """Whether `value`, read from JSON, is a `Table` of positive numbers that includes `none`."""
    try:
        numbers = [
            (int(rows), int(context), ms)
            for by_rows in value.values()  # type: ignore[attr-defined]
            for rows, by_context in by_rows.items()
            for context, ms in by_context.items()
        ]
        complete = NONE in value and all(math.isfinite(number) and number > 0 for row in numbers for number in row)  # type: ignore[operator]
    except (AttributeError, TypeError, ValueError):
        return False
    return complete and bool(numbers)


def _growth(start: Sequence[int], end: Sequence[int]) -> float:
    """The maximum factor by which time can grow from one place to another."""
    return math.prod(max(1.0, b / a) for a, b in zip(start, end, strict=True))


def _first_at_or_above(knots: Sequence[int], x: float) -> int:
    """Index of the first knot at or above `x`, or of the last one."""
    return min(bisect_left(knots, x), len(knots) - 1)


def _weights(knots: Sequence[int], x: float) -> list[tuple[int, float]]:
    """Indices of the knots around `x` with interpolation weights, which sum to 1."""
    high = _first_at_or_above(knots, x)
    if x >= knots[high] or high == 0:
        return [(high, 1.0)]
    share = (x - knots[high - 1]) / (knots[high] - knots[high - 1])
    return [(high - 1, 1 - share), (high, share)]


def on_line(knots: Sequence[int], values: Sequence[float], x: float, index: int) -> float:
    """Interpolate `values` [knots] at `x`, or extrapolate from the two nearest knots.

    `index`: of the first knot at or above `x`, or the last one. The result is at least half of the smaller of the two
    values, since extrapolation from noisy values is unreliable.
    """
    if knots[index] == x or len(knots) == 1:
        return values[index]
    high = max(1, index)
    low = high - 1
    slope = (values[high] - values[low]) / (knots[high] - knots[low])
    return max(values[low] + slope * (x - knots[low]), min(values[low], values[high]) / 2)


def places(limit: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The ascending `candidates` below `limit`, and `limit` itself."""
    return (*(value for value in candidates if value < limit), limit)


def _read(table: Table, name: str, num_rows: int, context: float) -> float:
    """Interpolate a table that may have other batch sizes and contexts than ours."""
    by_rows = {int(rows): {int(at): ms for at, ms in row.items()} for rows, row in table[name].items()}
    batch_sizes, contexts = sorted(by_rows), sorted(next(iter(by_rows.values())))
    column, row = _first_at_or_above(batch_sizes, num_rows), _first_at_or_above(contexts, context)
    by_context = [on_line(batch_sizes, [by_rows[n][at] for n in batch_sizes], num_rows, column) for at in contexts]
    return on_line(contexts, by_context, context, row)


class Measured(NamedTuple):
    """Statistics of a measurement of the table."""

    seconds: float  # total of the rounds
    passes: int  # complete ones over the table
    lowered: float  # largest factor that a cell was lowered by (`RoundCosts.tidy`)
    scatter: float  # second fastest over fastest run of a cell, median over cells

    @property
    def disturbed(self) -> str | None:
        """Why the measurement is unreliable, or None."""
        if self.passes < 2:
            return f"the machine was too slow for two passes in {BUDGET_S:g} s of rounds"
        if self.scatter > _DISTURBED:
            return f"runs of the same round differed by a factor of {self.scatter:.2f}"
        if self.lowered > WRONG:
            return f"a round took {self.lowered:.1f} times the maximum consistent with the others"
        return None


def measure(
    costs: RoundCosts,
    run: Callable[[str, int, int], tuple[float, float]],
    progress: Callable[[float], None] = lambda share: None,
) -> Measured:
    """Fill the table.

    `run(drafter or none, rows, context)` runs one round and returns seconds of drafting and of the round. `progress` is
    called with the share done. Makes several passes over the table, so a pause of the machine affects different cells
    in each, and keeps each cell's fastest run. Stops after `BUDGET_S` seconds of rounds.
    """
    every = [(name, rows, at) for at in costs.contexts for rows in costs.batch_sizes for name in costs.widths]
    runs: dict[tuple[str, int, int], list[tuple[float, float]]] = {place: [] for place in every}
    # Seconds of rounds, not wall time: ranks agree on them (`Ranks.first`), and so on when to stop.
    spent, passes = 0.0, 0
    run(*every[0])  # warm-up: the first run also allocates
    for _ in range(MAX_PASSES):
        for done, place in enumerate(every):
            if spent > BUDGET_S:
                break
            runs[place].append(run(*place))
            spent += runs[place][-1][1]
            progress(max(spent / BUDGET_S, (passes + (done + 1) / len(every)) / MAX_PASSES))
        else:
            passes += 1
    for (name, rows, context), found in runs.items():
        draft_s, round_s = min(found, key=lambda seconds: seconds[1], default=(math.inf, math.inf))
        rest_s = round_s - draft_s if found else math.inf
        costs.set_round(name, rows, context, 1000 * draft_s, 1000 * rest_s)
    lowered = costs.tidy()
    pairs = [sorted(seconds for _, seconds in found)[:2] for found in runs.values() if len(found) > 1]
    scatter = median(second / quickest for quickest, second in pairs) if pairs else math.inf
    return Measured(spent, passes, lowered, scatter)
