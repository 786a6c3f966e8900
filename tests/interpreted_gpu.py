"""The launcher, except that the server takes the ways of a GPU as far as Triton's interpreter goes.

    TRITON_INTERPRET=1 python -m tests.interpreted_gpu --demo ...

Target and drafters run on SGLang's `triton` attention backend, KV slots are reserved and read back by SGLang's
kernels, and drafters ingest by our own. What is left of the CPU platform: layers and memory. The interpreter takes some
50 ms for each program of a kernel, so that prompts have to be short.

A spawned scheduler imports the main module anew under the name `__mp_main__`: it is replaced there too.
"""

from __future__ import annotations

import os

BACKEND = "triton"
# Packed weights have no storage that a pretended graph could hold. They differ from plain ones in the last bit, so that
# a server that is compared with one from here takes this environment too.
PLAIN_WEIGHTS = {"WHIFLASH_PACK_WEIGHTS": "0"}
# Twins of SGLang's kernels: here the kernels themselves run.
KERNELS = ("assign_req_to_token_pool_func", "assign_extend_cache_locs_func", "get_last_loc")


def install() -> None:
    """Replace what the module's docstring names, in this process and those that are forked from it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("error: without TRITON_INTERPRET=1 Triton has no interpreter")
    import sglang  # noqa: F401  it looks for the platform while it is imported, and not before

    from whiflash_sglang.cpu import fallbacks, platform
    from whiflash_sglang.drafters import fused

    platform.ATTENTION_BACKEND = BACKEND
    platform.WhiFlashCpuPlatform.init_backend = lambda platform: None  # SGLang's own stays registered
    kept = [one for one in fallbacks.FALLBACKS if not one[0].endswith(KERNELS)]
    assert len(kept) == len(fallbacks.FALLBACKS) - len(KERNELS)
    fallbacks.FALLBACKS = tuple(kept)
    fused.DEVICES = ("cpu",)
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "0"  # the CPU platform spares these copies
    os.environ.update(PLAIN_WEIGHTS)


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    from whiflash_sglang import launch_server

    launch_server.main()
