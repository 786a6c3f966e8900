"""Entry point `sglang.srt.plugins`: SGLang calls `register` in every process that it starts."""

from __future__ import annotations

import os

from whiflash_sglang import cpu
from whiflash_sglang.config import ENVIRONMENT_VARIABLE


def register() -> None:
    """Register the algorithm, the hooks and, where our CPU platform is the active one, what it needs."""
    if cpu.activate() is not None:
        from whiflash_sglang.cpu import memory, twins

        twins.install()
        memory.keep_freed_memory()
    if ENVIRONMENT_VARIABLE in os.environ:
        from whiflash_sglang import host

        host.register_algorithm()
        host.install_hooks()
