"""The ingestion kernel against its torch reference; and kernels with a step left out, which have to be found out.

The reference computes in float32 from the same numbers. Tolerance: 2e-5 in float32, where only the order of sums
differs, and one unit in the last place of what is stored in 16 bits, as Triton's interpreter rounds bfloat16 towards
zero.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from tests.kernels import DEVICE
from whiflash_sglang.drafters import ingest_kernel as kernels
from whiflash_sglang.drafters.ingest_kernel import DTYPES, Ingestion, folded, ingest, reference

NUM_POSITIONS = 50
ABSOLUTE = 2e-5
RELATIVE = {torch.float32: 2e-5} | {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}

Call = Callable[..., None]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None  # None: as dtype
    head_dim: int = 16
    num_heads: int = 2
    num_layers: int = 2
    num_parts: int = 2
    part_width: int = 80  # not a multiple of the kernel's step
    num_rows: int = 70  # two blocks of rows, the last one not full
    has_bias: bool = True
    has_k_norm: bool = True
    epsilon: float = 1e-2  # large enough to show
    seed: int = 0


def pools_after(call: Call, case: Case) -> list[torch.Tensor]:
    """The KV pools that `call` has written to; what stood in them before is random."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    num_slots = case.num_rows + 7
    stored = case.stored or case.dtype
    shape = (num_slots, case.num_heads, case.head_dim)
    pools = tuple(randn(*shape, dtype=stored) for _ in range(2 * case.num_layers))
    rows, width = len(pools) * case.num_heads * case.head_dim, case.num_parts * case.part_width
    made = Ingestion(
        weight=randn(rows, width) / width**0.5,
        epsilon=case.epsilon,
        pools=pools,
        bias=randn(rows) if case.has_bias else None,
        k_norm=1 + randn(case.num_layers, case.head_dim) / 4 if case.has_k_norm else None,
    )
    parts = [randn(case.num_rows, case.part_width) * 3 for _ in range(case.num_parts)]
    positions = torch.randint(NUM_POSITIONS, (case.num_rows,), generator=generator).to(DEVICE)  # some of them equal
    kv_slots = torch.randperm(num_slots, generator=generator)[: case.num_rows].to(DEVICE)
    call(made, parts, rotary_table(case.head_dim), positions, kv_slots)
    return list(pools)


def rotary_table(head_dim: int) -> torch.Tensor:
    half = head_dim // 2
    angles = torch.arange(NUM_POSITIONS)[:, None] * 10000 ** (-torch.arange(half) / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)


def check(call: Call, case: Case) -> None:
    relative = RELATIVE[case.stored or case.dtype]
    for found, expected in zip(pools_after(call, case), pools_after(reference, case), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), atol=ABSOLUTE, rtol=relative)


cases = st.builds(
    Case,
    dtype=st.sampled_from(list(DTYPES)),
    head_dim=st.sampled_from([16, 32, 64, 128]),
    num_heads=st.integers(1, 3),
    num_layers=st.integers(1, 3),
    num_parts=st.integers(1, 2),
    part_width=st.integers(1, 5).map(lambda n: 16 * n) | st.integers(1, 100),
    num_rows=st.integers(0, 80),
    has_bias=st.booleans(),
    has_k_norm=st.booleans(),
    epsilon=st.sampled_from([1e-6, 1e-2]),
    seed=st.integers(0, 2**31),
)


@given(cases)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_kernel_is_its_reference(case):
    check(ingest, case)


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 64, 65, 129])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_any_number_of_positions(dtype, num_rows):
    check(ingest, Case(dtype=dtype, num_rows=num_rows))


@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_any_head(head_dim):
    check(ingest, Case(dtype=torch.bfloat16, head_dim=head_dim, num_rows=5))


def test_kv_of_another_type_than_the_weights():
    check(ingest, Case(dtype=torch.float32, stored=torch.bfloat16))


def test_parts_may_be_views():
    """Features stand in the ring of the backlog: rows need not be back to back."""

    def ingest_views(made, parts, *others):
        ingest(made, [torch.cat([part, part], dim=-1)[:, : part.shape[1]] for part in parts], *others)

    check(ingest_views, Case())


def test_parts_of_another_type_than_the_weights():
    def ingest_mixed(made, parts, *others):
        ingest(made, [part.float() for part in parts], *others)

    check(ingest_mixed, Case(dtype=torch.float16))


def test_a_folded_weight_stands_for_norms_with_weights():
    weight, x = torch.randn(6, 8), torch.randn(3, 8)
    norms = [torch.rand(4), torch.rand(4)]
    expected = (x * torch.cat(norms)) @ weight.T
    torch.testing.assert_close(x @ folded(weight, norms).T, expected)


STEPS = {
    "input norm": ("low += part_low * scale", "low += part_low"),
    "epsilon": ("squares / PART_WIDTH + epsilon", "squares / PART_WIDTH"),
    "second part": ("tl.static_range(NUM_PARTS)", "tl.static_range(1)"),
    "last columns": ("range(0, PART_WIDTH, BLOCK_COLUMNS)", "range(0, PART_WIDTH - BLOCK_COLUMNS, BLOCK_COLUMNS)"),
    "bias": ("if HAS_BIAS:", "if False:"),
    "k norm": ("if HAS_K_NORM:", "if False:"),
    "k norm of the whole head": (
        "tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)",
        "tl.sum(low * low, axis=1)",
    ),
    "rope of the first half": ("turned = low * cos - high * sin", "turned = low"),
    "rope of the second half": ("high = high * cos + low * sin", "high = high"),
    "direction of rope": ("turned = low * cos - high * sin", "turned = low * cos + high * sin"),
    "K of the last layer": ("if pool < NUM_LAYERS:", "if pool < NUM_LAYERS - 1:"),
    "heads": ("slots * NUM_HEADS + head)", "slots * NUM_HEADS)"),
    "second block of rows": ("tl.program_id(1) * BLOCK_ROWS + tl.arange", "tl.arange"),
}


def mutant(step: str, folder: Path) -> Call:
    """The kernel without `step`. Triton reads a kernel's source, so that it has to lie in a file."""
    source, (text, instead) = inspect.getsource(kernels), STEPS[step]
    assert source.count(text) == 1
    path = folder / "mutant.py"
    path.write_text(source.replace(text, instead))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mutant", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module.ingest


@pytest.mark.parametrize("step", STEPS)
def test_a_kernel_without_a_step_would_be_found(step, tmp_path):
    with pytest.raises(AssertionError, match="not close"):
        check(mutant(step, tmp_path), Case())


def made(**others: object) -> Ingestion:
    pools = tuple(torch.zeros(4, 1, 16) for _ in range(2))
    return Ingestion(**{"weight": torch.zeros(32, 8), "epsilon": 1e-6, "pools": pools} | others)


@pytest.mark.parametrize(
    "others, message",
    [
        ({"pools": tuple(torch.zeros(4, 1, 24) for _ in range(2))}, "head_dim 24"),
        ({"pools": tuple(torch.zeros(4, 1, 16, dtype=torch.float8_e5m2) for _ in range(2))}, "float8_e5m2"),
        ({"weight": torch.zeros(32, 8, dtype=torch.int8)}, "int8"),
        ({"pools": (torch.zeros(4, 1, 16), torch.zeros(4, 2, 16))}, "same shape and dtype"),
        ({"weight": torch.zeros(31, 8)}, "32 rows"),
        ({"weight": torch.zeros(8, 32).T}, "contiguous"),
        ({"bias": torch.zeros(16)}, "32 entries"),
        ({"k_norm": torch.zeros(2, 16)}, r"k_norm must be \[1, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        made(**others)


@pytest.mark.parametrize(
    "widths, table_width, message",
    [((8, 8), 16, "do not match"), ((4,), 16, "do not match"), ((4, 2), 16, "same shape"), ((8,), 8, "rotary")],
)
def test_parts_that_do_not_fit_are_refused(widths, table_width, message):
    index = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ingest(made(), [torch.zeros(3, width) for width in widths], torch.zeros(9, table_width), index, index)


# ---- what the kernel is compiled for


KERNEL = kernels.ingest_kernel
# Triton's interpreter keeps what a kernel was declared with.
DECLARED = KERNEL.kwargs["do_not_specialize"] if hasattr(KERNEL, "kwargs") else KERNEL.do_not_specialize
NOT_SPECIALIZED = {"do_not_specialize": DECLARED}


class Launches:
    """Stands for the kernel: which kernels Triton would have to have compiled for the launches, by its own rules."""

    def __init__(self, **options: object):
        kernel = JITFunction(KERNEL.fn, **(options or NOT_SPECIALIZED))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
        self.compiled: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Call:
        assert min(grid) > 0
        return self.launch

    def launch(self, *args: object, **kwargs: object) -> None:
        _, specialization, options = self.bind(*args, **kwargs)
        self.compiled.add(compute_cache_key({}, specialization, options))


def compiled(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_parts: int, **options: object
) -> tuple[set[str], set[str]]:
    """What a warm-up compiles, and what ingestion of any number of rows then needs."""
    warm, later = Launches(**options), Launches(**options)
    width = 24
    pools = tuple(torch.zeros(4, 2, 16, dtype=dtype, device=DEVICE) for _ in range(2))
    one = Ingestion(torch.zeros(64, num_parts * width, dtype=dtype, device=DEVICE), 1e-6, pools)
    tables = [rotary_table(16), torch.cat([rotary_table(16)] * 2), rotary_table(16).to(dtype)]
    monkeypatch.setattr(kernels, "ingest_kernel", warm)
    kernels.warm_up(one, num_parts, tables[0])
    monkeypatch.setattr(kernels, "ingest_kernel", later)
    for num_rows in range(1, 201):
        ring = torch.zeros(201, width + 8, dtype=dtype, device=DEVICE)
        index = torch.zeros(2 * num_rows + 1, dtype=torch.int64, device=DEVICE)
        parts = [  # as they are gathered; views that begin anywhere; rows apart; of another type
            torch.zeros(num_rows, width, dtype=dtype, device=DEVICE),
            torch.zeros(num_rows * width + 1, dtype=dtype, device=DEVICE)[1:].view(num_rows, width),
            ring[:num_rows, 1 : 1 + width],
            torch.zeros(num_rows, width, device=DEVICE),
        ]
        for number, part in enumerate(parts):
            table = tables[num_rows % len(tables)]
            positions, kv_slots = index[1 : num_rows + 1], index[num_rows + 1 :]
            ingest(one, [part, parts[0]][:num_parts] if number else [part] * num_parts, table, positions, kv_slots)
    return warm.compiled, later.compiled


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_nothing_is_left_to_compile_behind_a_warm_up(dtype, num_parts, monkeypatch):
    warm, later = compiled(monkeypatch, dtype, num_parts)
    assert later == warm
    assert len(warm) == (2 if dtype == torch.float32 else 2 * 3)  # block sizes, types of the table


def test_what_a_warm_up_left_out_would_be_found(monkeypatch):
    """A kernel that is specialized on everything, parts as they come, one block size only."""
    warm, later = compiled(monkeypatch, torch.float16, 1, do_not_specialize=[])
    assert later - warm
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "readable", lambda part, dtype: part)
        warm, later = compiled(patch, torch.float16, 1)
        assert later - warm
    with monkeypatch.context() as patch:
        sizes = kernels.block_sizes
        patch.setattr(kernels, "warm_up", lambda *args: None)
        warm, later = compiled(patch, torch.float16, 1)
        assert len(later) == 2 * len(sizes(made(weight=torch.zeros(32, 8, dtype=torch.float16)))) and not warm


def test_a_warm_up_writes_nothing():
    pools = tuple(torch.randn(4, 2, 16, device=DEVICE) for _ in range(4))
    before = [pool.clone() for pool in pools]
    kernels.warm_up(Ingestion(torch.randn(128, 8, device=DEVICE), 1e-6, pools), 1, rotary_table(16))
    assert all(torch.equal(pool, old) for pool, old in zip(pools, before, strict=True))
