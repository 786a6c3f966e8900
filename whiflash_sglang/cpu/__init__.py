"""SGLang's unmodified server on a machine without an accelerator.

    activate        entry point `sglang.srt.platforms`: says whether this platform is wanted here
    platform.py     what SGLang asks a platform for: device, KV pool, allocator, attention backend, checked flags
    attention.py    the attention backend: prefill, decode, verify, draft block, vectorised over the batch
    metadata.py     what one forward's attention calls share: gathered slots and masks, computed once
    fallbacks.py    torch versions of helpers that SGLang has only for accelerators

On a machine with an accelerator nothing here is imported by the server except `activate`.
"""

from __future__ import annotations

import os

import torch

PLATFORM_CLASS = "whiflash_sglang.cpu.platform.WhiFlashCpuPlatform"


def activate() -> str | None:
    """Dotted path of the platform class where there is no accelerator, else None, which leaves SGLang to itself.

    `SGLANG_USE_CPU_ENGINE=1` asks for SGLang's own CPU engine (it needs its CPU kernels), so it is left alone too.
    """
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return PLATFORM_CLASS
