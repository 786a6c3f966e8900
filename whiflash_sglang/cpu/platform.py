"""The platform object of the entry point `sglang.srt.platforms`.

It provides device, memory pool, slot allocator and attention backend. Our attention backend replaces SGLang's
`torch_native` under the same name, because SGLang uses its plain-PyTorch code paths (slot tables, positions) only for
that name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from whiflash_sglang.startup.refused_flags import CPU_REFUSALS, Given, refuse

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

ATTENTION_BACKEND = "torch_native"

# SGLang looks up this platform's layer implementations by this key.
DISPATCH_KEY = "whiflash_cpu"


class WhiFlashCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU with plain PyTorch. Methods override SGLang's platform interface."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        # Compiling SGLang's small helpers takes minutes and a C++ compiler, and gains nothing on a CPU. Read when
        # torch._dynamo is first imported, here and in child processes.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Inference mode makes a step 10% faster than no_grad.
        os.environ.setdefault("SGLANG_ENABLE_TORCH_INFERENCE_MODE", "1")
        # Skip copying inputs into static buffers, which only CUDA graphs need.
        os.environ.setdefault("SGLANG_EAGER_INPUT_NO_COPY", "1")

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def is_pin_memory_available(self, device: torch.device | str | None = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Reject unsupported flags and set the attention backend. Raises ConfigError or ValueError."""
        refuse_unsupported_flags(server_args)
        if server_args.enable_deterministic_inference:
            _count_as_deterministic(ATTENTION_BACKEND)
        # On x86 SGLang defaults to `intel_amx`, which needs a separate build.
        server_args.attention_backend = ATTENTION_BACKEND

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """A factory that SGLang calls like an allocator class."""
        from whiflash_sglang.cpu.pages import allocator

        return allocator

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def init_backend(self) -> None:
        """Register our attention backend; called once in every process that runs a model."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(ATTENTION_BACKEND)(_create_attention_backend)


def _create_attention_backend(model_runner: ModelRunner) -> AttentionBackend:
    from whiflash_sglang.cpu.attention import CpuAttentionBackend

    return CpuAttentionBackend(model_runner)


def _count_as_deterministic(backend: str) -> None:
    """Allow `--enable-deterministic-inference`, which SGLang needs for seeds, with this attention backend."""
    from sglang.srt import server_args

    if backend not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.add_deterministic_attention_backend_choices([backend])
        server_args.add_radix_supported_deterministic_attention_backend_choices([backend])


def refuse_unsupported_flags(server_args: ServerArgs) -> None:
    """Raise ConfigError or ValueError for flags that would fail later, inside a forward.

    Our launcher has already checked them; SGLang's own launcher has not.
    """
    names = (row.flag.removeprefix("--") for row in CPU_REFUSALS)
    given = {f"--{name}": Given(getattr(server_args, name.replace("-", "_")), None) for name in names}
    refuse(CPU_REFUSALS, given)
    if server_args.pp_size != 1:
        raise ValueError(
            f"--pp-size {server_args.pp_size}: not supported on this CPU platform; leave it out and use --tp-size"
        )
    if server_args.enable_dp_attention:
        raise ValueError(
            "--enable-dp-attention needs accelerator kernels; on a CPU use --dp-size alone, for whole replicas"
        )
