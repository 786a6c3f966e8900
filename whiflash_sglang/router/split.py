"""From a choice per row to a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whiflash_sglang.types import Plan, Rows


def split(rows: Rows, names: Sequence[str], choice: torch.Tensor) -> Plan:
    """Rows grouped by `choice` [rows], an index into `names`; rows that may not be drafted for are left out."""
    may_draft = [True] * len(choice) if rows.draftable is None else rows.draftable.tolist()
    groups: dict[str, list[int]] = {name: [] for name in names}
    for row, drafter in enumerate(choice.tolist()):
        if may_draft[row]:
            groups[names[drafter]].append(row)
    return {name: torch.tensor(index, device=choice.device) for name, index in groups.items() if index}
