"""What a GPU is refused for, in figures; there need not be one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from whiflash_sglang.core.errors import CheckpointError, ConfigError
from whiflash_sglang.startup.checkpoints import DrafterSpec, TargetSpec, load_drafter_spec, load_target_spec
from whiflash_sglang.startup.config import ENVIRONMENT_VARIABLE, WhiFlashConfig
from whiflash_sglang.startup.gpu_memory import (
    GIB,
    MAX_RUNNING,
    Memory,
    Need,
    check_attention,
    check_needs,
    check_room,
    graph_bytes,
    kv_bytes,
    ring_bytes,
    surely_none,
)
from whiflash_sglang.training.dummy_models import QWEN3_8B, write_models


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TargetSpec, DrafterSpec, DrafterSpec]:
    folders = write_models(tmp_path_factory.mktemp("models"), QWEN3_8B)
    target = load_target_spec(str(folders.target))
    drafters = {"df": folders.dflash, "e3": folders.eagle3}
    df, e3 = (load_drafter_spec(str(path), kind, target) for kind, path in drafters.items())
    return target, df, e3


@pytest.mark.parametrize("backend", ["triton", "flashinfer", "fa3"])
def test_backends_that_rounds_are_made_for(backend: str, specs: tuple[TargetSpec, DrafterSpec, DrafterSpec]) -> None:
    check_attention([backend], specs[0], specs[1:])


def test_another_backend_is_refused_by_name(specs: tuple[TargetSpec, DrafterSpec, DrafterSpec]) -> None:
    """SGLang takes it on Blackwell where nobody asks for one."""
    with pytest.raises(ConfigError, match=r"^--attention-backend trtllm_mha: .*; use triton or flashinfer or fa3$"):
        check_attention(["triton", "trtllm_mha"], specs[0], specs[1:])


def test_head_sizes_without_a_kernel(specs: tuple[TargetSpec, DrafterSpec, DrafterSpec]) -> None:
    target, df, e3 = specs
    odd = replace(df, head_dim=80)
    check_attention(["triton", "fa3"], target, [odd, e3])
    with pytest.raises(CheckpointError) as refusal:
        check_attention(["flashinfer"], target, [odd, e3])
    assert re.match(r"^--speculative-draft-model-path \S+: head size 80 is not supported", str(refusal.value))
    assert str(refusal.value).endswith("use --attention-backend triton or fa3")
    with pytest.raises(CheckpointError, match=r"^--model-path .*size 512 .*; serve another model$"):
        check_attention(["fa3"], replace(target, head_dim=512), [df, e3])


def test_bytes_of_a_token(specs: tuple[TargetSpec, DrafterSpec, DrafterSpec]) -> None:
    """Qwen3-8B: 36 layers, 8 KV heads of 128, K and V of 2 bytes."""
    assert [kv_bytes(spec, 2) for spec in specs] == [147_456, 5 * 4096, 4096]
    assert kv_bytes(specs[0], 2, num_ranks=2) == 147_456 // 2
    assert kv_bytes(specs[0], 2, num_ranks=16) == 147_456 // 8, "a KV head may be on several ranks"


def test_room_for_one_window() -> None:
    check_room(Memory(24 * GIB, 0.85, 18 * GIB), 90_000, 16)
    with pytest.raises(ConfigError) as refusal:
        check_room(Memory(16 * GIB, 0.85, 18 * GIB), 90_000, 16)
    said = str(refusal.value)
    assert said.startswith("--mem-fraction-static 0.85: of 16.0 GiB, 0.00 are left after the weights")
    assert "--whiflash-drafters" in said and "--tp-size" in said and "\n" not in said


def needs(tokens: int, requests: int = 48, graphs: Sequence[int] = ()) -> list[Need]:
    """Of Qwen3-8B with a DFlash and an EAGLE-3 drafter, in bfloat16."""
    captured = graph_bytes(graphs, (1, 6, 16), (16, 1), 8 * 4096 * 2, 151_936, 40_960)
    return [
        Need("draft pools", tokens * (20_480 + 4096), "--max-total-tokens", tokens),
        Need("rings", ring_bytes(requests, 128, 65536), "--max-running-requests", requests),
        Need("CUDA graphs", captured, "--cuda-graph-max-bs", max(graphs, default=0)),
    ]


def test_room_for_the_draft_pools() -> None:
    check_needs(3 * GIB, needs(100_000))
    with pytest.raises(ConfigError) as refusal:
        check_needs(GIB, needs(100_000))
    said = str(refusal.value)
    assert said.startswith("--max-total-tokens 100000: ") and "1.00 GiB are left" in said
    assert "draft pools 2.29, rings 0.38" in said and "graphs" not in said
    assert "give --max-total-tokens 27304 or less" in said and "--mem-fraction-static" in said
    check_needs(GIB, needs(27_304))


def test_room_for_rings_and_graphs() -> None:
    """An H100 with SGLang's own defaults would run out of memory: 3,400 requests, graphs up to 256."""
    sizes = [1, 2, 4, *range(8, 257, 8)]
    assert [round(need.size / GIB, 1) for need in needs(100_000, 3400, sizes)] == [2.3, 26.6, 11.4]
    with pytest.raises(
        ConfigError, match=r"^--cuda-graph-max-bs 256: .*give --cuda-graph-max-bs \d+ or less, or lower"
    ):
        check_needs(13 * GIB, needs(100_000, 256, sizes))
    with pytest.raises(ConfigError, match=r"^--max-running-requests 3400: .*give --max-running-requests \d+ or less"):
        check_needs(8 * GIB, needs(100_000, 3400))
    with pytest.raises(ConfigError, match=r"; lower --mem-fraction-static, or load one drafter"):
        check_needs(GIB, needs(100_000, 3400, sizes))
    check_needs(5 * GIB, needs(100_000, MAX_RUNNING, [size for size in sizes if size <= MAX_RUNNING]))


@pytest.fixture
def arguments(
    specs: tuple[TargetSpec, DrafterSpec, DrafterSpec], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """What SGLang has resolved on a GPU of 80 GiB, as far as it is looked at."""
    pytest.importorskip("sglang")
    target, df, e3 = specs
    WhiFlashConfig(dflash_draft=df.path, eagle_draft=e3.path).to_environ(os.environ)
    monkeypatch.setattr("sglang.srt.utils.get_device_memory_capacity", lambda device: 80 * 1024)
    yield SimpleNamespace(
        device="cuda",
        model_path=target.path,
        get_attention_backends=lambda: ("fa3", "fa3"),
        speculative_draft_attention_backend=None,
        mem_fraction_static=0.85,
        quantization=None,
        tp_size=1,
        speculative_num_draft_tokens=16,
    )
    del os.environ[ENVIRONMENT_VARIABLE]


def test_resolved_arguments_are_judged_before_anything_is_loaded(arguments: SimpleNamespace) -> None:
    from whiflash_sglang.bridge.memory_checks import check_accelerator

    check_accelerator(arguments)
    arguments.mem_fraction_static = 0.2
    with pytest.raises(ConfigError, match=r"^--mem-fraction-static 0.2: of 80.0 GiB, 0.00 are left"):
        check_accelerator(arguments)
    arguments.tp_size = 2
    check_accelerator(arguments)
    arguments.get_attention_backends = lambda: ("trtllm_mha", "trtllm_mha")
    with pytest.raises(ConfigError, match=r"^--attention-backend trtllm_mha"):
        check_accelerator(arguments)
    arguments.device = "cpu"
    check_accelerator(arguments)


def test_a_machine_without_a_device_file_has_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known without torch; where there is one, torch is asked later whether it can be used."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    present: set[str] = set()
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, name: iter(present & {name}))
    assert surely_none()
    for name in ("nvidia*", "kfd"):
        present = {name}
        assert not surely_none()
    present = set()
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert not surely_none(), "SGLang's own engine has other limits"
