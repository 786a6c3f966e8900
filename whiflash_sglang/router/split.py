"""From a choice per row to a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whiflash_sglang.types import Plan, Rows


def split(rows: Rows, names: Sequence[str], choice: torch.Tensor) -> Plan:
    """Rows grouped by `choice` [rows], an index into `names`; rows that may not be drafted for are left out."""
    if rows.draftable is not None:
        choice = torch.where(rows.draftable, choice, -1)
    groups = {name: (choice == i).nonzero()[:, 0] for i, name in enumerate(names)}
    return {name: index for name, index in groups.items() if len(index)}
