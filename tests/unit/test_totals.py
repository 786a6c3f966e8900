"""Counters in total and by request, and as Prometheus metrics."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from whiflash_sglang.core.hints import Asked
from whiflash_sglang.core.spans import CONTEXT_KINDS, SPANS
from whiflash_sglang.core.types import CatchUp, HostRows, RoundResult
from whiflash_sglang.serving.not_drafted import NotDrafted
from whiflash_sglang.serving.record import Record
from whiflash_sglang.serving.totals import RequestFigures, Totals


def rows(slots: list[int]) -> HostRows:
    return HostRows(slots, [0] * len(slots))


def record(totals: Totals) -> Record:
    return Record(totals.reader, None, Asked(), [], [], None)


def result(plan: dict[str, list[int]], drafts: list[int], committed: list[int], **catch_ups: CatchUp) -> RoundResult:
    by_row = [next((name for name, rows in plan.items() if row in rows), None) for row in range(len(drafts))]
    tokens = torch.zeros(len(drafts), 8, dtype=torch.int64)
    return RoundResult(by_row, drafts, tokens, tokens, [[0] * count for count in committed], {}, catch_ups)


@pytest.fixture
def totals() -> Totals:
    """Slot 2: df, df, e3. Slot 5: e3, then not drafted for."""
    totals = Totals(("df", "e3"))
    for slot in (2, 5):
        totals.begin(slot, record(totals))
    totals.count(rows([2, 5]), result({"df": [0], "e3": [1]}, [7, 5], [8, 1]), {})
    totals.count(rows([2, 5]), result({"df": [0]}, [7, 0], [3, 1], df=CatchUp([2], [8], [0], 0.001)), {})
    totals.count(rows([2]), result({"e3": [0]}, [5], [2], e3=CatchUp([2, 5], [11, 2], [8, 0], 0.0013)), {})
    return totals


def test_totals(totals: Totals) -> None:
    figures = totals.snapshot()
    assert figures["rounds"] == 5
    assert figures["rounds_by_drafter"] == {"df": 2, "e3": 2, "none": 1}
    assert figures["drafted_by_drafter"] == {"df": 14, "e3": 10}
    assert figures["accepted_by_drafter"] == {"df": 9, "e3": 1}
    assert (figures["drafted"], figures["accepted_drafts"], figures["steps"]) == (24, 10, 3)
    assert figures["switches"] == 2
    assert figures["ingested_by_drafter"] == {"df": 8, "e3": 13}
    # One drafter came back to a request; 8 of the 13 tokens of that pass had been missed.
    assert figures["catch_up"] == {"passes": 1, "tokens": 8, "ms": 0.8}
    assert figures["backlog_max"] == 11
    assert figures["backlog_mean"] == 7.0
    totals.count_catch_ups({"e3": CatchUp([2, 5], [3, 0], [0, 0], 0.001)})
    assert totals.snapshot()["ingested_by_drafter"] == {"df": 8, "e3": 16}, "a request may lack nothing in a pass"


def test_a_request_is_counted_by_itself_and_stays_in_the_totals(totals: Totals) -> None:
    before = totals.snapshot()
    ended = totals.records[2]
    assert ended.figures()["rounds_by_drafter"] == {"df": 2, "e3": 1}
    assert ended.figures()["switches"] == 1
    assert totals.records[5].figures()["backlog_max"] == 2
    totals.begin(2, record(totals))
    assert totals.records[2].figures()["rounds"] == totals.records[2].figures()["backlog_max"] == 0
    assert totals.snapshot() == before, "the slot is reused"
    totals.end(5)
    totals.end(5)
    assert [*totals.records] == [2] and totals.snapshot() == before, "the request has ended"
    totals.count(rows([2]), result({"e3": [0]}, [5], [1]), {})
    assert totals.snapshot()["switches"] == before["switches"], "the first round of a request is no switch"
    assert ended.figures()["rounds"] == 3, "an ended request shows its own figures"


def numbers(figures: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """All numbers that may only grow, by their path."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{path}.{key}")
        elif key not in ("backlog_mean", "not_drafted_share"):
            found[f"{path}.{key}"] = value
    return found


def test_no_count_falls_when_requests_end() -> None:
    """A Prometheus counter must not fall, not even in its last digit, and refuses to."""
    totals, chance, shown = Totals(("df", "e3")), random.Random(0), dict[str, float]()
    for _ in range(500):
        slots = sorted(chance.sample(range(6), chance.randint(1, 6)))
        for slot in slots:
            if slot not in totals.records or chance.random() < 0.2:
                totals.begin(slot, record(totals))
        plan = [chance.choice(("df", "e3", None)) for _ in slots]
        made = result(
            {name: [i for i, one in enumerate(plan) if one == name] for name in ("df", "e3")},
            [3] * len(slots),
            [chance.randint(1, 4) for _ in slots],
        )
        lens = [chance.randint(1, 9) for _ in slots]
        late = CatchUp(slots, lens, [chance.randint(0, length) for length in lens], chance.random() / 1000)
        totals.count(rows(slots), made._replace(catch_ups={"df": late}), {})
        if chance.random() < 0.5:
            totals.end(chance.choice(slots))
        now = numbers(totals.snapshot())
        assert now.keys() >= shown.keys() and all(now[path] >= value for path, value in shown.items())
        shown = now
    assert len(totals.records) <= 6 and shown[".rounds"] > 1000


def test_figures_of_a_request_come_with_its_last_tokens(totals: Totals) -> None:
    ended = False
    request = SimpleNamespace(
        req_pool_idx=torch.tensor(2),
        finished=lambda: ended,
        kv_committed_len=40,
        origin_input_ids=[],
        output_ids=[],
    )
    counts = totals.records[2].counts
    figures = RequestFigures(totals, request, Asked())
    figures.begin(5)
    figures.record.counts = counts
    assert figures[0:5] == []
    ended = True
    own = totals.records[2].figures()
    assert own["by_span"] == {"answer": {"rounds": 3, "tokens": 13}}
    totals.end(2)
    assert figures[5:9] == [own | {"draft_kv_slots": {"df": 40, "e3": 40}}]


@pytest.mark.slow  # it starts a program that imports torch
def test_metrics_follow_the_totals() -> None:
    # In a process of its own: metrics are registered once for a whole process.
    program = """
from prometheus_client import generate_latest
from whiflash_sglang.serving.metrics import Metrics
from whiflash_sglang.serving.record import Counts
from whiflash_sglang.serving.totals import Totals
totals = Totals(("df", "e3"))
totals.pool = {"tokens": 100, "lost_to_draft_pools": 40}
metrics = Metrics(totals, {"model_name": "m"})
print(generate_latest().decode(), "----")
for rounds in (3, 5):
    totals.seconds["draft"] = rounds / 2
    totals.ended["user", "reasoning", "df"] = Counts(rounds, 4 * rounds)
    metrics.write(totals.snapshot())
totals.health.switch_off("e3")
totals.health.switch_off("df")
totals.not_drafted.count(4, 1)
metrics.write(totals.snapshot())
del totals.health.tried_at["df"]
totals.health.failures["e3"] += 3
metrics.write(totals.snapshot())
print(generate_latest().decode())
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    first, _, shown = printed.partition("----")
    for line in (
        *(f'whiflash_rounds_total{{drafter="{name}",model_name="m"}} 0.0' for name in ("df", "e3", "none")),
        'whiflash_switches_total{model_name="m"} 0.0',
        'whiflash_step_seconds_total{model_name="m",step="verify"} 0.0',
        *(f'whiflash_span_tokens_total{{model_name="m",span="{span}"}} 0.0' for span in SPANS),
        *(f'whiflash_context_rounds_total{{context_kind="{kind}",model_name="m"}} 0.0' for kind in CONTEXT_KINDS),
        'whiflash_kv_pool_tokens{kind="tokens",model_name="m"} 100.0',
        'whiflash_drafter_switched_off{drafter="e3",model_name="m"} 0.0',
    ):
        assert line in first.splitlines(), first
    for line in (
        'whiflash_rounds_total{drafter="df",model_name="m"} 5.0',
        'whiflash_step_seconds_total{model_name="m",step="draft"} 2.5',
        'whiflash_span_rounds_total{model_name="m",span="reasoning"} 5.0',
        'whiflash_context_tokens_total{context_kind="user",model_name="m"} 20.0',
        'whiflash_kv_pool_tokens{kind="lost_to_draft_pools",model_name="m"} 40.0',
        'whiflash_drafter_switched_off{drafter="e3",model_name="m"} 1.0',
        'whiflash_not_drafted_share{model_name="m"} 0.75',
        'whiflash_round_costs_wrong{model_name="m"} 0.0',
        'whiflash_drafter_switched_off{drafter="df",model_name="m"} 0.0',
        'whiflash_failed_drafts_total{drafter="e3",model_name="m"} 3.0',
    ):
        assert line in shown.splitlines(), shown


def test_a_server_that_drafts_nothing_says_so() -> None:
    """A server whose costs were wrong drafted for one round in ten, for as long as it lived, without a word."""
    share = NotDrafted()
    due = []
    for _ in range(2 * NotDrafted.ROWS):
        share.count(2, 0)
        due.append(share.is_due())
    assert due.count(True) == 1 and due.index(True) == NotDrafted.ROWS // 2 - 1
    assert "100%" in str(share) and "/whiflash/stats" in str(share)


def test_rows_that_may_not_be_drafted_for_do_not_count() -> None:
    totals = Totals(("df", "e3"))
    for slot in (2, 5):
        totals.begin(slot, record(totals))
    for _ in range(10):
        totals.count(rows([2, 5])._replace(draftable=[True, False]), result({"df": [0]}, [7, 0], [8, 1]), {})
    assert totals.snapshot()["not_drafted_share"] == 0.0
