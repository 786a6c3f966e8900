"""Seeded sampling on a CPU: SGLang's hash in torch, and a token's noise that does not hang on a batch's filters."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers import sampler

from whiflash_sglang.cpu import fallbacks

SEEDS = torch.tensor([0, 42, 2**40 + 7, 2**62 + 12345])
POSITIONS = torch.tensor([0, 5, 8000, 70000])


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash where SGLang's sampler looks for it; and the sampler not compiled, as the platform has it."""
    monkeypatch.setattr(sampler, "murmur_hash32", fallbacks.murmur_hash32)
    plain = getattr(sampler.multinomial_with_seed, "_torchdynamo_orig_callable", sampler.multinomial_with_seed)
    monkeypatch.setattr(sampler, "multinomial_with_seed", plain)


def murmur3(data: bytes) -> int:
    """MurmurHash3 (32 bits, seed 0) of whole words, as Austin Appleby published it."""

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & 0xFFFFFFFF

    state = 0
    for i in range(0, len(data), 4):
        word = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        state ^= rotated(word, 15) * 0x1B873593 & 0xFFFFFFFF
        state = (rotated(state, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16


def test_the_hash_is_murmur3_of_seed_position_and_column() -> None:
    assert murmur3(b"test") == 0xBA6BD213, "a published value"
    found = fallbacks.murmur_hash32(SEEDS.to(torch.uint64), POSITIONS, torch.arange(6))
    assert found.dtype == torch.uint32
    for row, (seed, position) in enumerate(zip(SEEDS.tolist(), POSITIONS.tolist(), strict=True)):
        for column in range(6):
            data = seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little")
            assert int(found[row, column]) == murmur3(data)


def test_the_hash_is_that_of_sglangs_kernel() -> None:
    """Sums over 1,300 columns that SGLang 0.5.17's kernel gave in Triton's interpreter (TRITON_INTERPRET=1)."""
    found = fallbacks.murmur_hash32(SEEDS.to(torch.uint64), POSITIONS, torch.arange(1300)).to(torch.int64)
    assert found.sum(dim=1).tolist() == [2715893501829, 2786094578031, 2807610089052, 2834317615450]


def sample(probs: torch.Tensor, top_k: int, top_p: float, min_p: float, seeds: torch.Tensor | None) -> torch.Tensor:
    rows = len(probs)
    return fallbacks.sample_filtered(
        sampler.top_k_top_p_min_p_sampling_from_probs_torch,
        probs,
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        min_p > 0,
        seeds,
        torch.arange(rows),
    )


def test_a_seeded_row_has_the_same_token_whether_its_batch_filters_or_not() -> None:
    """SGLang numbers a filtering batch's noise by rank, any other's by token: a neighbour's top-k changed a text."""
    probs = torch.randn(500, 200, generator=torch.Generator().manual_seed(0)).softmax(-1)
    seeds = torch.full((500,), 9)
    unfiltered = sampler.sampling_from_probs_torch(probs, seeds, torch.arange(500))
    assert torch.equal(sample(probs, 1 << 30, 1.0, 0.0, seeds), unfiltered)


def test_seeded_samples_keep_to_the_filters_and_have_the_distribution() -> None:
    probs = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05]).expand(20_000, -1)
    seeds = torch.full((20_000,), 3)
    for top_k, top_p, min_p, kept in [(2, 1.0, 0.0, [0, 2]), (5, 0.6, 0.0, [0, 2]), (5, 1.0, 0.3, [0, 2, 3])]:
        found = sample(probs, top_k, top_p, min_p, seeds).bincount(minlength=5) / 20_000
        expected = torch.zeros(5).index_copy(0, torch.tensor(kept), probs[0, kept] / probs[0, kept].sum())
        assert torch.allclose(found, expected.to(found.dtype), atol=0.015)
        assert bool((found[expected == 0] == 0).all())


def test_without_seeds_sampling_is_sglangs() -> None:
    probs = torch.tensor([0.6, 0.4]).expand(50, -1).contiguous()
    torch.manual_seed(0)
    found = sample(probs.clone(), 2, 1.0, 0.0, None)
    torch.manual_seed(0)
    rows = torch.full((50,), 2), torch.full((50,), 1.0), torch.zeros(50)
    original = sampler.top_k_top_p_min_p_sampling_from_probs_torch
    assert torch.equal(found, original(probs.clone(), *rows, False, None, torch.arange(50)))
