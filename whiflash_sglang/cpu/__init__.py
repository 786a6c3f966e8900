"""SGLang's unmodified server on a machine without an accelerator.

    activate        entry point `sglang.srt.platforms`: whether to use this platform
    platform.py     the platform object: device, KV pool, allocator, attention backend, flag checks
    attention.py    the attention backend: prefill, decode, verify, draft block, vectorized over the batch
    metadata.py     slots and masks shared by the attention calls of one forward
    fallbacks.py    torch versions of helpers that SGLang has only for accelerators

On a machine with an accelerator the server imports only `activate`.
"""

from __future__ import annotations

import os

import torch

PLATFORM_CLASS = "whiflash_sglang.cpu.platform.WhiFlashCpuPlatform"


def activate() -> str | None:
    """The platform class's dotted path, or None if there is an accelerator or `SGLANG_USE_CPU_ENGINE=1`
    selects SGLang's own CPU engine (which needs its CPU kernels)."""
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return PLATFORM_CLASS
