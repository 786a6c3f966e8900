"""`fixed:e3`, `fixed:df`: one drafter for every round. The baselines, and the router of a single drafter."""

from __future__ import annotations

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan


class FixedRouter(Router):
    def __init__(self, name: str):
        self.name = name

    def route(self, rows: HostRows) -> Plan:
        return where_allowed(rows, [self.name] * len(rows.slots))
