"""The CPU platform: when it is chosen, what it refuses, and that every fallback finds its target."""

from __future__ import annotations

import pkgutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.platforms.interface import SRTPlatform

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.cpu import PLATFORM_CLASS, activate, fallbacks
from whiflash_sglang.cpu.platform import WhiFlashCpuPlatform, refuse_unsupported_flags
from whiflash_sglang.startup.refused_flags import CPU_REFUSALS


def test_activates_only_without_an_accelerator(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert activate() == PLATFORM_CLASS
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert activate() is None


def test_steps_aside_for_the_cpu_engine_of_sglang(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_the_named_class_is_a_platform():
    platform_class = pkgutil.resolve_name(PLATFORM_CLASS)
    assert platform_class is WhiFlashCpuPlatform and issubclass(platform_class, SRTPlatform)
    platform = platform_class()
    assert platform.is_out_of_tree() and platform.get_device(0) == "cpu"
    assert not platform.is_pin_memory_available()


def flags(**changed):
    table = {row.flag.removeprefix("--").replace("-", "_"): None for row in CPU_REFUSALS}
    return SimpleNamespace(
        **{**table, "tp_size": 1, "dp_size": 1, "pp_size": 1, "enable_dp_attention": False, **changed}
    )


def test_flags_without_a_cpu_implementation_are_refused():
    refuse_unsupported_flags(flags())
    refuse_unsupported_flags(flags(page_size=16, attention_backend="intel_amx"))
    refuse_unsupported_flags(flags(tp_size=2, dp_size=2))
    for changed, message in [
        ({"pp_size": 2}, "--pp-size 2.*--tp-size"),
        ({"enable_dp_attention": True}, "--enable-dp-attention.*--dp-size"),
        ({"attention_backend": "flashinfer"}, "--attention-backend flashinfer"),
    ]:
        with pytest.raises((ValueError, ConfigError), match=message):
            refuse_unsupported_flags(flags(**changed))


def test_every_fallback_has_a_target():
    """Where a function is renamed upstream, SGLang only logs that the hook failed to apply."""
    for target, _, _ in fallbacks.FALLBACKS:
        assert callable(pkgutil.resolve_name(target)), target


ranges = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=6)


@given(ranges)
def test_slot_table_fallbacks_are_each_others_reverse(ranges):
    """What one writes the other reads back, row by row, and nothing else of the table is touched."""
    starts = torch.tensor([start for start, _ in ranges])
    ends = starts + torch.tensor([length for _, length in ranges])
    num_slots, rows = int((ends - starts).sum()), torch.arange(len(ranges)).flip(0)
    table = torch.zeros(len(ranges), 16, dtype=torch.int32)
    slots = torch.arange(100, 100 + num_slots)
    fallbacks.assign_req_to_token_pool(rows, table, starts, ends, slots, len(ranges))
    expected, taken = torch.zeros_like(table), 0
    for row, (start, length) in zip(rows.tolist(), ranges, strict=True):
        expected[row, start : start + length] = slots[taken : taken + length].int()
        taken += length
    assert torch.equal(table, expected)
    read = fallbacks.assign_extend_cache_locs(rows, table, starts, ends, len(ranges), 5, "cpu")
    assert read.dtype == torch.int64 and read.shape == (5 * len(ranges),)
    assert torch.equal(read[:num_slots], slots)


def test_record_stream_is_a_no_op_on_the_cpu():
    def raises(tensor, stream):
        raise AssertionError("called for a CPU tensor")

    fallbacks.record_stream(raises, torch.zeros(1), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_grammars_mask_leaves_allowed_tokens_alone(dtype):
    """Upstream allocates pinned memory and runs a Triton kernel: one JSON schema ended the scheduler."""
    mask = fallbacks.allocate_token_bitmask(vocab_size=70, batch_size=2)
    mask[0] = 0
    mask[0, 0], mask[0, 2] = 0b101, 0b1  # tokens 0, 2 and 64
    logits = torch.zeros(2, 70, dtype=dtype)
    fallbacks.apply_vocab_mask(None, logits, mask)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [0, 2, 64]
    assert logits[1].isfinite().all()
