"""What a round costs: milliseconds by part, batch size and context length.

A round is made of its drafts and of the rest (route, catch-up, verify, accept, commit). The rest depends on the verify
width, and so on the widest drafter of the round; `none` is a round without drafts, of width 1:

    round_ms({"df": 3, "e3": 1}, num_rows=4, context=900) = draft["df"](3) + draft["e3"](1) + rest["df"](4)

Both are measured at start at a few batch sizes and contexts (`measure`), with lines between these places and beyond.
While serving, every round corrects the cells that it touched (`observe`), each by how unsure it is: a cell that serving
has never seen moves at once, one that was confirmed often moves slowly. The machine gets slower and faster as a whole,
so a deviation of sure cells mostly counts for all of them (`speed`). It is a Kalman filter whose state is the table and
the speed. So a table of nonsense is right again after a few rounds of each kind.

One fact bounds what a cell may say. Time never falls with rows, width or context, and grows at most in proportion:

    v[i] <= v[j] * product over the three of max(1, i / j)          for all cells i, j of one part

A pause of the machine only adds to a measurement, so at start every cell is lowered to what the others allow. While
serving, cells that were not seen yet are kept within what the confirmed ones allow.
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
CONTEXTS = (256, 1024, 4096)  # attention takes time in proportion to the context, once it leaves the caches
MAX_PASSES = 5  # over the whole table when it is measured
BUDGET_S = 6.0  # of measured rounds; what is around them takes about half as long again

SURE = 3.0  # rounds that confirm a cell
_MAX_SEEN = 20.0  # older rounds count no more
_NOISE = 0.3  # of a round's time, from one round to the next
_SPEED = 0.3  # by which the machine's speed may change meanwhile
_OUTLIER = 1.2  # a larger deviation is a pause where cells are sure, and counts as one of this factor
_DISTURBED = 1.3  # quickest and second quickest run of a cell differ by more
WRONG = 2.0  # serving found a cell to be off by more


class Cell:
    """One place of the table: milliseconds, and how many rounds of serving confirm them."""

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
        return self.cells[self.contexts.index(context)][self.batch_sizes.index(num_rows)]

    def at(self, num_rows: int, context: float) -> float:
        column = _first_at_or_above(self.batch_sizes, num_rows)
        by_context = [on_line(self.batch_sizes, [cell.ms for cell in cells], num_rows, column) for cells in self.cells]
        return on_line(self.contexts, by_context, context, _first_at_or_above(self.contexts, context))

    def around(self, num_rows: int, context: float) -> Iterator[tuple[Cell, float]]:
        """The cells that `at` reads between, each with its weight; beyond the table the last ones."""
        for row, down in _weights(self.contexts, context):
            for column, across in _weights(self.batch_sizes, num_rows):
                yield self.cells[row][column], down * across

    def places(self) -> Iterator[tuple[Cell, tuple[int, int, int]]]:
        """Every cell with its coordinates."""
        for context, cells in zip(self.contexts, self.cells, strict=True):
            for num_rows, cell in zip(self.batch_sizes, cells, strict=True):
                yield cell, (self.width, num_rows, context)


class RoundCosts:
    """`widths`: verify width by drafter. Cells are zero until `set_round` or `measure` has filled them.

    Written by `observe` while serving; `disturbed` says why the start could not measure them, or is None.
    """

    def __init__(self, widths: Mapping[str, int], batch_sizes: Sequence[int], contexts: Sequence[int]):
        self.widths = {**widths, NONE: 1}
        self.batch_sizes, self.contexts = tuple(batch_sizes), tuple(contexts)
        self.draft = {name: Grid(1, batch_sizes, contexts) for name in widths}
        self.rest = {name: Grid(width, batch_sizes, contexts) for name, width in self.widths.items()}
        self.speed = 1.0
        self.disturbed: str | None = None
        self.num_wrong = 0  # rounds that unsure cells were off by more than WRONG for

    def set_round(self, name: str, num_rows: int, context: int, draft_ms: float, rest_ms: float) -> None:
        """A measurement of rounds in which all of `num_rows` rows go to `name`; both must be places of the table."""
        self.rest[name].cell(num_rows, context).ms = rest_ms
        if name != NONE:
            self.draft[name].cell(num_rows, context).ms = draft_ms

    def round_ms(self, counts: Mapping[str, int], num_rows: int, context: float) -> float:
        """Expected wall time of a round of `num_rows` rows in which each drafter drafts for `counts` of them."""
        return self.speed * sum(grid.at(rows, context) for grid, rows in self._parts(counts, num_rows))

    def observe(
        self, counts: Mapping[str, int], num_rows: int, context: float, ms: float, probed: Mapping[str, int] = {}
    ) -> float:
        """Correct the table by a round that took `ms`. Returns ms over what the table expected.

        `probed`: rows that drafters drafted for without a place in the verify (`round.Probe`).
        """
        parts = [*self._parts(counts, num_rows), *((self.draft[name], rows) for name, rows in probed.items())]
        expected = sum(grid.at(rows, context) for grid, rows in parts)
        off_by = ms / max(self.speed * expected, 1e-9)
        bounded = min(_OUTLIER, max(1 / _OUTLIER, off_by))
        touched = [found for grid, rows in parts for found in grid.around(rows, context)]
        is_sure = all(cell.seen >= SURE for cell, _ in touched)
        self.num_wrong += not is_sure and max(off_by, 1 / off_by) > WRONG
        seen_ms = expected * (bounded if is_sure else off_by)
        # The variance of a cell falls with the rounds that confirm it. A tiny value is no surer than a plausible one.
        variances = [weight * max(cell.ms, seen_ms / 4) ** 2 / (1 + cell.seen) for cell, weight in touched]
        of_speed = (_SPEED * seen_ms) ** 2
        total = (_NOISE * seen_ms) ** 2 + of_speed
        total += sum(weight * variance for (_, weight), variance in zip(touched, variances, strict=True))
        for (cell, weight), variance in zip(touched, variances, strict=True):
            cell.ms = max(cell.ms + (seen_ms - expected) * variance / total, seen_ms / 1000)
            cell.seen = min(cell.seen + weight, _MAX_SEEN)
        self.speed *= 1 + (bounded - 1) * of_speed / total
        if any(cell.seen - weight < SURE <= cell.seen for cell, weight in touched):  # it bounds others from now on
            self._bound_unsure()
        return off_by

    def is_sure(self, counts: Mapping[str, int], num_rows: int, context: float) -> bool:
        """Whether serving has confirmed what `round_ms` says of such a round."""
        return all(
            cell.seen >= SURE for grid, rows in self._parts(counts, num_rows) for cell, _ in grid.around(rows, context)
        )

    def tidy(self) -> float:
        """Lower every cell to what the others allow; the largest factor by which one was lowered."""
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
        """Take the shape of `table`, of a quiet run, whose scale need not be this machine's."""
        every = itertools.product(self.widths, self.batch_sizes, self.contexts)
        factors = {place: _read(table, *place) / self._arm_ms(*place) for place in every}
        scale = 1 / sorted(factors.values())[-1 - len(factors) // 4]  # a disturbed measurement only adds
        for (name, rows, context), factor in factors.items():
            for grids in (self.rest, self.draft):
                if name in grids:
                    grids[name].cell(rows, context).ms *= scale * factor

    def snapshot(self) -> Table:
        """Milliseconds of a round by drafter (`none`: without drafts), batch size and context."""
        return {
            name: {
                str(rows): {str(context): round(self._arm_ms(name, rows, context), 4) for context in self.contexts}
                for rows in self.batch_sizes
            }
            for name in self.widths
        }

    def health(self) -> dict[str, int]:
        """What the totals show of the table: starts that could not measure it well, and rounds that found it wrong."""
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
"""Milliseconds of a round by drafter, batch size and context, as `RoundCosts.snapshot` gives them."""


def is_table(value: object) -> bool:
    """Whether `value`, from a file, is a table of positive numbers with a round without drafts in it."""
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
    """The most by which time can grow from one place to another."""
    return math.prod(max(1.0, b / a) for a, b in zip(start, end, strict=True))


def _first_at_or_above(knots: Sequence[int], x: float) -> int:
    """Index of the first knot at or above `x`, or of the last one."""
    return min(bisect_left(knots, x), len(knots) - 1)


def _weights(knots: Sequence[int], x: float) -> list[tuple[int, float]]:
    """The knots around `x` by index, with their weights, which add up to 1."""
    high = _first_at_or_above(knots, x)
    if x >= knots[high] or high == 0:
        return [(high, 1.0)]
    share = (x - knots[high - 1]) / (knots[high] - knots[high - 1])
    return [(high - 1, 1 - share), (high, share)]


def on_line(knots: Sequence[int], values: Sequence[float], x: float, index: int) -> float:
    """The value at `x` on the line through the knots around it; beyond them, on the line of the two nearest.

    `index` is that of the first knot at or above `x`, or of the last one. Never below half of the smaller value: a line
    through noisy values may point anywhere.
    """
    if knots[index] == x or len(knots) == 1:
        return values[index]
    high = max(1, index)
    low = high - 1
    slope = (values[high] - values[low]) / (knots[high] - knots[low])
    return max(values[low] + slope * (x - knots[low]), min(values[low], values[high]) / 2)


def places(limit: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """Those of the ascending `candidates` that are below `limit`, and `limit` itself."""
    return (*(value for value in candidates if value < limit), limit)


def _read(table: Table, name: str, num_rows: int, context: float) -> float:
    """A place of a table that may have been measured at other places than ours."""
    by_rows = {int(rows): {int(at): ms for at, ms in row.items()} for rows, row in table[name].items()}
    batch_sizes, contexts = sorted(by_rows), sorted(next(iter(by_rows.values())))
    column, row = _first_at_or_above(batch_sizes, num_rows), _first_at_or_above(contexts, context)
    by_context = [on_line(batch_sizes, [by_rows[n][at] for n in batch_sizes], num_rows, column) for at in contexts]
    return on_line(contexts, by_context, context, row)


class Measured(NamedTuple):
    """How a measurement went."""

    seconds: float  # of the rounds that were run
    passes: int  # whole ones, over all places
    lowered: float  # the largest factor by which a cell was lowered to what the others allow
    scatter: float  # second quickest over quickest run of a cell, the median over cells

    @property
    def disturbed(self) -> str | None:
        """What makes the figures doubtful, or None."""
        if self.passes < 2:
            return f"the machine was too slow for two passes in {BUDGET_S:g} s of rounds"
        if self.scatter > _DISTURBED:
            return f"runs of the same round differed by a factor of {self.scatter:.2f}"
        if self.lowered > WRONG:
            return f"a round took {self.lowered:.1f} times what the others allow"
        return None


def measure(
    costs: RoundCosts,
    run: Callable[[str, int, int], tuple[float, float]],
    progress: Callable[[float], None] = lambda share: None,
) -> Measured:
    """Fill the table by `run(drafter or none, rows, context)`, which runs one round and returns the seconds that its
    drafts took and those of all of it.

    The whole table is gone through several times, so a pause of the machine meets different cells each time. A cell
    takes its quickest run. Ends after `BUDGET_S` seconds of rounds. `progress` is told which share is done.
    """
    every = [(name, rows, at) for at in costs.contexts for rows in costs.batch_sizes for name in costs.widths]
    runs: dict[tuple[str, int, int], list[tuple[float, float]]] = {place: [] for place in every}
    # In seconds of rounds, not of the clock: ranks agree about the former (`Ranks.first`), and so on when to end.
    spent, passes = 0.0, 0
    run(*every[0])  # the first one of all also allocates
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
