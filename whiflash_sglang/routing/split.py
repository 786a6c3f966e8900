"""From a choice per row to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from whiflash_sglang.core.types import HostRows, Plan


def split(rows: HostRows, names: Sequence[str], choice: Sequence[int]) -> Plan:
    """Rows grouped by `choice` [rows], an index into `names`; rows that may not be drafted for are left out."""
    groups: dict[str, list[int]] = {name: [] for name in names}
    for row in rows.may_draft():
        groups[names[choice[row]]].append(row)
    return {name: tuple(group) for name, group in groups.items() if group}
