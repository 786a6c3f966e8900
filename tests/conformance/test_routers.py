"""What every router promises to the round (`round.Router`), whatever its policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learned import HIDDEN, cost_table, network
from whiflash_sglang.calibration import Calibration
from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.priors import Priors
from whiflash_sglang.round import Router
from whiflash_sglang.router import Learned, create_router
from whiflash_sglang.router.artefact import NeuralRouter
from whiflash_sglang.types import Accepted, Plan, RoundResult, Rows, Standing

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
STANDINGS = (Standing("reasoning", "user", None, 0.0, "auto", -1.5), Standing("answer", "user", "x", 4.0, "e3", 2.0))


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


def rows(slots: list[int], prefix_lens: list[int], draftable: list[bool] | None) -> Rows:
    n = len(slots)
    flags = None if draftable is None else torch.tensor(draftable)
    zeros = torch.zeros(n, dtype=torch.int64)
    standings = tuple(STANDINGS[slot % 2] for slot in slots)
    kv_slots = torch.zeros(n, 9, dtype=torch.int64)
    return Rows(torch.tensor(slots), zeros, torch.tensor(prefix_lens), kv_slots, flags, standings)


def outcome(plan: Plan, n: int) -> RoundResult:
    """A round in which every row committed three tokens."""
    lengths = torch.full((n,), 3)
    return RoundResult(plan, lengths, Accepted(lengths[:, None], lengths, lengths), lengths, {}, {}, lengths[:, None])


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
        assert set(plan) <= {"df", "e3"}
        assert all(len(index) for index in plan.values()), "no drafter is called for no row"
        chosen = sorted(row for index in plan.values() for row in index.tolist())
        expected = [row for row in range(len(slots)) if flags is None or flags[row]]
        assert chosen == expected or ("costs" in name and not plan), "a batch may go without drafts, but as a whole"
        n = len(slots)
        router.observe(torch.tensor(slots), torch.randn(n, VOCAB), torch.randn(n, HIDDEN), torch.arange(n))
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
        of_9 = next(drafter for drafter, index in plan.items() if 1 in index.tolist())
        assert list(alone.route(rows([9], [lens[1]], None))) == [of_9]
        together.observe(torch.tensor(slots), logits, hidden, torch.arange(3))
        alone.observe(torch.tensor([9]), logits, hidden, torch.tensor([1]))
        lens, logits, hidden = [n + 3 for n in lens], logits.roll(1, dims=0), hidden.roll(1, dims=0)
