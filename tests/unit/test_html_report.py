"""The report as text: its charts, what it says of comparisons that are none, and files that are no results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report_world import POLICIES, result
from tests.sessions import session
from tests.stub_server import StubServer
from whiflash_workloads import html_report, replay
from whiflash_workloads.charts import bars, number, panel, scale
from whiflash_workloads.html_report import render, warnings
from whiflash_workloads.results import Result, ResultError, read


def changed(original: Result, **figures: Any) -> Result:
    return original.model_copy(update={"figures": original.figures | figures})


def relabelled(original: Result, label: str, **arguments: Any) -> Result:
    made = original.arguments.model_copy(update={"label": label} | arguments)
    return original.model_copy(update={"arguments": made})


# Charts


def test_bars_share_a_scale_and_name_the_best() -> None:
    off, fast, none = bars({"off": 50.0, "fast": 200.0, "none": None}, "{:.0f}".format, "max")
    assert (off.shown, off.share, off.best) == ("50", 25.0, False)
    assert (fast.share, fast.best) == (100.0, True)
    assert (none.shown, none.share, none.best) == ("n/a", None, False)
    assert bars({"off": 50.0, "fast": 200.0}, str, "min")[0].best


def test_a_single_policy_is_not_the_best() -> None:
    assert not bars({"only": 3.0}, str, "max")[0].best


def test_nothing_but_noughts_can_be_drawn() -> None:
    assert [bar.share for bar in bars({"a": 0.0, "b": 0.0}, str)] == [0.0, 0.0]
    assert panel("x", {"a": [0.0] * 101}).strips[0].p99 == 0.0


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(87, [0, 25, 50, 75, 100]), (100, [0, 25, 50, 75, 100]), (0.3, [0, 0.1, 0.2, 0.3]), (0, [0, 1])],
)
def test_ticks_are_round_and_reach_the_top(top: float, ticks: list[float]) -> None:
    assert scale(top) == pytest.approx(ticks)


def test_a_strip_is_where_its_percentiles_are() -> None:
    drawn = panel("TTFT", {"a": [float(i) for i in range(101)], "nothing came": []})
    (strip,) = drawn.strips
    assert (strip.p1, strip.p5, strip.p25, strip.p50, strip.p75, strip.p95, strip.p99) == (1, 5, 25, 50, 75, 95, 99)
    assert strip.shown == "50.0 / 95.0 / 99.0"
    assert [tick.shown for tick in drawn.ticks] == ["0", "25", "50", "75", "100"]


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (0, 0.42, 2, 41.96, 99.96, 1234.5)] == [
        "0",
        "0.420",
        "2.00",
        "42.0",
        "100",
        "1234",
    ]


# The page


def test_a_page_is_whole_in_itself() -> None:
    """No address of anything else, and a policy that would forbid asking for it."""
    page = render([result(label) for label in POLICIES])
    assert not re.search(r"""(?:src|href)=["'](?!data:,)|https?://|@import|url\(""", page)
    assert "default-src 'none'" in page
    assert all(f'<th scope="row">{label}</th>' in page for label in POLICIES)


def test_no_text_ends_the_script_or_becomes_markup() -> None:
    evil = "</script><script>document.title='x'</script><img src=x onerror=alert(1)>"
    original = result("entropy", num_sessions=2, traced=2)
    view = original.detail.views[0].model_copy(update={"session_id": evil})
    detail = original.detail.model_copy(update={"views": [view]})
    page = render([relabelled(original.model_copy(update={"detail": detail}), evil)])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page


def test_no_text_of_a_trace_becomes_markup() -> None:
    """Tokens, drafts, and names of tools, which are a client's or a model's words."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}"
    original = result("entropy", num_sessions=2, traced=2)
    view = original.detail.views[0]
    assert view.figures.trace
    shown = view.figures.trace[0].model_copy(update={"tokens": [evil], "drafts": [evil], "drafter": evil, "span": evil})
    traced = view.figures.model_copy(update={"trace": [shown], "first": evil, "tool": evil, "context_kind": evil})
    hostile = view.model_copy(update={"figures": traced, "asked": view.asked.model_copy(update={"text": evil})})
    detail = original.detail.model_copy(update={"views": [hostile]})
    said = original.figures["speculation"]
    count = next(iter(said["by_span"].values()))
    named = {name: {**said[name], evil: count} for name in html_report.GROUPS}
    page = render([changed(original.model_copy(update={"detail": detail}), speculation=said | named)])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page and "&lt;img" in page
    assert "{{ 7*7 }}" in page, "nor is it a template"
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    assert json.loads(data)["turns"][0]["title"]


def test_policies_that_were_not_replayed_alike_are_said_to_be() -> None:
    one, other = result("fixed:df", 2), relabelled(result("entropy", 2), "entropy", concurrency=4, temperature=0.7)
    said = warnings({"fixed:df": one, "entropy": other})
    assert said == [
        "replayed with different settings: --temperature is 0.0, 0.7",
        "replayed with different settings: --concurrency is 1, 4",
    ]
    assert all(line in render([one, other]) for line in said)


def test_what_a_report_lacks_is_said() -> None:
    off = result("off", 2)
    cut = changed(off, ending="server gone", not_asked=7, failed=2)
    assert warnings({"off": cut}) == [
        "off: server gone; 7 turns not started",
        "off: 2 turns failed",
        "off: the server reports no speculation figures (it is not WhiFlash)",
    ]
    page = render([off])
    assert "No turn was traced" in page and "AL by span and context is unknown" in page
    assert 'id="data"' not in page


def test_what_was_asked_otherwise_than_recorded_is_said() -> None:
    original = result("entropy", 2)
    said = warnings({"entropy": changed(original, cut_prompts=4, shortened_prompts=1, changed={"function role": 3})})
    turns = original.figures["turns"]
    assert [line.partition(" prompts")[0] for line in said[:2]] == [f"entropy: {count} of {turns}" for count in (4, 1)]
    assert len(said) == 3 and "3 x function role" in said[2]


def test_a_policy_without_speculation_is_what_others_are_compared_with() -> None:
    assert warnings({label: result(label, 2) for label in ("off", "entropy")}) == []


def test_two_results_of_one_label_are_refused() -> None:
    with pytest.raises(ResultError, match="two have the label `entropy`; replay with a unique --label"):
        render([result("entropy", 1)] * 2)


def test_a_replay_in_which_nothing_was_answered_still_has_a_page() -> None:
    """The figures are all None or nought then."""
    with StubServer(fail=dict.fromkeys(range(9), "500")) as stub:
        report = replay.replay([session()], stub.base_url)
    from whiflash_workloads.results import detail

    figures = report.figures() | {"sessions": 1, "skipped": 0}
    original = result("off", 1)
    broken = original.model_copy(update={"figures": figures, "detail": detail(report, [session()])})
    assert "No turn succeeded." in render([broken])


# The commands


def test_results_are_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the replays of two servers to one page."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.html"
    trace.write_text(session().model_dump_json(exclude_none=True))
    files = {label: tmp_path / f"{label}.json" for label in ("off", "entropy")}
    for label, file in files.items():
        with StubServer(speculates=label != "off") as stub:
            flags = ["--base-url", stub.base_url, "--label", label, "--json-out", str(file), "--slo", "e2e_ms=9000"]
            assert replay.main([str(trace), *flags]) == 0
    capsys.readouterr()
    assert html_report.main([*map(str, files.values()), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    turns = json.loads(data)["turns"]
    assert [turn["title"] for turn in turns] == ["s, turn 1", "s, turn 2"]
    assert [policy["label"] for policy in turns[0]["policies"]] == ["entropy"]
    assert turns[1]["asked"] == {"role": "tool", "text": "text text text"}
    assert "100%" in page and "e2e_ms=9000" in page


def test_the_replay_writes_a_report_of_its_own(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.html"
    trace.write_text(session().model_dump_json(exclude_none=True))
    with StubServer() as stub:
        assert replay.main([str(trace), "--base-url", stub.base_url, "--report", str(out)]) == 0
    assert "<title>WhiFlash replay: server</title>" in out.read_text()


def test_a_written_result_is_read_as_it_was(tmp_path: Path) -> None:
    path, original = tmp_path / "r.json", result("entropy", 2)
    path.write_text(original.model_dump_json())
    assert read(path) == original


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    """A figure that the page needs is missed when the file is read, not while the page is made."""
    path, record = tmp_path / "r.json", json.loads(result("entropy", 1).model_dump_json())
    del record["figures"]["by_depth"]
    path.write_text(json.dumps(record))
    with pytest.raises(ResultError, match="field figures: Value error, `by_depth` is missing"):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "field (file): Invalid JSON"),
        ('{"benchmark": "demo_replay"}', "field benchmark: Input should be 'replay'"),
        ('{"benchmark": "replay", "arguments": {}}', "field arguments.label: Field required"),
    ],
)
def test_other_files_are_refused(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert html_report.main([str(path), "--out", str(tmp_path / "out.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: RESULT {path}: {said}")
    assert "create it with `python -m whiflash_workloads.replay ... --json-out FILE`" in error


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text(result("entropy", 1).model_dump_json())
    assert html_report.main([str(path), "--out", str(tmp_path / "no" / "out.html")]) == 2
    assert "cannot be written (No such file or directory); give another file" in capsys.readouterr().err
