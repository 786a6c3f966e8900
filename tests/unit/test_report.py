"""What is made of measured turns: counters summed and subtracted, percentiles, and the table."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from whiflash_workloads.report import TABLE_WIDTH, Report, Totals, Turn, difference, merge, sum_of, table

BEFORE: Totals = {
    "rounds": 10,
    "rounds_by_drafter": {"df": 10},
    "accepted_drafts": 20,
    "switches": 1,
    "seconds": {
        "prefill": 1.0,
        "verify": 1.0,
        "draft": 0.5,
        "catch_up": 0.5,
        "prefill_drafters": 0.0,
        "read": 0.0,
        "round": 4.0,
    },
}
AFTER: Totals = {
    "rounds": 30,
    "rounds_by_drafter": {"df": 15, "e3": 15},
    "accepted_drafts": 70,
    "switches": 5,
    "seconds": {
        "prefill": 1.5,
        "verify": 3.0,
        "draft": 1.5,
        "catch_up": 1.0,
        "prefill_drafters": 0.0,
        "read": 0.0,
        "round": 9.0,
    },
}
MEANWHILE: Totals = {
    "rounds": 20,
    "rounds_by_drafter": {"df": 5, "e3": 15},
    "accepted_drafts": 50,
    "switches": 4,
    "seconds": {
        "prefill": 0.5,
        "verify": 2.0,
        "draft": 1.0,
        "catch_up": 0.5,
        "prefill_drafters": 0.0,
        "read": 0.0,
        "round": 5.0,
    },
}


def turn(index: int = 2, ttft_s: float | None = 0.1, tpot_s: float | None = 0.01, error: str | None = None) -> Turn:
    tokens = 0 if error else 10
    return Turn("s", index, "text", tokens * 10, tokens, tokens, ttft_s, tpot_s, 0, False, error)


def rendered(figures_by_label: dict[str, dict[str, Any]]) -> list[str]:
    console = Console(width=TABLE_WIDTH, file=io.StringIO())
    console.print(table(figures_by_label))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


# Counters


def test_what_was_counted_between_two_snapshots() -> None:
    """A drafter first used in between counts from nought."""
    assert difference(AFTER, BEFORE) == MEANWHILE


def test_nothing_was_counted_between_a_snapshot_and_itself() -> None:
    figures = Report("x", (), 1.0, difference(AFTER, AFTER)).figures()
    assert (figures["rounds"], figures["acceptance_length"], figures["share_by_drafter"]) == (0, None, {})


counters = st.dictionaries(st.sampled_from(["df", "e3", "none"]), st.integers(0, 10**6))
snapshots = st.fixed_dictionaries({"rounds": st.integers(0, 10**6), "rounds_by_drafter": counters})


@given(snapshots, snapshots)
def test_difference_undoes_a_sum(first: Totals, second: Totals) -> None:
    total = sum_of([first, second])
    back = difference(total, first)
    assert back["rounds"] == second["rounds"]
    assert {name: n for name, n in back["rounds_by_drafter"].items() if n} == {
        name: n for name, n in second["rounds_by_drafter"].items() if n
    }


def test_a_sum_leaves_its_parts_alone() -> None:
    part: Totals = {"rounds": 1, "rounds_by_drafter": {"df": 1}}
    assert sum_of([part, part]) == {"rounds": 2, "rounds_by_drafter": {"df": 2}}
    assert part == {"rounds": 1, "rounds_by_drafter": {"df": 1}}


def test_figures_of_the_counters() -> None:
    figures = Report("df", (), 8.0, MEANWHILE).figures()
    assert figures["acceptance_length"] == 3.5  # the target's own token and 50 / 20 drafts
    assert (figures["rounds"], figures["switches"]) == (20, 4)
    assert figures["rounds_by_drafter"] == {"df": 5, "e3": 15}
    assert figures["share_by_drafter"] == {"df": 0.25, "e3": 0.75}
    assert figures["host_share"] == 0.5  # 4 of 8 seconds were not in forwards


@pytest.mark.parametrize(("speculates", "length"), [(False, 1.0), (True, None)])
def test_without_counters_only_plain_decoding_has_a_known_length(speculates: bool, length: float | None) -> None:
    figures = Report("x", (), 1.0, None, speculates).figures()
    assert figures["acceptance_length"] == length
    assert list(figures) == list(Report("df", (), 1.0, MEANWHILE).figures())
    assert merge([Report("x", (), 1.0, None, speculates)] * 2).figures()["acceptance_length"] == length


# Reports


def test_merge() -> None:
    parts = [Report("df", (turn(2),), 1.0, BEFORE), Report("df", (turn(4), turn(6)), 2.0, MEANWHILE)]
    merged = merge(parts)
    assert (merged.label, merged.wall_s, merged.totals) == ("df", 3.0, AFTER)
    assert [each.index for each in merged.turns] == [2, 4, 6]
    assert merged.figures()["tokens_per_s"] == 10.0


def test_merging_one_report_changes_nothing() -> None:
    report = Report("df", (turn(),), 1.0, AFTER)
    assert merge([report]) == report


def test_merging_no_reports_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_a_failed_turn_has_no_text_and_no_share_in_the_figures() -> None:
    report = Report("off", (turn(2), turn(4, None, None, error="500")), 2.0, None)
    assert report.texts() == {("s", 2): "text", ("s", 4): None}
    figures = report.figures()
    assert (figures["turns"], figures["failed"], figures["tokens_per_s"]) == (2, 1, 5.0)


@pytest.mark.parametrize(
    ("seconds", "p50", "p95"),
    [
        ([], None, None),
        ([None], None, None),
        ([0.25], 250.0, 250.0),
        ([0.25, None], 250.0, 250.0),
        ([0.3, 0.1], 200.0, 290.0),
        ([i / 1000 for i in range(101)], 50.0, 95.0),
    ],
)
def test_percentiles(seconds: list[float | None], p50: float | None, p95: float | None) -> None:
    figures = Report("x", tuple(turn(ttft_s=each) for each in seconds), 1.0, None).figures()
    assert (figures["ttft_ms_p50"], figures["ttft_ms_p95"]) == (p50, p95)


# The table


def test_the_table_compares_with_off() -> None:
    figures = {
        "off": Report("off", (turn(),), 2.0, None).figures(),
        "entropy": Report("entropy", (turn(),), 1.0, MEANWHILE).figures(),
    }
    lines = rendered(figures)
    assert max(map(len, lines)) <= TABLE_WIDTH
    (off,) = (line for line in lines if " off " in line and "1.00" in line)
    (entropy,) = (line for line in lines if "entropy" in line)
    assert [cell.strip() for cell in off.split("│")[1:8]] == ["off", "5.0", "1.00", "1.00", "-", "-", "-"]
    assert [cell.strip() for cell in entropy.split("│")[1:8]] == [
        *("entropy", "10.0", "2.00", "3.50", "20", "df 25% e3 75%", "4")
    ]


@pytest.mark.parametrize("off", [None, 0.0])
def test_without_off_there_is_nothing_to_compare_with(off: float | None) -> None:
    figures = {"entropy": Report("entropy", (turn(),), 1.0, MEANWHILE).figures()}
    if off is not None:  # measured, but every turn failed
        figures["off"] = Report("off", (turn(error="500"),), 1.0, None).figures()
    (cells,) = (line.split("│") for line in rendered(figures) if "entropy" in line)
    assert cells[3].strip() == "-"


def test_the_table_of_a_replay_in_which_all_failed() -> None:
    (cells,) = (
        line.split("│")
        for line in rendered({"x": Report("x", (turn(error="500", ttft_s=None, tpot_s=None),), 1.0, None).figures()})
        if line.startswith("│ x")
    )
    assert [cell.strip() for cell in cells[8:10]] == ["- / -", "- / -"]
    assert cells[12].strip() == "1"
