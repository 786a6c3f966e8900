"""The target's head for a drafter without one: the same token from parts on several ranks as from the whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from whiflash_sglang.drafters import runner

HIDDEN = 4


class Ranks:
    """Ranks as threads that gather what they give."""

    def __init__(self, size: int):
        self.world_size = size
        self.barrier = threading.Barrier(size)
        self.given: dict[int, torch.Tensor] = {}
        self.rank = threading.local()

    def all_gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        self.given[self.rank.number] = part
        self.barrier.wait()
        whole = torch.cat([self.given[rank] for rank in range(self.world_size)], dim=dim)
        self.barrier.wait()
        return whole


def best(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor, hidden: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Every rank's tokens. The vocabulary is filled up to a multiple of the ranks with rows that would always win."""
    vocab_size, ranks = len(weight), Ranks(size)
    monkeypatch.setattr(runner, "get_tp_group", lambda: ranks)
    rows = -(-vocab_size // size)
    filled = torch.cat([weight, torch.full((rows * size - vocab_size, HIDDEN), 1e6)])

    def one(rank: int) -> torch.Tensor:
        ranks.rank.number = rank
        start = rank * rows
        shard = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=min(vocab_size, start + rows))
        head = SimpleNamespace(weight=filled[start : start + rows], shard_indices=shard)
        return runner.TargetHead(SimpleNamespace(lm_head=head), vocab_size).best(hidden)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_best_token_is_that_of_the_whole_head(monkeypatch, size):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(17, HIDDEN, generator=generator)
    hidden = torch.randn(5, 7, HIDDEN, generator=generator).abs()
    expected = (hidden @ weight.T).argmax(dim=-1)
    assert len(expected.unique()) > 3
    assert all(torch.equal(tokens, expected) for tokens in best(monkeypatch, weight, hidden, size))


@pytest.mark.parametrize("size", [1, 3])
def test_logits_are_made_for_some_rows_at_a_time(monkeypatch, size):
    """And the tokens are those of all rows at once."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(17, HIDDEN, generator=generator)
    hidden = torch.randn(9, 15, HIDDEN, generator=generator).abs()
    whole = best(monkeypatch, weight, hidden, size)
    made: list[int] = []
    project = runner.project
    monkeypatch.setattr(runner, "HEAD_ROWS", 16)
    monkeypatch.setattr(runner, "project", lambda x, weight: made.append(len(x)) or project(x, weight))
    assert all(map(torch.equal, best(monkeypatch, weight, hidden, size), whole))
    assert max(made) == 16 and sum(made) == size * 9 * 15


def test_of_equals_the_lowest_token_wins_on_every_rank(monkeypatch):
    weight = torch.zeros(8, HIDDEN)
    weight[[1, 6]] = 1.0
    hidden = torch.ones(1, HIDDEN)
    assert [tokens.tolist() for tokens in best(monkeypatch, weight, hidden, 2)] == [[1], [1]]


def test_a_rank_without_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(runner, "get_tp_group", lambda: SimpleNamespace(world_size=8))
    shard = SimpleNamespace(org_vocab_start_index=64, org_vocab_end_index=64)
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=torch.zeros(8, HIDDEN), shard_indices=shard))
    with pytest.raises(ValueError, match=r"--tp-size 8.*smaller"):
        runner.TargetHead(model, 60)
