"""The stand-in for CUDA graphs does what they do, and refuses what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.pretend_graph import CaptureError, PretendGraph, PretendGraphs


@pytest.fixture(params=[torch.inference_mode, torch.no_grad], autouse=True)
def mode(request):
    with request.param():
        yield


def recorded(function: Callable[..., Any], *args: Any) -> tuple[PretendGraph, Any]:
    graph = PretendGraph()
    with graph.recording():
        result = function(*args)
    return graph, result


def after_replay(function: Callable[[torch.Tensor], Any], first: torch.Tensor, then: torch.Tensor) -> Any:
    """What `function`, recorded with `first`, gives for `then`."""
    x = first.clone()
    graph, result = recorded(function, x)
    x.copy_(then)
    graph.replay()
    return result


# What a recording has to follow. Each is a function of a float tensor [4, 3].
FOLLOWED: dict[str, Callable[[torch.Tensor], Any]] = {
    "made of others": lambda x: F.linear(x, x) + x.reshape(-1)[:4] * 2,
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "in place of a view": lambda x: [y := x.clone(), y[1].zero_(), y[:, 2].copy_(y[:, 0])][0],
    "a view": lambda x: (x + 1).view(3, 4).t()[1:, ::2],
    "a view of the input": lambda x: x.t(),
    "out": lambda x: torch.add(x, x, out=torch.empty(4, 3)),
    "one of out": lambda x: torch.max(x, dim=1, out=(torch.empty(4), torch.empty(4, dtype=torch.int64))),
    "split": lambda x: [part + 1 for part in (x * 2).split([1, 3])],
    "unbind": lambda x: (x * 2).unbind(1),
    "max": lambda x: tuple(x.max(dim=1)),
    "topk": lambda x: tuple(x.topk(2)),
    "factories": lambda x: x + torch.arange(3) + torch.zeros(3) + torch.full((3,), 2.0) + torch.ones_like(x),
    "filled": lambda x: torch.empty_like(x).fill_(3) * x,
    "a number": lambda x: [y := x.clone(), y.__setitem__((slice(1, 3), 0), 9.0)][0],
    "a mask": lambda x: [y := x.clone(), y.__setitem__(x > 1, -1.0)][0],
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "index": lambda x: x[x[:, 0].argsort()],
    "scatter": lambda x: torch.zeros(8, 3).index_put_((x[:, 0].long().remainder(8),), x, accumulate=True),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "repeated": lambda x: x.repeat_interleave(torch.arange(4), dim=0, output_size=6),
    "iterated": lambda x: torch.stack([row.sum() for row in x]),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_replay_follows_the_input(name):
    function = FOLLOWED[name]
    first, then = torch.randn(4, 3) * 3, torch.randn(4, 3) * 3
    found = after_replay(function, first, then)
    torch.testing.assert_close(found, function(then), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, function(first), rtol=0, atol=0)


def test_python_does_not_run_again_and_its_numbers_are_frozen():
    calls, scale = [], [2.0]

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * scale[0] if len(calls) == 1 else x + 100

    x = torch.ones(3)
    graph, y = recorded(double, x)
    scale[0] = 5.0
    for value in (1.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3
    assert calls == [3]


def test_random_numbers_are_drawn_anew():
    graph, drawn = recorded(lambda: torch.rand(5))
    torch.manual_seed(3)
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(drawn, first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(5), first)


def test_a_recording_leaves_memory_as_it_was():
    count, pool = torch.tensor([5]), torch.zeros(4, 2)

    def step() -> torch.Tensor:
        count.add_(1)
        pool[:2].copy_(torch.ones(2, 2))
        torch.mul(pool, 3, out=pool)
        return pool + 1

    graph, result = recorded(step)
    assert count.tolist() == [5] and not pool.any()
    assert result.isnan().all()  # nothing was computed, as far as anybody can see
    graph.replay()
    graph.replay()
    assert count.tolist() == [7]
    assert torch.equal(pool, torch.tensor([[3.0, 3.0]] * 2 + [[0.0, 0.0]] * 2)) and torch.equal(result, pool + 1)


def test_memory_counts_and_not_the_tensor():
    """Giving a tensor another shape, or a parameter other memory, changes nothing for the graph."""
    x, layer = torch.ones(4), torch.nn.Linear(4, 1, bias=False)
    layer.weight.data = old = torch.ones(1, 4)
    graph, y = recorded(lambda: layer(x))
    layer.weight.data = torch.full((1, 4), 50.0)
    old.mul_(2)
    x.unsqueeze_(0)
    graph.replay()
    assert y.tolist() == [8.0]


def test_memory_that_is_gone_is_not_read():
    x, mask = torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    view = mask[:2]
    graph, y = recorded(x.mul, mask)
    del mask
    graph.replay()  # a view of it is still there
    assert y.tolist() == [1.0, 0.0, 1.0]
    del view
    with pytest.raises(CaptureError, match=r"mul in recorded < test_memory_that_is_gone"):
        graph.replay()


def test_what_the_recording_made_is_kept():
    x = torch.ones(2)

    def mean_of_two() -> torch.Tensor:
        parts = [x * scale for scale in (1, 3)]
        return (parts[0] + parts[1]) / 2

    graph, y = recorded(mean_of_two)
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [8.0, 8.0]


X, INDEX, MASK = torch.ones(4), torch.tensor([1, 2]), torch.tensor([True, False, True, False])

FORBIDDEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "item": ("_local_scalar_dense", lambda: X[0].item()),
    "bool": ("_local_scalar_dense", lambda: bool(X.sum() > 0)),
    "int": ("_local_scalar_dense", lambda: int(INDEX[0])),
    "slice": ("_local_scalar_dense", lambda: X[: INDEX[0]]),
    "tolist": ("tolist", lambda: X.tolist()),
    "numpy": ("numpy", lambda: X.numpy()),
    "asarray": ("__array__", lambda: np.asarray(X)),
    "equal": ("equal", lambda: torch.equal(X, X)),
    "allclose": ("allclose", lambda: torch.allclose(X, X)),
    "nonzero": ("nonzero", lambda: MASK.nonzero()),
    "where": ("nonzero", lambda: torch.where(MASK)),
    "masked_select": ("masked_select", lambda: X.masked_select(MASK)),
    "mask": ("index", lambda: X[MASK]),
    "mask put": ("index_put_", lambda: X.clone().__setitem__(MASK, torch.ones(2))),
    "unique": ("_unique2", lambda: INDEX.unique()),
    "repeat_interleave": ("repeat_interleave", lambda: INDEX.repeat_interleave(INDEX)),
    "tensor": ("lift_fresh", lambda: torch.tensor([1, 2])),
    "number": ("lift_fresh", lambda: torch.tensor(1.0)),
    "as_tensor": ("lift_fresh", lambda: torch.as_tensor([1, 2])),
    "from_numpy": ("lift_fresh", lambda: torch.from_numpy(np.zeros(2))),
    "new_tensor": ("lift_fresh", lambda: X.new_tensor([1, 2])),
    "list of indices": ("lift_fresh", lambda: X[[0, 1]]),
    "number put": ("index_put_", lambda: X.clone().__setitem__(INDEX, 3.0)),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_cannot_be_captured_raises_with_who_did_it(name):
    operation, function = FORBIDDEN[name]

    def model() -> Any:
        return function()

    with pytest.raises(CaptureError, match=rf"^{operation} in <lambda> < model < recorded"):
        recorded(model)
    function()  # outside of a recording nobody minds, also after one that failed


def test_a_graph_is_recorded_once():
    graph, _ = recorded(lambda: X + 1)
    with pytest.raises(CaptureError, match="once"), graph.recording():
        pass


class Model(torch.nn.Module):
    """The shape of a draft step: gather, two layers, a norm, entries for a pool, and the best of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 8)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.pool = torch.zeros(32, 8)

    def forward(self, ids: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding.weight.index_select(0, ids)
        x = F.rms_norm(x + self.second(F.silu(self.first(x))), (8,))
        self.pool.index_put_((slots,), x)
        logits = x @ self.embedding.weight.T
        return logits.argmax(dim=-1), self.pool.index_select(0, slots.flip(0)).sum(0)


def test_a_model_is_the_same_replayed_as_eager():
    model = Model()
    ids, slots = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    graph, (best, pooled) = recorded(model, ids, slots)
    for _ in range(3):
        ids.copy_(torch.randint(20, (5,)))
        slots.copy_(torch.randperm(32)[:5])
        model.pool.zero_()
        expected_best, expected = model(ids, slots)
        expected_pool = model.pool.clone()
        model.pool.zero_()
        graph.replay()
        assert torch.equal(best, expected_best) and torch.equal(pooled, expected)
        assert torch.equal(model.pool, expected_pool) and expected_pool.any()


def test_graphs_share_what_they_were_given():
    """A buffer that one writes and the other reads, as hidden states of the target and a drafter."""
    x, shared = torch.ones(3), torch.zeros(3)
    first, _ = recorded(lambda: shared.copy_(x * 2))
    second, y = recorded(lambda: shared + 1)
    for value in (1.0, 7.0):
        x.fill_(value)
        first.replay()
        second.replay()
        assert y.tolist() == [2 * value + 1] * 3


def test_backend_warms_up_twice_and_replays_by_key():
    x, calls, hooks = torch.ones(4), [], []
    backend = PretendGraphs()

    def forward(rows: int) -> Callable[[], torch.Tensor]:
        return lambda: [calls.append(rows), x[:rows] * 2][1]

    with backend.capture_session(None):
        for rows in (4, 2):
            backend.capture_one(rows, forward(rows), post_warmup_hook=lambda: hooks.append(1))
    assert calls == [4] * 3 + [2] * 3 and len(hooks) == 4
    assert backend.can_run(None, 2) and not backend.can_run(None, 3)
    x.fill_(5)
    with backend.replay_session():
        assert backend.replay(2, None).tolist() == [10.0, 10.0]
    assert backend.replays == [2] and len(calls) == 6
    backend.cleanup()
    assert not backend.can_run(None, 2)


def test_backend_has_what_sglang_asks_for():
    base = pytest.importorskip("sglang.srt.model_executor.runner_backend.base_cuda_graph_backend")
    assert [name for name in base.BaseCudaGraphBackend.__abstractmethods__ if not hasattr(PretendGraphs, name)] == []
