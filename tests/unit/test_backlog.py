"""What waits for a drafter, and where it stands in the ring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.core.backlog import Backlog

SLOTS, CONTEXT, WIDTH = 3, 400, 4
TABLE = torch.arange(1000, 1000 + SLOTS * CONTEXT, dtype=torch.int32).view(SLOTS, CONTEXT)


def keep(backlog: Backlog, slots: list[int], lens: list[int]) -> None:
    """One window behind each request: token 7 * position + slot, feature 10000 * slot + position."""
    positions = torch.tensor(lens)[:, None] + torch.arange(WIDTH)
    rows = torch.tensor(slots)
    features = (10000 * rows[:, None] + positions).double()[:, :, None]
    backlog.push(rows, torch.tensor(lens), 7 * positions + rows[:, None], features)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), capacity=st.integers(WIDTH, 20))
def test_what_is_taken_is_what_waits(data: st.DataObject, capacity: int) -> None:
    backlog = Backlog(["df"], 1, torch.float64, TABLE, capacity)
    lens = [data.draw(st.integers(1, 30)) for _ in range(SLOTS)]
    first = torch.tensor([[10000.0 * slot + lens[slot] - 1] for slot in range(SLOTS)], dtype=torch.float64)
    backlog.begin(range(SLOTS), lens, first)
    ingested = list(lens)
    for _ in range(data.draw(st.integers(1, 12))):
        slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
        last = backlog.last(torch.tensor(slots), torch.tensor([lens[slot] for slot in slots]))
        assert last[:, 0].tolist() == [10000 * slot + lens[slot] - 1 for slot in slots]
        due = [slot for slot in slots if backlog.overdue("df", [slot], [lens[slot]], WIDTH) or data.draw(st.booleans())]
        entries = backlog.take("df", due, [lens[slot] for slot in due])
        waiting = [(slot, position) for slot in due for position in range(ingested[slot], lens[slot])]
        if entries is None:
            assert not waiting
        else:
            assert entries.positions.tolist() == [position for _, position in waiting]
            assert entries.next_tokens.tolist() == [7 * position + slot for slot, position in waiting]
            assert entries.features[:, 0].tolist() == [10000 * slot + position for slot, position in waiting]
            assert entries.kv_slots.tolist() == [1000 + CONTEXT * slot + position for slot, position in waiting]
            assert entries.kv_slots.dtype == torch.int64
        for slot in due:
            ingested[slot] = lens[slot]
        keep(backlog, slots, [lens[slot] for slot in slots])
        for slot in slots:
            lens[slot] += data.draw(st.integers(1, WIDTH))
            assert backlog.length("df", slot, lens[slot]) == lens[slot] - ingested[slot] <= capacity


def test_missed_is_what_waited_before_the_last_round() -> None:
    backlog = Backlog(["df"], 1, torch.float64, TABLE, 16)
    backlog.begin([1], [10], torch.zeros(1, 1, dtype=torch.float64))
    missed = []
    for committed in (10, 14, 17):  # what each round begins with
        missed.append(backlog.missed("df", 1))
        backlog.begin_round([1], [committed])
    assert missed == [0, 0, 4]
    assert backlog.length("df", 1, 21) == 11


def test_a_new_request_in_a_slot_has_no_backlog() -> None:
    backlog = Backlog(["df"], 1, torch.float64, TABLE, 16)
    keep(backlog, [2], [5])
    backlog.begin([2], [3], torch.ones(1, 1, dtype=torch.float64))
    assert backlog.take("df", [2], [3]) is None
    assert backlog.last(torch.tensor([2]), torch.tensor([3])).item() == 1.0


def test_the_ring_is_as_large_as_said() -> None:
    backlog = Backlog(["df", "e3"], 8, torch.bfloat16, TABLE, 16)
    assert (tuple(backlog.features.shape), backlog.features.dtype) == ((48, 8), torch.bfloat16)
    with pytest.raises(KeyError):
        backlog.take("other", [0], [1])
