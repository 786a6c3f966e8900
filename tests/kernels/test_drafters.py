"""Both drafters with the ingestion kernel and without it: from the same features, the same entries in SGLang's pools.

The drafters are those of the server, over SGLang's own norms, rotary embedding and pool; the models around these hold
just what ingestion reads.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from tests.kernels import DEVICE
from tests.kernels.test_ingest import Launches, rotary_table
from whiflash_sglang.core.types import Entries
from whiflash_sglang.drafters import dflash, fused
from whiflash_sglang.drafters import ingest_kernel as kernels
from whiflash_sglang.drafters.eagle3 import Eagle3Drafter
from whiflash_sglang.drafters.runner import DraftRunner

HIDDEN, VOCAB = 48, 20
CAPTURED, LAYER_IDS = (0, 2, 3), (0, 3)
NUM_Q_HEADS, NUM_KV_HEADS = 4, 2
NUM_SLOTS = 128
EPSILON = 1e-5
CLASSES = {"df": dflash.DFlashDrafter, "e3": Eagle3Drafter}

# Of entries that are about 1. The torch operations round to the model's type after each step, the kernel once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class Linear(torch.nn.Linear):
    """Called as torch's; random enough to show."""

    def __init__(self, width: int, rows: int, bias: bool = False):
        super().__init__(width, rows, bias=bias)
        torch.nn.init.normal_(self.weight, std=width**-0.5)


def norm(width: int) -> RMSNorm:
    layer = RMSNorm(width, eps=EPSILON)
    layer._forward_method = layer.forward_native
    torch.nn.init.normal_(layer.weight, mean=1.0, std=0.3)
    return layer


class Rotary(RotaryEmbedding):
    """SGLang's, without the server's configuration that its own constructor asks for."""

    def __init__(self, head_dim: int, dtype: torch.dtype):
        torch.nn.Module.__init__(self)
        self.head_size = self.rotary_dim = head_dim
        self.is_neox_style = True
        self.cos_sin_cache = rotary_table(head_dim).to(dtype)
        self._apply_rotary_emb_wrapped = apply_rotary_emb
        self._forward_method = self.forward_native


def attention(width: int, head_dim: int, layer_id: int, rotary: Rotary, bias: bool) -> SimpleNamespace:
    rows = (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * head_dim
    return SimpleNamespace(
        qkv_proj=Linear(width, rows, bias),
        q_size=NUM_Q_HEADS * head_dim,
        kv_size=NUM_KV_HEADS * head_dim,
        rotary_emb=rotary,
        k_norm=norm(head_dim),
        attn=SimpleNamespace(
            layer_id=layer_id, tp_k_head_num=NUM_KV_HEADS, head_dim=head_dim, k_scale=None, v_scale=None
        ),
    )


class DFlashModel:
    def __init__(self, head_dim: int, num_layers: int, rotary: Rotary, bias: bool):
        self.fc = Linear(len(LAYER_IDS) * HIDDEN, HIDDEN)
        self.hidden_norm = norm(HIDDEN)
        self.layers = [
            SimpleNamespace(self_attn=attention(HIDDEN, head_dim, i, rotary, bias)) for i in range(num_layers)
        ]

    def project_target_hidden(self, features: torch.Tensor) -> torch.Tensor:
        return self.hidden_norm(self.fc(features))


class Eagle3Model:
    def __init__(self, head_dim: int, num_layers: int, rotary: Rotary, bias: bool):
        layer = SimpleNamespace(
            self_attn=attention(2 * HIDDEN, head_dim, 0, rotary, bias),
            input_layernorm=norm(HIDDEN),
            hidden_norm=norm(HIDDEN),
        )
        self.hot_token_id = None
        self.model = SimpleNamespace(
            layers=[layer],
            fc=Linear(len(LAYER_IDS) * HIDDEN, HIDDEN),
            embed_tokens=torch.nn.Embedding(VOCAB, HIDDEN),
            input_norm=None,
            fc_norm=None,
        )


def all_of(thing: Any) -> list[torch.nn.Module]:
    """The modules within a model of namespaces."""
    if isinstance(thing, torch.nn.Module):
        return [thing]
    if isinstance(thing, list):
        return [module for item in thing for module in all_of(item)]
    return [module for item in vars(thing).values() for module in all_of(item)] if hasattr(thing, "__dict__") else []


class Setup:
    """A drafter's model, and runners of it that have a KV pool each."""

    def __init__(self, kind: str, dtype: torch.dtype, head_dim: int = 16, num_layers: int = 3, bias: bool = False):
        torch.manual_seed(0)
        self.kind, self.dtype, self.head_dim = kind, dtype, head_dim
        self.num_layers = num_layers if kind == "df" else 1
        self.rotary = Rotary(head_dim, dtype)
        self.model = (DFlashModel if kind == "df" else Eagle3Model)(head_dim, num_layers, self.rotary, bias)
        for module in all_of(self.model):
            module.to(DEVICE, dtype).requires_grad_(False)

    def runner(self, stored: torch.dtype | None = None) -> DraftRunner:
        pool = MHATokenToKVPool(
            NUM_SLOTS, 1, stored or self.dtype, NUM_KV_HEADS, self.head_dim, self.num_layers, DEVICE, False
        )
        spec = SimpleNamespace(
            kind=self.kind,
            path="models/drafter",
            layer_ids=LAYER_IDS,
            hidden_size=HIDDEN,
            target_hidden_size=HIDDEN,
            head_dim=self.head_dim,
            block_size=8,
            mask_token_id=0,
            vocab_size=VOCAB,
        )
        model_runner = SimpleNamespace(model=self.model, device=DEVICE, token_to_kv_pool=pool)
        return DraftRunner(spec, SimpleNamespace(model_runner=model_runner), None, None)


def drafter(runner: DraftRunner, monkeypatch: pytest.MonkeyPatch, *, with_kernel: bool) -> Any:
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,) if with_kernel else ())
    monkeypatch.setattr(dflash, "TargetHead", lambda *args: None)
    made = CLASSES[runner.spec.kind](runner, CAPTURED, num_drafts=5)
    assert hasattr(made.write, "func") != with_kernel  # the drafter's own way is a partial
    return made


@torch.no_grad()
def entries_of(made: Any, num_rows: int) -> list[torch.Tensor]:
    """What an ingestion of random features leaves in the drafter's pools: K of every layer, then V of every layer."""
    generator = torch.Generator().manual_seed(1)
    dtype = made.runner.model.fc.weight.dtype if made.name == "df" else made.runner.model.model.fc.weight.dtype
    captured = torch.randn(num_rows, len(CAPTURED) * HIDDEN, generator=generator).to(DEVICE, dtype)
    next_tokens, positions = (torch.randint(high, (num_rows,), generator=generator).to(DEVICE) for high in (VOCAB, 50))
    kv_slots = torch.randperm(NUM_SLOTS, generator=generator)[:num_rows].to(DEVICE)
    made.ingest(Entries(captured, next_tokens, positions, kv_slots))
    pool = made.runner.worker.model_runner.token_to_kv_pool
    return [*pool.k_buffer, *pool.v_buffer]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """Absolute differences, of all pools."""
    return torch.cat([(a.double() - b.double()).abs().flatten() for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("num_rows", [1, 7, 65])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["df", "e3"])
def test_the_same_entries_as_without_the_kernel(kind, dtype, num_rows, monkeypatch):
    setup = Setup(kind, dtype)
    plain = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=False), num_rows)
    kernel = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=True), num_rows)
    assert distance(kernel, plain).max() < TOLERANCE[dtype]
    assert all(buffer.any() for buffer in plain)


@pytest.mark.parametrize("kind", ["df", "e3"])
@pytest.mark.parametrize("head_dim, bias", [(64, True), (128, False)])
def test_other_heads_and_a_bias(kind, head_dim, bias, monkeypatch):
    setup = Setup(kind, torch.float32, head_dim, bias=bias)
    plain = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=False), 9)
    kernel = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=True), 9)
    assert distance(kernel, plain).max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["df", "e3"])
def test_the_kernel_is_no_further_from_float32_than_the_torch_operations(kind, monkeypatch):
    """It rounds less often: a feature's norm, and K between projection, norm and rope, stay in float32.

    In float16, as Triton's interpreter rounds what it stores as bfloat16 towards zero.
    """
    setup = Setup(kind, torch.float16)
    plain = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=False), 100)
    kernel = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=True), 100)
    for module in all_of(setup.model):
        module.float()
    setup.dtype, setup.rotary.cos_sin_cache = torch.float32, rotary_table(setup.head_dim)
    exact = entries_of(drafter(setup.runner(), monkeypatch, with_kernel=False), 100)
    assert distance(kernel, exact).mean() < distance(plain, exact).mean()


@pytest.mark.parametrize("kind", ["df", "e3"])
def test_a_longer_rotary_table_is_taken_up(kind, monkeypatch):
    """SGLang replaces the table when a longer context is asked for, after drafters have been made."""
    setup = Setup(kind, torch.float32)
    whole = setup.rotary.cos_sin_cache
    setup.rotary.cos_sin_cache = whole[:1].clone()
    made = [drafter(setup.runner(), monkeypatch, with_kernel=with_kernel) for with_kernel in (False, True)]
    setup.rotary.cos_sin_cache = whole
    plain, kernel = (entries_of(one, 9) for one in made)
    assert distance(kernel, plain).max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["df", "e3"])
def test_a_drafter_that_was_made_has_nothing_left_to_compile(kind, dtype, monkeypatch):
    """Also when SGLang's rotary embedding has turned its table, which is in float32 on a GPU, into the model's type."""
    setup = Setup(kind, dtype)
    setup.rotary.cos_sin_cache = rotary_table(setup.head_dim)
    launches = Launches()
    monkeypatch.setattr(kernels, "ingest_kernel", launches)
    made = drafter(setup.runner(), monkeypatch, with_kernel=True)
    compiled = set(launches.compiled)
    for num_rows in range(1, 80):
        if num_rows == 40:
            setup.rotary.cos_sin_cache = setup.rotary.cos_sin_cache.to(dtype)
        entries_of(made, num_rows)
    assert launches.compiled == compiled != set()


class OwnWay(Rotary):
    def forward_native(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward_native(*args, **kwargs)


class OtherPool(MHATokenToKVPool):
    pass


def change(setup: Setup, runner: DraftRunner, what: str) -> DraftRunner:
    pool = runner.worker.model_runner.token_to_kv_pool
    if what == "head":
        runner.spec.head_dim = 24
    elif what == "pool":
        pool.__class__ = OtherPool
    elif what == "layout":
        pool.kv_cache_layout = "hnd"
    elif what == "fp8":
        return setup.runner(torch.float8_e4m3fn)
    elif what == "scale":
        layers = setup.model.layers if setup.kind == "df" else setup.model.model.layers
        layers[-1].self_attn.attn.v_scale = 0.5
    elif what == "interleaved":
        setup.rotary.is_neox_style = False
    elif what == "partial":
        setup.rotary.rotary_dim = 8
    elif what == "own":
        setup.rotary.__class__ = OwnWay
    return runner


@pytest.mark.parametrize("kind", ["df", "e3"])
@pytest.mark.parametrize(
    "what, said",
    [
        ("head", "head_dim 24 is not one of"),
        ("pool", "KV pool is a OtherPool"),
        ("layout", "layout hnd"),
        ("fp8", "float8_e4m3fn"),
        ("scale", "scaled"),
        ("interleaved", "rotary embedding (Rotary)"),
        ("partial", "rotary embedding (Rotary)"),
        ("own", "rotary embedding (OwnWay)"),
    ],
)
def test_what_the_kernel_does_not_know_is_said_once(kind, what, said, monkeypatch, caplog):
    setup = Setup(kind, torch.float32)
    runner = change(setup, setup.runner(), what)
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    monkeypatch.setattr(dflash, "TargetHead", lambda *args: None)
    with caplog.at_level(logging.WARNING):
        made = CLASSES[kind](runner, CAPTURED, num_drafts=5)
    (record,) = caplog.records
    assert f"drafter {kind} does not use the fused ingestion kernel: " in record.message and said in record.message
    assert made.write.func.__name__ in ("write_layers", "write_layer")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the kernel is used")
def test_a_cpu_keeps_its_torch_operations(caplog, monkeypatch):
    monkeypatch.setattr(dflash, "TargetHead", lambda *args: None)
    for kind, drafter_class in CLASSES.items():
        write = drafter_class(Setup(kind, torch.float32).runner(), CAPTURED, num_drafts=5).write
        assert write.func.__name__ in ("write_layers", "write_layer")
    assert not caplog.records
