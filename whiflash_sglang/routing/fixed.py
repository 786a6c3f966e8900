"""Routers `fixed:e3` and `fixed:df`: one drafter in every round. The default if only one drafter is loaded."""

from __future__ import annotations

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan


class FixedRouter(Router):
    """The drafter `name` for all draftable rows."""

    def __init__(self, name: str):
        self.name = name

    def route(self, rows: HostRows) -> Plan:
        return where_allowed(rows, [self.name] * len(rows.slots))
