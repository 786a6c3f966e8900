"""Which drafters may draft for which requests, given the NaNs and infinities they have produced.

A NaN or infinity in one row is first attributed to the request: an unusual prompt can overflow a float16 drafter. That
request continues without the drafter; other requests keep it. A drafter that fails `REQUESTS` requests within `WINDOW`
rounds is switched off for all. It is tried again for one round after `WINDOW` rounds. If that round is clean, the
drafter stays on. Otherwise the wait doubles. While off, it ingests like any idle drafter, so its KV has no gaps.

The text is not affected: a draft computed from NaN is a token like any other, and is verified.

Time is counted in rounds, so all ranks of a model decide alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from whiflash_sglang.core.types import Plan, RoundResult

REQUESTS = 3  # failed requests that switch a drafter off
WINDOW = 4096  # rounds in which they are counted, and until the first trial


class Health:
    """Failures per drafter and request, and the drafters that are switched off."""

    def __init__(self) -> None:
        self.rounds = 0
        self.failures: Counter[str] = Counter()  # rows with non-finite drafts, by drafter
        self.barred: defaultdict[str, set[int]] = defaultdict(set)  # request slots it failed on, by drafter
        self.failed: defaultdict[str, dict[str, int]] = defaultdict(dict)  # request id -> round, by drafter
        self.tried_at: dict[str, int] = {}  # round of the next trial, by switched-off drafter
        self.wait: dict[str, int] = {}  # length of the last off period in rounds, by drafter

    def begin(self, slots: Iterable[int]) -> None:
        """New requests are prefilled in these slots: clear the slots' failures."""
        for barred in self.barred.values():
            barred.difference_update(slots)

    def allows(self, name: str, slot: int) -> bool:
        """Whether a drafter may draft for the request in `slot`."""
        return slot not in self.barred.get(name, ()) and self.tried_at.get(name, 0) <= self.rounds

    def reroute(self, plan: Plan, slots: Sequence[int], names: Iterable[str]) -> Plan:
        """The plan with disallowed drafters replaced by the first allowed of `names`, or by None."""
        if not self.tried_at and not any(self.barred.values()):
            return plan
        return [
            None if name is None else next((other for other in (name, *names) if self.allows(other, slot)), None)
            for name, slot in zip(plan, slots, strict=True)
        ]

    def judge(self, result: RoundResult, slots: Sequence[int], requests: Sequence[str]) -> list[str]:
        """Count a round of the request ids `requests` [rows] in `slots` [rows]. Returns drafters switched off by it."""
        self.rounds += 1
        return [name for name, finite in result.finite.items() if self._fails(name, finite, result, slots, requests)]

    def switch_off(self, name: str) -> None:
        """Bar the drafter from all requests until its next trial. The wait doubles each time."""
        self.wait[name] = 2 * self.wait.get(name, WINDOW // 2)
        self.tried_at[name] = self.rounds + self.wait[name]
        self.failed[name].clear()
        self.barred[name].clear()

    def _fails(
        self, name: str, finite: Sequence[bool], result: RoundResult, slots: Sequence[int], requests: Sequence[str]
    ) -> bool:
        """Count a drafter's rows of a round. Returns whether this round switched it off."""
        drafted = [row for row, drafter in enumerate(result.plan) if drafter == name]
        rows = [row for row, is_finite in zip(drafted, finite, strict=True) if not is_finite]
        if not rows:
            self.tried_at.pop(name, None)
            return False
        self.failures[name] += len(rows)
        self.barred[name].update(slots[row] for row in rows)
        self.failed[name].update((requests[row], self.rounds) for row in rows)
        recent = {one: at for one, at in self.failed[name].items() if at > self.rounds - WINDOW}
        self.failed[name] = recent
        was_off = name in self.tried_at
        if was_off or len(recent) >= REQUESTS:
            self.switch_off(name)
        return not was_off and name in self.tried_at
