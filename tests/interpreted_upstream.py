"""SGLang's own server with its own EAGLE3 or DFLASH on a CPU, as far as Triton's interpreter supports them.

    TRITON_INTERPRET=1 python -m tests.interpreted_upstream --model-path ... --speculative-algorithm=EAGLE3 ... \\
        --dtype=float32 --sampling-backend=pytorch --disable-cuda-graph --disable-overlap-schedule

Like `interpreted_gpu.py`, without WHIFLASH. SGLang's checks for CUDA before using Triton kernels are patched to true.
For draft trees it uses its Triton kernels for Intel GPUs, because those for CUDA are compiled. In bfloat16 the
interpreter produces wrong texts, hence --dtype=float32.
"""

from __future__ import annotations

import runpy
from typing import Any

from tests import interpreted_gpu


def install() -> None:
    """Install the replacements in this process and its forked children."""
    interpreted_gpu.install()
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.arg_groups import speculative_hook
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative import dflash_worker_v2, eagle_utils, eagle_worker_v2

    ModelRunner._extend_forward_kwargs = in_their_own_type(ModelRunner._extend_forward_kwargs)
    speculative_hook._handle_dflash = with_cuda_named(speculative_hook._handle_dflash)
    cache_locs._is_cuda = True  # slots of a verify window
    eagle_utils._is_xpu = True  # building and walking a draft tree
    eagle_worker_v2._is_cuda = True  # the best token of a draft step
    dflash_worker_v2.is_cuda = lambda: True  # a block's inputs, K and V of its features, its acceptance


def with_cuda_named(handle: Any) -> Any:
    """Wrap `handle(server_args)`, which checks the device's name only to reject others than CUDA."""

    def handle_named(server_args: Any) -> None:
        device, server_args.device = server_args.device, "cuda"
        try:
            handle(server_args)
        finally:
            server_args.device = device

    return handle_named


def in_their_own_type(arguments: Any) -> Any:
    """Wrap `_extend_forward_kwargs(model_runner, forward_batch, proxies)` to keep embeddings in float32. SGLang
    converts them to bfloat16 for any model if a DFlash block is not replayed from a graph."""

    def arguments_in_their_own_type(model_runner: Any, forward_batch: Any, proxies: Any) -> dict[str, Any]:
        found = arguments(model_runner, forward_batch, proxies)
        return found | {name: forward_batch.input_embeds for name in found if name == "input_embeds"}

    return arguments_in_their_own_type


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
