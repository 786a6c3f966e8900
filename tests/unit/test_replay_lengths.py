"""Traces that give lengths only, and sessions that need live history, replayed against a stub server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report_world import result
from tests.sessions import session
from tests.stub_server import StubServer
from whiflash_workloads import replay as module
from whiflash_workloads.html_report import render
from whiflash_workloads.replay import merge, replay
from whiflash_workloads.schema import Session
from whiflash_workloads.synthetic import sample

NO_FIGURES = {"turns": 0, "by_drafter": {}, "by_span": {}, "by_context_kind": {}, "by_tool": {}}


def lengths(name: str = "lengths", prompt: int = 600, reply: int | None = 5) -> Session:
    """One turn."""
    messages = [
        {"role": "user", "content": "", "lengths": {"input_tokens": prompt, "hash_ids": [1, 2]}},
        {"role": "assistant", "content": "", "reply_known": False, "output_tokens": reply},
    ]
    return session(name, schema_version=2, tools=[], messages=messages)


def unknown_replies() -> Session:
    """Two turns of new messages only."""
    turn = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "", "reply_known": False}]
    return session("agents-1", schema_version=2, messages=turn * 2)


def run_main(tmp_path: Path, *sessions: Session, flags: list[str]) -> int:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(each.model_dump_json(exclude_none=True) + "\n" for each in sessions))
    return module.main([str(trace), *flags])


# What is asked


def test_prompts_are_as_long_as_the_server_counts_them() -> None:
    with StubServer(tokens_per_word=2) as stub:
        report = replay([lengths(str(i)) for i in range(3)], stub.base_url, warm_up=1)
    assert [body["prompt"] for body in stub.tokenized] == [sample()]  # once
    assert [len(body["messages"][0]["content"].split()) for body in stub.requests] == [300] * 3
    assert [turn.prompt_tokens for turn in report.turns] == [600, 600]


def test_replies_are_as_long_as_recorded_within_the_limit() -> None:
    sessions = [lengths(reply=5), lengths(reply=0), lengths(reply=90), lengths(reply=None), session()]
    with StubServer() as stub:
        report = replay(sessions, stub.base_url, max_tokens=20)
    asked = [(body["max_tokens"], body.get("ignore_eos")) for body in stub.requests]
    assert asked == [(5, True), (1, True), (20, True), (20, None), (20, None), (20, None)]
    assert [turn.completion_tokens for turn in report.turns] == [5, 1, 20, 6, 6, 6]


def test_recorded_lengths_of_texts_are_not_forced() -> None:
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here.", "output_tokens": 2}]
    with StubServer() as stub:
        replay([session(schema_version=2, messages=messages)], stub.base_url)
    assert "ignore_eos" not in stub.requests[0] and stub.requests[0]["max_tokens"] == 256
    assert stub.tokenized == []


def test_prompts_beyond_the_context_are_cut() -> None:
    with StubServer(context=400) as stub:
        report = replay([lengths()], stub.base_url, max_tokens=20)
    assert [(turn.error, turn.shortened) for turn in report.turns] == [(None, True)]


def test_a_server_that_does_not_count_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(counts_tokens=False) as stub:
        assert run_main(tmp_path, lengths(), flags=["--base-url", stub.base_url]) == 2
        assert stub.requests == []
        replay([session()], stub.base_url)  # texts need no counting
    said = capsys.readouterr().err
    assert said.startswith(f"error: --base-url {stub.base_url}: length-only traces need token counts from the server")
    assert "use an SGLang server, or traces with texts" in said


# What is reported


@pytest.mark.parametrize("speculates", [True, False])
def test_lengths_say_nothing_of_acceptance(
    speculates: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server without speculation has an AL of 1 otherwise."""
    out = tmp_path / "out.json"
    with StubServer(speculates=speculates) as stub:
        assert run_main(tmp_path, lengths(), flags=["--base-url", stub.base_url, "--json-out", str(out)]) == 0
    assert stub.asked_figures == [] and "custom_params" not in stub.requests[0]
    assert (
        "note: 1 turns have synthetic prompts of recorded lengths, which say nothing about acceptance: AL is n/a\n"
        in capsys.readouterr().err
    )
    figures = json.loads(out.read_text())["figures"]
    assert (figures["acceptance_length"], figures["length_only"]) == (None, 1)
    assert figures["speculation"] == NO_FIGURES
    assert figures["completion_tokens"] == 5 and figures["cached_prompt_tokens"] == 300


def test_beside_others_acceptance_is_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server counts two rounds of three tokens in every turn; by its turns' figures AL is 2.5."""
    flags = ["--token-views", "1", "--base-url"]
    with StubServer() as stub:
        assert run_main(tmp_path, lengths(), session(), flags=[*flags, stub.base_url]) == 0
    assert stub.asked_figures == ["answer-1", "answer-2"]
    assert ["custom_params" in body for body in stub.requests] == [False, True, False]  # a view is of a text
    captured = capsys.readouterr()
    assert "AL is over the other 2 turns, other totals are over all" in captured.err
    figures = json.loads(captured.out.splitlines()[-1])["figures"]
    assert (figures["acceptance_length"], figures["rounds"], figures["speculation"]["turns"]) == (2.5, 6, 2)


@pytest.mark.parametrize(
    ("server", "al"), [({}, None), ({"speculates": False}, 1.0), ({"speculates": False, "algorithm": "EAGLE3"}, None)]
)
def test_beside_others_without_figures_of_turns(server: dict[str, Any], al: float | None) -> None:
    with StubServer(**server) as stub:
        figures = replay([lengths(), session()], stub.base_url).figures()
    assert (figures["acceptance_length"], figures["length_only"]) == (al, 1)
    assert figures["speculation"] == NO_FIGURES


def test_merged_reports_keep_what_is_of_lengths() -> None:
    with StubServer() as stub:
        parts = [replay([each], stub.base_url, turn_figures=True) for each in (lengths(), session())]
    assert merge(parts).figures()["acceptance_length"] == 2.5


def test_the_page_says_so() -> None:
    original = result("entropy", 1)
    figures = original.figures | {"length_only": original.figures["turns"], "acceptance_length": None}
    page = render([original.model_copy(update={"figures": figures})])
    assert "have synthetic prompts of recorded lengths, which say nothing about acceptance: AL is n/a" in page


def test_replies_that_max_tokens_cuts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sessions = [lengths("a", reply=300), lengths("b", reply=257), lengths("c", reply=256)]
    with StubServer() as stub:
        assert run_main(tmp_path, *sessions, flags=["--base-url", stub.base_url]) == 0
    assert "note: --max-tokens 256: 2 recorded replies are longer and were truncated; the longest has 300" in (
        capsys.readouterr().err
    )


# Live history


def test_sessions_without_replies_need_live_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as stub:
        assert run_main(tmp_path, session(), unknown_replies(), flags=["--base-url", stub.base_url]) == 2
        assert stub.requests == []
        assert capsys.readouterr().err == (
            "error: --history forced: session `agents-1` has unrecorded replies in its history; use --history live\n"
        )
        assert run_main(tmp_path, unknown_replies(), flags=["--base-url", stub.base_url, "--history", "live"]) == 0
    assert stub.requests[1]["messages"][1]["content"] == "word-1 word-2 word-3 word-4 word-5 word-6 "
