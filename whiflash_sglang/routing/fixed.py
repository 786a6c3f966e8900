"""`fixed:e3`, `fixed:df`: one drafter for every round. The baselines, and the router of a single drafter."""

from __future__ import annotations

from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan
from whiflash_sglang.routing.split import split


class FixedRouter(Router):
    def __init__(self, name: str):
        self.name = name

    def route(self, rows: HostRows) -> Plan:
        return split(rows, (self.name,), [0] * len(rows.slots))
