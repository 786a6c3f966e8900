"""Routers without a score, for tests and baselines: `alternate` (switches every round) and `random:SEED`."""

from __future__ import annotations

from collections.abc import Sequence

from whiflash_sglang.core.plan import where_allowed
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan


class AlternateRouter(Router):
    """Each request cycles through the drafters, one per round."""

    def __init__(self, names: Sequence[str], num_slots: int):
        self.names = tuple(names)
        self.turns = [0] * num_slots

    def route(self, rows: HostRows) -> Plan:
        for slot in rows.slots:
            self.turns[slot] += 1
        return where_allowed(rows, [self.names[self.turns[slot] % len(self.names)] for slot in rows.slots])


class RandomRouter(Router):
    """A random drafter per request and round, reproducible: a hash of seed, request slot and length."""

    def __init__(self, names: Sequence[str], seed: int):
        self.names = tuple(names)
        self.salt = seed * 97 & 0xFFFFFFFF  # the seed may be any integer

    def route(self, rows: HostRows) -> Plan:
        coins = [self.coin(slot, length) for slot, length in zip(rows.slots, rows.prefix_lens, strict=True)]
        return where_allowed(rows, [self.names[coin % len(self.names)] for coin in coins])

    def coin(self, slot: int, length: int) -> int:
        """The hash, 32 bits."""
        mixed = (length * 2654435761 + slot * 40503 + self.salt) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
        return mixed ^ (mixed >> 16)
