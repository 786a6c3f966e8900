"""A plan read and written row by row, where a choice is looked at or changed for single rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from whiflash_sglang.types import Plan


def drafter_by_row(plan: Plan) -> dict[int, str]:
    """Row -> drafter, for the rows that stand in the plan."""
    return {row: name for name, index in plan.items() for row in index.tolist()}


def plan_of(choice: Mapping[int, str], device: torch.device) -> Plan:
    """The plan that gives each row of `choice` its drafter."""
    groups: dict[str, list[int]] = {}
    for row in sorted(choice):
        groups.setdefault(choice[row], []).append(row)
    return {name: torch.tensor(index, device=device) for name, index in groups.items()}
