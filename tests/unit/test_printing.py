"""Commands whose reader has left (`| head`): what they write is there, and they end as they would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sessions import CALL, session
from tests.stub_server import StubServer

SECONDS = 120  # at most; a command takes two


def unread(*command: object) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, of which nobody reads what it prints."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
    finally:
        os.close(writing)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(session().model_dump_json(exclude_none=True) + "\n")
    return path


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as running:
        yield running


@pytest.mark.parametrize(("fail", "status"), [({}, 0), ({0: "500"}, 1)])
def test_a_replay_has_written_its_files(trace: Path, fail: dict[int, str], status: int) -> None:
    out, page = trace.with_name("out.json"), trace.with_name("out.html")
    with StubServer(fail=fail) as stub:
        flags = ("--base-url", stub.base_url, "--json-out", out, "--report", page)
        done = unread("-m", "whiflash_workloads.replay", trace, *flags)
    assert (done.returncode, json.loads(out.read_text())["figures"]["turns"]) == (status, 2)
    assert page.read_text().startswith("<!doctype html>")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr

    combined = unread("-m", "whiflash_workloads.html_report", out, "--out", trace.with_name("all.html"))
    assert (combined.returncode, combined.stderr) == (0, "")
    assert trace.with_name("all.html").stat().st_size


def test_an_export_has_written_its_file(trace: Path) -> None:
    done = unread("-m", "whiflash_workloads.export", trace, "--out", trace.with_name("out.jsonl"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(trace.with_name("out.jsonl").read_text().splitlines()) == 2


def test_a_benchmark_has_written_its_results(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from whiflash_workloads.bench import finish\n"
    program += "finish({'benchmark': 'x'}, Path(sys.argv[1]), 'it failed')"
    done = unread("-c", program, tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (1, "it failed\n")
    assert json.loads((tmp_path / "out.json").read_text()) == {"benchmark": "x"}


def test_what_a_replay_changed_is_in_its_json(
    trace: Path, stub: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    from whiflash_workloads import replay

    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    messages = [{"role": "user", "content": "Where?"}, old, {"role": "function", "name": "find_order", "content": "x"}]
    trace.write_text("\ufeff" + json.dumps({"messages": [*messages, {"role": "assistant", "content": "There."}]}))
    assert replay.main([str(trace), "--base-url", stub.base_url]) == 0
    printed = capsys.readouterr().out
    assert "server: some messages were converted (1 x byte order mark, 1 x function_call" in printed
    figures = json.loads(printed.splitlines()[-1])["figures"]
    assert figures["changed"] == {"byte order mark": 1, "function_call": 1, "function role": 1}
    assert [message["role"] for message in stub.requests[-1]["messages"]] == ["user", "assistant", "tool"]
