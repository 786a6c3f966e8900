"""Entry point `sglang.srt.plugins`: SGLang calls `register` in each of its processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from whiflash_sglang import cpu
from whiflash_sglang.startup.config import ENVIRONMENT_VARIABLE

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def register() -> None:
    """Register the algorithm and the hooks, and the CPU fallbacks if our CPU platform is active."""
    if cpu.activate() is not None:
        from whiflash_sglang.cpu import fallbacks, memory

        fallbacks.install()
        memory.keep_freed_memory()
    if ENVIRONMENT_VARIABLE in os.environ:
        from whiflash_sglang.bridge.algorithm import register_algorithm
        from whiflash_sglang.bridge.scheduler_hooks import install_hooks

        register_algorithm(worker_class)
        install_hooks()


def worker_class(server_args: ServerArgs) -> type:
    """The worker class, imported lazily because only the scheduler needs it."""
    from whiflash_sglang.serving.worker import WhiFlashWorker

    return WhiFlashWorker
