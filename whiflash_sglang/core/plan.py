"""Plans: the drafter of each row, or None for a row without drafts."""

from __future__ import annotations

from collections.abc import Sequence

from whiflash_sglang.core.hints import AUTO, OFF
from whiflash_sglang.core.types import HostRows, Plan


def where_allowed(rows: HostRows, names: Sequence[str | None]) -> Plan:
    """`names` [rows] of drafters, with None for rows that are not draftable."""
    if rows.draftable is None:
        return [*names]
    return [name if may else None for name, may in zip(names, rows.draftable, strict=True)]


def granted(rows: HostRows, plan: Plan) -> Plan:
    """The plan with requested drafters (`RowState.route`) applied to draftable rows.

    Rows that request no drafts are not draftable (`Totals.with_states`), so no router plans a drafter for them.
    """
    states = rows.states or ()
    if all(state.route in (AUTO, OFF) for state in states):
        return plan
    wanted = [name if state.route in (AUTO, OFF) else state.route for name, state in zip(plan, states, strict=True)]
    return where_allowed(rows, wanted)


def grouped(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Row numbers by drafter, ascending. Rows without a drafter are left out."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(plan):
        if name is not None:
            groups.setdefault(name, []).append(row)
    return {name: tuple(rows) for name, rows in groups.items()}
