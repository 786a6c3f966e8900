"""What requests ask for comes before what the router chose, whichever router it is."""

from __future__ import annotations

from whiflash_sglang.core.hints import AUTO, OFF
from whiflash_sglang.core.plans import drafter_by_row, plan_of
from whiflash_sglang.core.types import HostRows, Plan


def grant(rows: HostRows, plan: Plan) -> Plan:
    """The plan with every row that wants a drafter (`Standing.route`) at that drafter, if it may be drafted for.

    Rows that want none are not draftable (`Ledger.stand`), so that no router has put them anywhere.
    """
    standings = rows.standings or ()
    wanted = {row: standing.route for row, standing in enumerate(standings) if standing.route not in (AUTO, OFF)}
    if not wanted:
        return plan
    may_draft = set(rows.may_draft())
    return plan_of(drafter_by_row(plan) | {row: name for row, name in wanted.items() if row in may_draft})
