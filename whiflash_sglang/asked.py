"""What requests ask for comes before what the router chose, whichever router it is."""

from __future__ import annotations

import torch

from whiflash_sglang.hints import AUTO, OFF
from whiflash_sglang.types import Plan, Rows


def grant(rows: Rows, plan: Plan) -> Plan:
    """The plan with every row that wants a drafter (`Standing.route`) at that drafter, if it may be drafted for.

    Rows that want none are not draftable (`Ledger.stand`), so that no router has put them anywhere.
    """
    standings = rows.standings or ()
    wanted = {row: standing.route for row, standing in enumerate(standings) if standing.route not in (AUTO, OFF)}
    if rows.draftable is not None:
        wanted = {row: name for row, name in wanted.items() if bool(rows.draftable[row])}
    if not wanted:
        return plan
    choice = {row: name for name, index in plan.items() for row in index.tolist()} | wanted
    groups: dict[str, list[int]] = {}
    for row in sorted(choice):
        groups.setdefault(choice[row], []).append(row)
    return {name: torch.tensor(index, device=rows.slots.device) for name, index in groups.items()}
