"""Kernels on a machine without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from whiflash_sglang.drafters.ingest_kernel import HEAD_DIMS, Ingestion, constants_of, ingest_kernel, num_warps

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on any GPU from Ampere on


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """All of tests/kernels, in a process that imports Triton for its interpreter."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    environment = inherited | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


KINDS = [*((torch.bfloat16, head_dim) for head_dim in HEAD_DIMS), (torch.float16, 128), (torch.float32, 128)]
# These go through every branch of the kernel: tensor cores of both generations or none, wide heads or narrow ones.
BRANCHES = {(torch.bfloat16, 128, 80), (torch.bfloat16, 128, 90), (torch.bfloat16, 256, 90), (torch.float32, 128, 80)}
as_the_others = pytest.mark.nightly(reason="compiles the branches that other sizes and types compile too")


@pytest.mark.parametrize(
    "dtype, head_dim, capability",
    [
        pytest.param(*kind, capability, marks=[] if (*kind, capability) in BRANCHES else as_the_others)
        for kind in KINDS
        for capability in (80, 90)
    ],
)
def test_ingestion_compiles_for_gpus(dtype, head_dim, capability, tmp_path, monkeypatch):
    """Down to machine code, with the blocks of a long prompt; it says nothing of what the code does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = Ingestion(
        weight=torch.empty(2 * 8 * head_dim, 8192, dtype=dtype, device="meta"),
        epsilon=1e-6,
        pools=tuple(torch.empty(4, 8, head_dim, dtype=dtype, device="meta") for _ in range(2)),
        bias=torch.empty(2 * 8 * head_dim, dtype=dtype, device="meta"),
        k_norm=torch.empty(1, head_dim, dtype=dtype, device="meta"),
    )
    constants = constants_of(made, num_parts=2, num_rows=4096)
    arguments = {
        **dict.fromkeys(("first", "last", "weight", "bias", "k_norm"), f"*{SHORT[dtype]}"),
        "cos_sin": "*fp32",
        **dict.fromkeys(("positions", "kv_slots", "addresses"), "*i64"),
        "num_rows": "i32",
        "epsilon": "fp32",
    }
    # As at a launch: multiples of 16, but for what is not specialized, and epsilon.
    names = [name for name in arguments if name not in ("num_rows", "positions", "kv_slots", "epsilon")]
    aligned = {(list(arguments).index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(ingest_kernel, arguments | dict.fromkeys(constants, "constexpr"), constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": num_warps(made)})
    assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY
    if dtype != torch.float32:
        assert "mma" in compiled.asm["ptx"]  # tensor cores
