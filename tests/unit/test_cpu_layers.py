"""The cheaper forms of layers against SGLang's own plain ones, and when processes may be forked."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

from whiflash_sglang.cpu import layers, processes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
all_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


def assert_close(output, expected):
    assert output.dtype == expected.dtype and output.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(output.double(), expected.double(), atol=tolerance, rtol=tolerance)


class FakeNorm(SimpleNamespace):
    def forward_native(self, *args):
        return RMSNorm.forward_native(self, *args)


def norm(dtype, **options):
    plain = {
        "hidden_size": 16,
        "variance_epsilon": 1e-6,
        "variance_size_override": None,
        "cast_x_before_out_mul": False,
        "fp32_residual": False,
        "override_orig_dtype": None,
        "weight": torch.rand(16).to(dtype) + 0.5,
    }
    return FakeNorm(**{**plain, **options})


@all_dtypes
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (5, 4, 16)])
def test_norm_equals_the_native_form(dtype, shape):
    layer, x, residual = norm(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    assert_close(layers.norm_forward(layer, x), layer.forward_native(x))
    for output, expected in zip(
        layers.norm_forward(layer, x, residual), layer.forward_native(x, residual), strict=True
    ):
        assert_close(output, expected)


@pytest.mark.parametrize("option", [{"cast_x_before_out_mul": True}, {"variance_size_override": 8}])
def test_a_norm_with_options_keeps_the_native_form(option):
    layer, x = norm(torch.bfloat16, **option), torch.randn(3, 16).bfloat16()
    assert torch.equal(layers.norm_forward(layer, x), layer.forward_native(x))


class FakeRotary(SimpleNamespace):
    def forward_native(self, *args):
        return RotaryEmbedding.forward_native(self, *args)


def rotary(dtype, is_neox_style=True, num_positions=50):
    angles = torch.arange(num_positions)[:, None] * 10000 ** (-torch.arange(4) / 4)
    return FakeRotary(
        head_size=8,
        rotary_dim=8,
        is_neox_style=is_neox_style,
        cos_sin_cache=torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype),
        _apply_rotary_emb_wrapped=apply_rotary_emb,
    )


@all_dtypes
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_rotary_equals_the_native_form(dtype, is_neox_style, num_tokens):
    layer, positions = rotary(dtype, is_neox_style), torch.randint(0, 50, (num_tokens,))
    query, key = torch.randn(num_tokens, 4 * 8).to(dtype), torch.randn(num_tokens, 2 * 8).to(dtype)
    outputs = layers.rotary_forward(layer, positions, query, key)
    for output, expected in zip(outputs, layer.forward_native(positions, query, key), strict=True):
        assert_close(output, expected)


def test_rotary_follows_a_table_that_grew():
    """SGLang lengthens its table for a longer context; positions beyond the first one must not fail."""
    layer, query, key = rotary(torch.float32), torch.randn(1, 8), torch.randn(1, 8)
    layers.rotary_forward(layer, torch.tensor([3]), query, key)
    layer.cos_sin_cache = rotary(torch.float32, num_positions=200).cos_sin_cache
    outputs = layers.rotary_forward(layer, torch.tensor([150]), query, key)
    assert_close(outputs[0], layer.forward_native(torch.tensor([150]), query, key)[0])


@all_dtypes
@pytest.mark.parametrize("num_rows", [1, 8, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_the_plain_product(dtype, num_rows, has_bias, packing):
    layer = torch.nn.Linear(32, 24, bias=has_bias).to(dtype)
    layers.pack_weight(None, None, layer)
    x = torch.randn(num_rows, 32).to(dtype)
    with torch.inference_mode():
        assert_close(
            layers.linear_forward(None, layer, x, layer.bias), torch.nn.functional.linear(x, layer.weight, layer.bias)
        )


@pytest.fixture
def packing(monkeypatch):
    """Weights are packed, whatever is faster on this machine."""
    monkeypatch.setattr(layers, "packing_pays", lambda weight, packed: True)


def test_the_faster_form_is_kept(monkeypatch):
    """On one CPU the packed product of a few rows was faster, on another the plain one: it is measured."""
    monkeypatch.delenv(layers.PACK_WEIGHTS)
    for plain_seconds, is_packed in ((2.0, True), (1.0, False)):
        monkeypatch.setattr(layers, "_packing_pays", {})
        monkeypatch.setattr(
            layers, "quickest", lambda call, plain=plain_seconds: plain if call.func is layers.linear else 1.0
        )
        layer = torch.nn.Linear(8, 8)
        layers.pack_weight(None, None, layer)
        assert ("whiflash_packed" in layer.__dict__) == is_packed


@pytest.mark.parametrize(("said", "is_packed"), [("1", True), ("0", False)])
def test_the_environment_fixes_the_form(monkeypatch, said, is_packed):
    monkeypatch.setenv(layers.PACK_WEIGHTS, said)
    monkeypatch.setattr(layers, "quickest", lambda call: pytest.fail("nothing is measured"))
    layer = torch.nn.Linear(8, 8)
    layers.pack_weight(None, None, layer)
    assert ("whiflash_packed" in layer.__dict__) == is_packed


def test_weights_overwritten_while_serving_are_packed_again(packing):
    """A packed copy would otherwise go on answering with the old weights."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    layers.pack_weight(None, None, model[0])
    model[0].weight.data.fill_(2.0)
    layers.pack_again(None, SimpleNamespace(get_model=lambda: model))
    with torch.inference_mode():
        assert torch.equal(layers.linear_forward(None, model[0], torch.ones(1, 8)), torch.full((1, 8), 16.0))


def test_large_weights_are_not_kept_twice(monkeypatch):
    monkeypatch.setattr(layers, "MAX_PACKED_WEIGHT", 63)
    layer = torch.nn.Linear(8, 8)
    layers.pack_weight(None, None, layer)
    assert "whiflash_packed" not in layer.__dict__


@pytest.fixture
def chosen(monkeypatch):
    methods = []
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, force: methods.append(method))
    return methods


def test_processes_are_forked_only_without_other_threads(chosen, monkeypatch):
    monkeypatch.setattr(processes, "other_threads", lambda: ["zmq"])
    processes.choose_start_method(None)
    assert chosen == []
    monkeypatch.setattr(processes, "other_threads", lambda: [])
    processes.choose_start_method(None)
    assert chosen == ["fork"]


def test_replicas_are_spawned(chosen):
    """Their controller starts each from a thread of its own: a fork would copy locks that other threads hold."""
    processes.spawn_from_threads(None)
    assert chosen == ["spawn"]


@pytest.mark.parametrize(("asked", "expected"), [(None, [4]), ("1", [])])
def test_ranks_share_the_cores(monkeypatch, asked, expected):
    """Asked again for each drafter, whose ranks are the same processes."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert processes.share_threads(None, tp_rank=1, tp_size=2) is None
    assert chosen == expected
    processes.share_threads(None, tp_rank=0, tp_size=2)
    assert set(chosen) == set(expected)


def test_one_rank_keeps_what_sglang_does():
    assert processes.share_threads(lambda tp_rank, tp_size: (tp_rank, tp_size), tp_rank=0, tp_size=1) == (0, 1)


def test_a_running_thread_is_seen():
    before, stop = len(processes.other_threads()), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert len(processes.other_threads()) == before + 1
    stop.set()
    thread.join()


@pytest.mark.slow  # it starts a program that imports SGLang
def test_bfloat16_is_left_plain_on_a_cpu_that_cannot_pack_it() -> None:
    program = """
import torch
from whiflash_sglang.cpu.layers import pack_weight
layer = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
pack_weight(None, None, layer)
print("packed" if "whiflash_packed" in layer.__dict__ else "plain")
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "plain", result.stderr
