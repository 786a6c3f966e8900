"""Warns if the router skips drafting for nearly all rows."""

from __future__ import annotations

import time


class NotDrafted:
    """The share of draftable rows that went without drafts, over about the last `ROWS` rows.

    A cost-aware router skips drafting where it does not pay off. If that is nearly always, a warning is due: the
    drafters do not fit the text, or the costs are wrong.
    """

    ROWS, MUCH, EVERY_S = 1024, 0.9, 600.0

    def __init__(self) -> None:
        self.share = 0.0
        self.rows = 0
        self.next_warning = 0.0

    def count(self, num_rows: int, num_drafted: int) -> None:
        """Count a round with `num_rows` draftable rows."""
        if num_rows:
            self.rows += num_rows
            weight = min(1.0, num_rows / min(self.ROWS, self.rows))
            self.share += weight * (1 - num_drafted / num_rows - self.share)

    def is_due(self) -> bool:
        """Whether to warn now. True at most once per `EVERY_S` seconds."""
        if self.share < self.MUCH or self.rows < self.ROWS or time.monotonic() < self.next_warning:
            return False
        self.next_warning = time.monotonic() + self.EVERY_S
        return True

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the last {self.ROWS} rows were not drafted for: too few drafts of this text are "
            "accepted to pay for their time. See GET /whiflash/stats for acceptance by span and expected round costs "
            "(round_ms)"
        )
