"""What every router promises to the round (`round.Router`), whatever its policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learned import HIDDEN, cost_table, network
from whiflash_sglang.core.round import Router
from whiflash_sglang.core.types import HostRows, Plan, RoundResult, RowState
from whiflash_sglang.routing import Learned, create_router
from whiflash_sglang.routing.artefact import NeuralRouter
from whiflash_sglang.routing.calibration import Calibration
from whiflash_sglang.routing.priors import Priors
from whiflash_sglang.startup.config import WhiFlashConfig

SLOTS, VOCAB = 16, 7
LENGTHS = {"df": 5.0, "e3": 5.0}
NEURAL = NeuralRouter(network(), "e3", 0.0, LENGTHS)
CALIBRATION = Calibration(LENGTHS, 0.5, (0.2, 1.0), (-2.0, 0.0, 2.0), None)
# By name and objective; those that weigh costs plan a batch as a whole, the others row by row.
BY_ROW = {
    **{name: (name, None) for name in ("fixed:e3", "fixed:df", "alternate", "random:7")},
    "entropy": ("entropy", "acceptance"),
    "neural": ("neural", "acceptance"),
}
BY_BATCH = {"entropy by costs": ("entropy", "tokens_per_ms"), "neural by costs": ("neural", "tokens_per_ms")}
WITH_PRIORS = {"entropy by costs, priors": "entropy by costs", "neural, priors": "neural"}
STATES = (RowState("reasoning", "user", None, 0.0, "auto", -1.5), RowState("answer", "user", "x", 4.0, "e3", 2.0))


def create(name: str) -> Router:
    router, objective = {**BY_ROW, **BY_BATCH}[WITH_PRIORS.get(name, name)]
    config = WhiFlashConfig(
        dflash_draft="d",
        eagle_draft="e",
        router=router,
        objective=objective,
        neural_router_path="r" if router == "neural" else None,
        calibration="c" if router == "entropy" else None,
    )
    learned = Learned(NEURAL, CALIBRATION, Priors() if name in WITH_PRIORS else None)
    return create_router(config, SLOTS, learned, cost_table())


def rows(slots: list[int], prefix_lens: list[int], draftable: list[bool] | None) -> HostRows:
    return HostRows(slots, prefix_lens, draftable, [STATES[slot % 2] for slot in slots])


def outcome(plan: Plan, n: int) -> RoundResult:
    """A round in which every row committed three tokens."""
    tokens = torch.zeros(n, 4, dtype=torch.int64)
    return RoundResult(plan, [3] * n, tokens, tokens, [[0, 0, 0]] * n, {}, {})


def tell(router: Router, slots: list[int], logits: torch.Tensor, hidden: torch.Tensor, at: list[int]) -> None:
    """What the round does with a router behind a forward."""
    signals = router.observe(logits, hidden, torch.tensor(at))
    if signals is not None:
        assert signals.shape[0] == len(slots) and signals.dim() == 2 and signals.is_floating_point()
        router.keep(slots, signals.tolist())


@pytest.mark.parametrize("name", [*BY_ROW, *BY_BATCH, *WITH_PRIORS])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_each_draftable_row_has_one_drafter_and_no_other_row_any(name: str, data: st.DataObject) -> None:
    router = create(name)
    lens = dict.fromkeys(range(SLOTS), 3)
    for _ in range(data.draw(st.integers(1, 8), label="rounds")):
        slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True), label="slots")
        flags = data.draw(st.none() | st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        batch = rows(slots, [lens[slot] for slot in slots], flags)
        plan = router.route(batch)
        assert len(plan) == len(slots) and set(plan) <= {"df", "e3", None}
        chosen = [row for row, drafter in enumerate(plan) if drafter is not None]
        expected = [row for row in range(len(slots)) if flags is None or flags[row]]
        assert chosen == expected or ("costs" in name and not any(plan)), (
            "a batch may go without drafts, but as a whole"
        )
        n = len(slots)
        tell(router, slots, torch.randn(n, VOCAB), torch.randn(n, HIDDEN), [*range(n)])
        router.learn(batch, outcome(plan, len(slots)), data.draw(st.floats(1, 50), label="ms"))
        for slot in slots:
            lens[slot] += 2


@pytest.mark.parametrize("name", BY_ROW)
def test_a_request_is_routed_the_same_alone_and_among_others(name: str) -> None:
    together, alone = create(name), create(name)
    slots, lens = [4, 9, 2], [5, 30, 12]
    generator = torch.Generator().manual_seed(1)
    logits, hidden = torch.randn(3, VOCAB, generator=generator) * 3, torch.randn(3, HIDDEN, generator=generator)
    for _ in range(4):
        plan = together.route(rows(slots, lens, None))
        assert list(alone.route(rows([9], [lens[1]], None))) == [plan[1]]
        tell(together, slots, logits, hidden, [0, 1, 2])
        tell(alone, [9], logits, hidden, [1])
        lens, logits, hidden = [n + 3 for n in lens], logits.roll(1, dims=0), hidden.roll(1, dims=0)


@pytest.mark.parametrize("name", [*BY_ROW, *BY_BATCH, *WITH_PRIORS])
def test_windows_are_read_where_they_end(name: str) -> None:
    """Logits of whole windows [rows, width, vocab] count as one row of positions behind the other."""
    generator = torch.Generator().manual_seed(2)
    logits, hidden = torch.randn(3, 4, VOCAB, generator=generator), torch.randn(3, 4, HIDDEN, generator=generator)
    windows, single = create(name), create(name)
    found = windows.observe(logits, hidden, torch.tensor([2, 4, 11]))
    expected = single.observe(logits[[0, 1, 2], [2, 0, 3]], hidden[[0, 1, 2], [2, 0, 3]], torch.arange(3))
    assert (found is None) == (expected is None)
    assert found is None or torch.allclose(found, expected)


@pytest.mark.parametrize("name", BY_ROW)
def test_what_is_not_kept_changes_nothing(name: str) -> None:
    """The numbers of a round count from when the host has got them, and only for the requests that they are of."""
    told, untold = create(name), create(name)
    for router in (told, untold):
        router.observe(torch.zeros(1, VOCAB), torch.ones(1, HIDDEN), torch.arange(1))
    tell(told, [3], torch.zeros(1, VOCAB), torch.ones(1, HIDDEN), [0])
    assert told.route(rows([5, 7], [4, 9], None)) == untold.route(rows([5, 7], [4, 9], None))
