"""`scripts/gateway.py`: two servers behind SGLang's gateway, sessions that stay where they are, a replay, and the end.

Needs sglang-router, here or in the environment whose interpreter WHIFLASH_GATEWAY_PYTHON names; else it is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("sglang")

from whiflash_agents.chat import GATEWAY_HEADER
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.replay import replay
from whiflash_workloads.server import Server, keep_port

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("WHIFLASH_GATEWAY_PYTHON", sys.executable)
if sys.executable == PYTHON and importlib.util.find_spec("sglang_router") is None:
    pytest.skip("sglang-router is not installed (extra `gateway`)", allow_module_level=True)
START_SECONDS, STOP_SECONDS = 1200, 60


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, kept = tmp_path_factory.mktemp("gateway"), keep_port()
    port = kept.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "gateway.py"), "--port", str(port), "--policy", "manual"]
    command += ["--gateway-python", PYTHON, "--", "--demo", "--whiflash-router", "alternate"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    server = Server(process, f"http://127.0.0.1:{port}", folder / "log")
    try:
        deadline = time.monotonic() + START_SECONDS
        while "gateway  http" not in server.log.read_text():  # it says so when it knows all of its servers
            assert process.poll() is None and time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
        kept.close()


def workers(gateway: Server) -> list[str]:
    return [worker["url"] for worker in httpx.get(f"{gateway.base_url}/workers", timeout=600).json()["workers"]]


def test_a_session_stays_at_one_server(gateway: Server) -> None:
    """By the header that `ChatWhiFlash` sends. Which server had a request is known by who has its figures."""
    homes: dict[str, set[str]] = {}
    for _ in range(3):
        for session in ("ada", "grace", "mary", "joan"):
            body = {"model": "whiflash-demo", "messages": [{"role": "user", "content": session}], "max_tokens": 4}
            reply = httpx.post(
                f"{gateway.base_url}/v1/chat/completions", json=body, headers={GATEWAY_HEADER: session}, timeout=600
            ).json()
            found = [
                url
                for url in workers(gateway)
                if httpx.get(f"{url}/whiflash/requests/{reply['id']}", timeout=600).status_code == 200
            ]
            assert len(found) == 1
            homes.setdefault(session, set()).update(found)
    assert all(len(urls) == 1 for urls in homes.values())
    assert len(set().union(*homes.values())) == 2, "not all sessions at one server"


def test_a_replay_has_the_texts_and_figures_of_one_server(gateway: Server) -> None:
    sessions = load_traces([ROOT / "workloads" / "demo" / "traces" / "heldout.jsonl"]).sessions[:3]
    through = replay(sessions, gateway.base_url, concurrency=2, turn_figures=True)
    direct = replay(sessions, workers(gateway)[0], concurrency=2)
    for report in (through, direct):
        assert all(turn.error is None for turn in report.turns)
        assert report.totals is not None and report.totals["rounds"] > 0
    texts = [{(turn.session, turn.index): turn.text for turn in report.turns} for report in (through, direct)]
    assert texts[0] == texts[1]
    assert all(turn.speculation is not None for turn in through.turns)


def test_all_end_together(gateway: Server) -> None:
    """When it is told to end, which takes the way of Ctrl-C. (A shell's background jobs do not hear of Ctrl-C.)"""
    urls = [gateway.base_url, *workers(gateway)]
    gateway.process.terminate()
    assert gateway.process.wait(STOP_SECONDS) == 128 + signal.SIGTERM
    for url in urls:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=5)
