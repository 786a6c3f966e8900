"""Policies that look at nothing: `alternate` (a switch every round, the worst case) and `random:SEED`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whiflash_sglang.round import Router
from whiflash_sglang.router.split import split
from whiflash_sglang.types import Plan, Rows


class AlternateRouter(Router):
    """Each request goes through the drafters in turn, one a round."""

    def __init__(self, names: Sequence[str], num_slots: int):
        self.names = tuple(names)
        self.turns = torch.zeros(num_slots, dtype=torch.int64)

    def route(self, rows: Rows) -> Plan:
        self.turns = self.turns.to(rows.slots.device)
        self.turns[rows.slots] += 1
        return split(rows, self.names, self.turns[rows.slots] % len(self.names))


class RandomRouter(Router):
    """A coin for each request and round: a hash of seed, request slot and length, so that a run can be repeated."""

    def __init__(self, names: Sequence[str], seed: int):
        self.names = tuple(names)
        self.salt = seed * 97 & 0xFFFFFFFF  # however long a number the seed is

    def route(self, rows: Rows) -> Plan:
        mixed = (rows.prefix_lens * 2654435761 + rows.slots * 40503 + self.salt) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
        return split(rows, self.names, (mixed ^ (mixed >> 16)) % len(self.names))
