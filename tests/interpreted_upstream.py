"""SGLang's own server with its own EAGLE3 or DFLASH, neither of which takes a CPU, as far as Triton's interpreter goes.

    TRITON_INTERPRET=1 python -m tests.interpreted_upstream --model-path ... --speculative-algorithm=EAGLE3 ... \\
        --dtype=float32 --sampling-backend=pytorch --disable-cuda-graph --disable-overlap-schedule

As `interpreted_gpu.py`, without WHIFLASH. Where SGLang asks whether there is CUDA before it takes a kernel of Triton's,
the answer is yes. Of its kernels for trees of drafts it takes those that it has for Intel's GPUs, in Triton too: the
ones for CUDA are compiled. In bfloat16 the interpreter's texts are wrong, hence --dtype=float32.
"""

from __future__ import annotations

import runpy
from typing import Any

from tests import interpreted_gpu


def install() -> None:
    """Replace what the module's docstring names, in this process and those that are forked from it."""
    interpreted_gpu.install()
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.arg_groups import speculative_hook
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative import dflash_worker_v2, eagle_utils, eagle_worker_v2

    ModelRunner._extend_forward_kwargs = in_their_own_type(ModelRunner._extend_forward_kwargs)
    speculative_hook._handle_dflash = with_cuda_named(speculative_hook._handle_dflash)
    cache_locs._is_cuda = True  # slots of a verify window
    eagle_utils._is_xpu = True  # building and walking a tree of drafts
    eagle_worker_v2._is_cuda = True  # the best token of a draft's step
    dflash_worker_v2.is_cuda = lambda: True  # a block's inputs, K and V of its features, how much of it stands


def with_cuda_named(handle: Any) -> Any:
    """`handle(server_args)`, which looks at the device's name only to refuse others than CUDA."""

    def handle_named(server_args: Any) -> None:
        device, server_args.device = server_args.device, "cuda"
        try:
            handle(server_args)
        finally:
            server_args.device = device

    return handle_named


def in_their_own_type(arguments: Any) -> Any:
    """`_extend_forward_kwargs(model_runner, forward_batch, proxies)` that leaves embeddings in float32. SGLang makes
    them bfloat16, whatever the model is, where a DFlash block is not replayed from a graph."""

    def arguments_in_their_own_type(model_runner: Any, forward_batch: Any, proxies: Any) -> dict[str, Any]:
        found = arguments(model_runner, forward_batch, proxies)
        return found | {name: forward_batch.input_embeds for name in found if name == "input_embeds"}

    return arguments_in_their_own_type


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
