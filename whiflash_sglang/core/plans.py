"""A plan read and written row by row, where a choice is looked at or changed for single rows."""

from __future__ import annotations

from collections.abc import Mapping

from whiflash_sglang.core.types import Plan


def drafter_by_row(plan: Plan) -> dict[int, str]:
    """Row -> drafter, for the rows that stand in the plan."""
    return {row: name for name, rows in plan.items() for row in rows}


def plan_of(choice: Mapping[int, str]) -> Plan:
    """The plan that gives each row of `choice` its drafter."""
    groups: dict[str, list[int]] = {}
    for row in sorted(choice):
        groups.setdefault(choice[row], []).append(row)
    return {name: tuple(rows) for name, rows in groups.items()}
