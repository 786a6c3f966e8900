"""The launcher on a CPU, with the server's GPU code paths as far as Triton's interpreter supports them.

    TRITON_INTERPRET=1 python -m tests.interpreted_gpu --demo ...

Target and drafters use SGLang's `triton` attention backend, SGLang's kernels reserve and read KV slots, and drafters
ingest with our kernel. Layers and memory are still the CPU platform's. The interpreter takes about 50 ms per kernel
program, so prompts must be short.

A spawned scheduler imports the main module again as `__mp_main__`; the replacements are installed there, too.
"""

from __future__ import annotations

import os

BACKEND = "triton"
# Packed weights have no storage that a pretended graph could hold. They differ from plain ones in the last bit, so
# reference servers need this environment, too.
PLAIN_WEIGHTS = {"WHIFLASH_PACK_WEIGHTS": "0"}
# Fallbacks of SGLang's kernels that are not installed here: the kernels themselves run.
KERNELS = ("assign_req_to_token_pool_func", "assign_extend_cache_locs_func", "get_last_loc")


def install() -> None:
    """Install the replacements in this process and its forked children."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("error: without TRITON_INTERPRET=1 Triton has no interpreter")
    import sglang  # noqa: F401  it resolves the platform during import

    from whiflash_sglang.cpu import fallbacks, platform
    from whiflash_sglang.drafters import fused

    platform.ATTENTION_BACKEND = BACKEND
    platform.WhiFlashCpuPlatform.init_backend = lambda platform: None  # SGLang's own stays registered
    kept = [one for one in fallbacks.FALLBACKS if not one[0].endswith(KERNELS)]
    assert len(kept) == len(fallbacks.FALLBACKS) - len(KERNELS)
    fallbacks.FALLBACKS = tuple(kept)
    fused.DEVICES = ("cpu",)
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "0"  # the CPU platform skips these copies
    os.environ.update(PLAIN_WEIGHTS)


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    from whiflash_sglang import launch_server

    launch_server.main()
