"""Whether the models fit each other and the flags, from their files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup import bounds, command_line
from whiflash_sglang.startup.checkpoints import (
    DRAFTER_FLAGS,
    FLAG_TARGET,
    DrafterSpec,
    check_ranks,
    check_weights,
    load_drafter_spec,
    load_target_spec,
)
from whiflash_sglang.startup.config import FLAG_BACKLOG, FLAG_STEPS, WhiFlashConfig
from whiflash_sglang.startup.gpu_memory import FLAG_POOL
from whiflash_sglang.startup.refused_flags import FLAG_WIDTH


def check_checkpoints(
    config: WhiFlashConfig, target_path: str, asked_width: str | None, given: Mapping[str, Sequence[str]]
) -> int:
    """Return the verify width in tokens. Raises WhiFlashError for incomplete or mismatched models, and for pools that
    are too small."""
    target = load_target_spec(target_path)
    if command_line.last(given, "--load-format") in (None, "auto", "safetensors"):
        check_weights(FLAG_TARGET, target_path, needed=True)
    specs = [load_drafter_spec(path, name, target) for name, path in config.draft_paths.items()]
    width = _verify_width(config, specs, asked_width)
    check_room(width, given)
    num_ranks = int(command_line.last(given, "--tensor-parallel-size") or 1)
    for flag, path in {FLAG_TARGET: target_path, **{DRAFTER_FLAGS[spec.kind]: spec.path for spec in specs}}.items():
        check_ranks(flag, path, num_ranks)
    return width


def check_room(width: int, given: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if pool or context cannot hold one token and two windows of `width` tokens: the verified one,
    and the one that SGLang's admission reserves."""
    page = int(bounds.number("--page-size", command_line.last(given, "--page-size") or 1))
    needed = -(-(2 * width + 1) // page) * page
    for flag in (FLAG_POOL, "--context-length"):
        value = command_line.last(given, flag)
        if value is not None and bounds.number(flag, value) < needed:
            problem = (
                f"is too small for verify windows of {width} tokens" if width > 1 else "is too small for a request"
            )
            raise ConfigError(flag, value, problem, f"give {needed} or more, e.g. 4096, or leave it out")


def _verify_width(config: WhiFlashConfig, specs: Sequence[DrafterSpec], asked: str | None) -> int:
    """The verify width in tokens: the anchor and the longest draft of any drafter."""
    width = max(spec.block_size or 1 + config.eagle_steps for spec in specs)
    if config.max_backlog < width:
        problem = f"below the verify width, which is {width} for these drafters"
        raise ConfigError(FLAG_BACKLOG, config.max_backlog, problem, f"give {width} or more, e.g. 128")
    if asked is None:
        return width
    if not (asked.isascii() and asked.isdigit()):
        raise ConfigError(FLAG_WIDTH, asked, "not a whole number", f"drop the flag or use {width}")
    if int(asked) < width:
        problem = f"the drafters need a verify width of {width} (the DFlash block, or {FLAG_STEPS} + 1)"
        raise ConfigError(FLAG_WIDTH, asked, problem, f"drop the flag or use at least {width}")
    return int(asked)
