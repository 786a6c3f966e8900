"""The platform object that SGLang finds through the entry point `sglang.srt.platforms`.

SGLang asks it for the device, the memory pool, the slot allocator and the attention backend. The attention backend
keeps the name `torch_native`: SGLang takes its plain-PyTorch branches (slot tables, positions) for that name only, so
our backend is registered in the place of the one that carries it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from whiflash_sglang.startup.refusals import CPU_REFUSALS, Given, refuse

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

ATTENTION_BACKEND = "torch_native"

# Under this key SGLang finds the forms of layers that were registered for this platform; the others run natively.
DISPATCH_KEY = "whiflash_cpu"


class WhiFlashCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU, served by plain PyTorch."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        # Compiling SGLang's small helpers takes minutes and a C++ compiler, and gains nothing on a CPU. The
        # variable is read when torch._dynamo is first imported, here and in the processes that are spawned.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # The scheduler runs without gradients in any case; without their bookkeeping a step takes a tenth less.
        os.environ.setdefault("SGLANG_ENABLE_TORCH_INFERENCE_MODE", "1")
        # Inputs are copied into static buffers for the sake of CUDA graphs, of which there are none here.
        os.environ.setdefault("SGLANG_EAGER_INPUT_NO_COPY", "1")

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def is_pin_memory_available(self, device: torch.device | str | None = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Refuse what has no CPU implementation here, and name the attention backend."""
        refuse_unsupported_flags(server_args)
        if server_args.enable_deterministic_inference:
            _count_as_deterministic(ATTENTION_BACKEND)
        # On x86 SGLang has by now filled in `intel_amx`, whose kernels are a separate build.
        server_args.attention_backend = ATTENTION_BACKEND

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from whiflash_sglang.cpu.pages import allocator

        return allocator

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def init_backend(self) -> None:
        """Called once in every process that runs a model: put our attention backend in its place."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(ATTENTION_BACKEND)(_create_attention_backend)


def _create_attention_backend(model_runner):
    from whiflash_sglang.cpu.attention import CpuAttentionBackend

    return CpuAttentionBackend(model_runner)


def _count_as_deterministic(backend: str) -> None:
    """Let `--enable-deterministic-inference`, without which SGLang ignores seeds, go with this attention backend."""
    from sglang.srt import server_args

    if backend not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.add_deterministic_attention_backend_choices([backend])
        server_args.add_radix_supported_deterministic_attention_backend_choices([backend])


def refuse_unsupported_flags(server_args: ServerArgs) -> None:
    """Raise for a flag that would fail later, inside a forward, with a message about a kernel.

    The launcher has asked the table already, of the flags as they were given; SGLang's own launcher has not.
    """
    names = (row.flag.removeprefix("--") for row in CPU_REFUSALS)
    given = {f"--{name}": Given(getattr(server_args, name.replace("-", "_")), None) for name in names}
    refuse(CPU_REFUSALS, given)
    if server_args.pp_size != 1:
        raise ValueError(
            f"--pp-size {server_args.pp_size}: this CPU platform has no pipeline; leave it out and use --tp-size"
        )
    if server_args.enable_dp_attention:
        raise ValueError(
            "--enable-dp-attention needs accelerator kernels; on a CPU use --dp-size without it, for whole replicas"
        )
