"""What a round costs: milliseconds by part, batch size and context length.

A round is made of its drafts and of the rest (route, catch-up, verify, accept, commit), whose time goes with the verify
width and so with the widest drafter of the round; `none` stands for a round without drafts, of width 1:

    round_ms({"df": 3, "e3": 1}, num_rows=4, context=900) = draft["df"](3) + draft["e3"](1) + rest["df"](4)

Both are measured at start at a few batch sizes and contexts (`measure`), with lines between them and beyond, and are
corrected while serving by what rounds really take (`observe`). A machine gets slower and faster as a whole, so that
most of a deviation counts for all rounds of that many rows; what is left belongs, slowly, to the drafters of the
round.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

NONE = "none"

BATCH_SIZES = (1, 4, 16, 64)
CONTEXTS = (256, 1024, 4096)  # attention takes time in proportion to the context, once it leaves the caches
MAX_REPEATS, ENOUGH_SECONDS = 5, 0.15  # of one place of the table

_SPEED = 0.1  # of a round's deviation goes into the machine's speed
_CORRECTION = 0.03  # and this much into what its drafters cost
_OUTLIER = 2.0  # a round that deviates by more than this factor counts as one that deviates by it: a pause, not a cost


class RoundCosts:
    """`widths`: verify width by drafter; tables are empty until `set_round` has filled every place."""

    def __init__(self, widths: Mapping[str, int], batch_sizes: Sequence[int], contexts: Sequence[int]):
        self.widths = {**widths, NONE: 1}
        self.batch_sizes = tuple(batch_sizes)
        self.contexts = tuple(contexts)
        # [context][batch size], by drafter
        self.draft = {name: self._blank() for name in widths}
        self.rest = {name: self._blank() for name in self.widths}
        self.speed = [1.0] * len(batch_sizes)
        self.correction = {name: [1.0] * len(batch_sizes) for name in self.widths}  # by batch size

    def _blank(self) -> list[list[float]]:
        return [[0.0] * len(self.batch_sizes) for _ in self.contexts]

    def set_round(self, name: str, num_rows: int, context: int, draft_ms: float, rest_ms: float) -> None:
        """A measurement of rounds in which all of `num_rows` rows go to `name`; both must be places of the table."""
        place = self.contexts.index(context), self.batch_sizes.index(num_rows)
        self.rest[name][place[0]][place[1]] = rest_ms
        if name != NONE:
            self.draft[name][place[0]][place[1]] = draft_ms

    def round_ms(self, counts: Mapping[str, int], num_rows: int, context: float) -> float:
        """Expected wall time of a round of `num_rows` rows of which each drafter drafts for `counts`."""
        widest = self._widest(counts)
        total = self._at(self.rest[widest], widest, num_rows, context)
        for name, rows in counts.items():
            if rows:
                total += self._at(self.draft[name], name, rows, context)
        return total

    def observe(self, counts: Mapping[str, int], num_rows: int, context: float, ms: float) -> None:
        """Correct the table by a round that took `ms`."""
        ratio = ms / self.round_ms(counts, num_rows, context)
        ratio = min(_OUTLIER, max(1 / _OUTLIER, ratio))
        column = self._column(num_rows)
        self.speed[column] *= 1 + _SPEED * (ratio - 1)
        for name in {self._widest(counts), *(name for name, rows in counts.items() if rows)}:
            self.correction[name][column] *= 1 + _CORRECTION * (ratio - 1)

    def snapshot(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds of a round by drafter (`none`: without drafts), batch size and context."""
        return {
            name: {
                str(rows): {
                    str(context): round(self.round_ms({} if name == NONE else {name: rows}, rows, context), 4)
                    for context in self.contexts
                }
                for rows in self.batch_sizes
            }
            for name in self.widths
        }

    def _widest(self, counts: Mapping[str, int]) -> str:
        return max((name for name, rows in counts.items() if rows), key=self.widths.__getitem__, default=NONE)

    def _column(self, rows: int) -> int:
        """The first measured batch size that is not smaller, else the largest."""
        return min(bisect_left(self.batch_sizes, rows), len(self.batch_sizes) - 1)

    def _at(self, table: list[list[float]], name: str, num_rows: int, context: float) -> float:
        column = self._column(num_rows)
        by_context = [on_line(self.batch_sizes, values, num_rows, column) for values in table]
        row = min(bisect_left(self.contexts, context), len(self.contexts) - 1)
        measured = on_line(self.contexts, by_context, context, row)
        return measured * self.correction[name][column] * self.speed[column]


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


def measure(costs: RoundCosts, run: Callable[[str, int, int], tuple[float, float]]) -> float:
    """Fill the table by `run(drafter or none, rows, context)`, which runs one round and returns the seconds that its
    drafts took and those of all of it. Returns the seconds that this took."""
    began = time.perf_counter()
    for context in costs.contexts:
        for rows in costs.batch_sizes:
            for name in costs.widths:
                draft_s, round_s = quickest(lambda: run(name, rows, context))  # noqa: B023 (called at once)
                costs.set_round(name, rows, context, 1000 * draft_s, 1000 * (round_s - draft_s))
    return time.perf_counter() - began


def quickest(run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """The quickest of several runs, as whatever else the machine does only adds to it; few where they take long."""
    run()  # the first of a shape also allocates
    best, spent = run(), 0.0
    for _ in range(MAX_REPEATS - 1):
        spent += best[1]
        if spent > ENOUGH_SECONDS:
            break
        best = min(best, run(), key=lambda seconds: seconds[1])
    return best
