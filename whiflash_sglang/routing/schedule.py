"""Policies that look at nothing: `alternate` (a switch every round, the worst case) and `random:SEED`."""

from __future__ import annotations

from collections.abc import Sequence

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan


class AlternateRouter(Router):
    """Each request goes through the drafters in turn, one a round."""

    def __init__(self, names: Sequence[str], num_slots: int):
        self.names = tuple(names)
        self.turns = [0] * num_slots

    def route(self, rows: HostRows) -> Plan:
        for slot in rows.slots:
            self.turns[slot] += 1
        return where_allowed(rows, [self.names[self.turns[slot] % len(self.names)] for slot in rows.slots])


class RandomRouter(Router):
    """A coin for each request and round: a hash of seed, request slot and length, so that a run can be repeated."""

    def __init__(self, names: Sequence[str], seed: int):
        self.names = tuple(names)
        self.salt = seed * 97 & 0xFFFFFFFF  # however long a number the seed is

    def route(self, rows: HostRows) -> Plan:
        coins = [self.coin(slot, length) for slot, length in zip(rows.slots, rows.prefix_lens, strict=True)]
        return where_allowed(rows, [self.names[coin % len(self.names)] for coin in coins])

    def coin(self, slot: int, length: int) -> int:
        mixed = (length * 2654435761 + slot * 40503 + self.salt) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
        return mixed ^ (mixed >> 16)
