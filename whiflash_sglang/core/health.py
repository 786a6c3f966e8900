"""Which drafters may draft for which requests, by how their arithmetic has fared.

A NaN or an infinity in one row is that request's own at first: an odd prompt, at which a drafter in float16 overflows.
The request goes on without the drafter, and all others with it. A drafter that fails several requests is broken itself
and is switched off for everyone. After a while it is tried for one round: it stays if that round is clean, and else the
next trial is twice as far away. Meanwhile it ingests what every idle drafter does, so that its KV has no holes.

The text is not affected either way: a draft that was made of NaN is a token like any other, and is verified.

Everything is counted in rounds, so that all ranks of a model decide alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from whiflash_sglang.core.types import Plan, RoundResult

REQUESTS = 3  # that a drafter has to fail ..
WINDOW = 4096  # .. within so many rounds to be switched off; it is tried again after as many


class Health:
    """What is known of each drafter's failures."""

    def __init__(self) -> None:
        self.rounds = 0
        self.failures: Counter[str] = Counter()  # rounds of a request whose drafts were not finite, by drafter
        self.barred: defaultdict[str, set[int]] = defaultdict(set)  # request slots that a drafter has failed
        self.failed: defaultdict[str, dict[str, int]] = defaultdict(dict)  # request id -> round, by drafter
        self.tried_at: dict[str, int] = {}  # of each drafter that is switched off: the round of its next trial
        self.wait: dict[str, int] = {}  # rounds that a drafter was switched off for last

    def begin(self, slots: Iterable[int]) -> None:
        """A prompt is prefilled in each of these request slots: no drafter has failed it yet."""
        for barred in self.barred.values():
            barred.difference_update(slots)

    def allows(self, name: str, slot: int) -> bool:
        """Whether a drafter may draft for the request in `slot`."""
        return slot not in self.barred.get(name, ()) and self.tried_at.get(name, 0) <= self.rounds

    def reroute(self, plan: Plan, slots: Sequence[int], names: Iterable[str]) -> Plan:
        """The plan without what is not allowed: such rows go to another of the drafters `names`, or to none."""
        if not self.tried_at and not any(self.barred.values()):
            return plan
        return [
            None if name is None else next((other for other in (name, *names) if self.allows(other, slot)), None)
            for name, slot in zip(plan, slots, strict=True)
        ]

    def judge(self, result: RoundResult, slots: Sequence[int], requests: Sequence[str]) -> list[str]:
        """Count a round of the requests `requests` [rows] in `slots` [rows]; the drafters that it switched off."""
        self.rounds += 1
        return [name for name, finite in result.finite.items() if self._fails(name, finite, result, slots, requests)]

    def switch_off(self, name: str) -> None:
        """Let the drafter draft for nobody until its next trial."""
        self.wait[name] = 2 * self.wait.get(name, WINDOW // 2)
        self.tried_at[name] = self.rounds + self.wait[name]
        self.failed[name].clear()
        self.barred[name].clear()

    def _fails(
        self, name: str, finite: Sequence[bool], result: RoundResult, slots: Sequence[int], requests: Sequence[str]
    ) -> bool:
        """Judge a drafter by its rows of a round; whether it is switched off now, and was not before."""
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
