"""Drafters by name, one per file. Both files have the same order of methods for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whiflash_sglang.drafters.runner import DraftRunner


def _df(runner: DraftRunner, **kwargs: Any) -> Any:
    from whiflash_sglang.drafters.dflash import DFlashDrafter

    return DFlashDrafter(runner, **kwargs)


def _e3(runner: DraftRunner, **kwargs: Any) -> Any:
    from whiflash_sglang.drafters.eagle3 import Eagle3Drafter

    return Eagle3Drafter(runner, **kwargs)


DRAFTERS: dict[str, Callable[..., Any]] = {"df": _df, "e3": _e3}
