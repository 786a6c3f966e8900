"""Routing policies: one a file, made by name.

A policy is asked once a round for the whole batch and decides for every row by itself. State it keeps is keyed by
request slot, in tensors sized at construction, so that a decision costs a handful of vectorised operations.
"""

from __future__ import annotations

from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.round import Router


def create_router(config: WhiFlashConfig, num_slots: int) -> Router:
    """The router that `--whiflash-router` names, for a table of `num_slots` request slots."""
    kind, _, argument = config.router.partition(":")
    return _FACTORIES[kind](config, argument, num_slots)


def _fixed(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.router.fixed import FixedRouter

    return FixedRouter(argument)


def _alternate(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.router.schedule import AlternateRouter

    return AlternateRouter(config.drafter_names, num_slots)


def _random(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.router.schedule import RandomRouter

    return RandomRouter(config.drafter_names, int(argument))


def _entropy(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.router.entropy import EntropyRouter

    return EntropyRouter(config.entropy_threshold, num_slots)


_FACTORIES = {"fixed": _fixed, "alternate": _alternate, "random": _random, "entropy": _entropy}
