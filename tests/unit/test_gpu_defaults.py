"""What a server on a GPU does where nothing is said, and what it counts before it allocates; there need not be one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from whiflash_sglang.bridge.algorithm import WhiFlashAlgorithm
from whiflash_sglang.bridge.builders import captured_layers
from whiflash_sglang.bridge.memory_checks import memory_needs
from whiflash_sglang.bridge.scheduler_hooks import _tried_attention
from whiflash_sglang.bridge.start_block import attention_line
from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup.checkpoints import load_drafter_spec, load_target_spec
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.gpu_memory import graph_bytes
from whiflash_sglang.training.dummy_models import QWEN3_8B, write_models


def algorithm() -> WhiFlashAlgorithm:
    return object.__new__(WhiFlashAlgorithm)


def resolved(**given: object) -> SimpleNamespace:
    return SimpleNamespace(**{"tp_size": 1, "device": "cuda", "max_running_requests": None} | given)


@pytest.mark.parametrize(("device", "given", "expected"), [("cuda", None, 48), ("cuda", 300, 300), ("cpu", None, None)])
def test_a_gpu_runs_48_requests_at_once_where_nothing_is_said(
    device: str, given: int | None, expected: int | None
) -> None:
    server_args = resolved(device=device, max_running_requests=given)
    algorithm().handle_server_args(server_args)
    assert server_args.max_running_requests == expected


def test_kv_that_is_sized_after_captures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    with pytest.raises(ConfigError, match=r"^SGLANG_ENABLE_POST_CAPTURE_KV_SIZING 1: .*; unset"):
        algorithm().handle_server_args(resolved())


def test_attention_is_triton_on_a_gpu_where_nothing_is_said() -> None:
    """Whoever names a backend gets it: SGLang asks for a default only where nobody did."""
    original = lambda *given: "fa3"  # noqa: E731
    for name, device, expected in (("WHIFLASH", "cuda", "triton"), (None, "cuda", "fa3"), ("WHIFLASH", "cpu", "fa3")):
        server_args = SimpleNamespace(speculative_algorithm=name, device=device)
        assert _tried_attention(original, server_args, False, None) == expected
    tried = attention_line({"target": "triton", "df": "triton"}, "cuda")
    assert tried == "target triton, df triton; WHIFLASH's default on a GPU"
    assert "untested" in attention_line({"target": "fa3", "df": "triton"}, "cuda:0")
    assert attention_line({"target": "torch_native"}, "cpu") == "target torch_native"


def test_what_is_counted_before_anything_of_it_is_allocated(
    tmp_path: Path,
) -> None:
    """For batches as large as they can become: SGLang's sizes, up to the number of requests."""
    folders = write_models(tmp_path, QWEN3_8B)
    target = load_target_spec(str(folders.target))
    df, e3 = (
        load_drafter_spec(str(path), kind, target) for kind, path in (("df", folders.dflash), ("e3", folders.eagle3))
    )
    graphs = SimpleNamespace(backend="full", bs=[1, 8, 64])
    runner = SimpleNamespace(
        kv_cache_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
        max_total_num_tokens=1000,
        server_args=SimpleNamespace(tp_size=1, cuda_graph_config=SimpleNamespace(decode=graphs)),
        model_config=SimpleNamespace(hidden_size=4096, vocab_size=151_936),
    )
    requests = SimpleNamespace(size=48, req_to_token=torch.empty(49, 4096))
    config = WhiFlashConfig(dflash_draft=df.path, eagle_draft=e3.path)
    found = {need.what: need for need in memory_needs(config, {"df": df, "e3": e3}, runner, requests)}
    assert found["draft pools"].size == 1000 * (20_480 + 4096)
    layers = len(captured_layers([df, e3]))
    assert found["backlogs"].size == 49 * 128 * (layers * 8192 + 8)
    widths = (1, config.eagle_steps + 1, 16)
    assert found["CUDA graphs"].size == graph_bytes([1, 8, 48], widths, (16, 1), layers * 8192, 151_936, 4096)
    assert found["CUDA graphs"].value == 48
    graphs.backend = "disabled"
    assert memory_needs(config, {"df": df, "e3": e3}, runner, requests)[-1].size == 0
