"""Servers as child processes: started, waited for, and stopped with all that they started."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from whiflash_workloads import server as module
from whiflash_workloads.server import Server, ServerError, free_port, keep_port, running_server, start

STUBBORN = "tests.stubborn_server"


@pytest.fixture(autouse=True)
def _stop_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 1)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "server.log"


@pytest.fixture
def silent(log: Path) -> Iterator[Server]:
    server = start(STUBBORN, "--silent", log=log)
    yield server
    server.stop()


def runs(pid: int) -> bool:
    """Whether the process is there and is no zombie, which waits only to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_server_that_ends_at_once_says_why(log: Path) -> None:
    server = start(STUBBORN, "--fail", "no such model", log=log)
    with pytest.raises(ServerError) as failure:
        server.wait_until_ready(30)
    said = str(failure.value)
    assert said.startswith("the server exited with 3:") and said.endswith("no such model\n")
    assert len(said) < module.LOG_TAIL + 100 < log.stat().st_size
    server.stop()  # there is nothing left to stop


def test_a_module_that_is_not_there_is_an_error(log: Path) -> None:
    with pytest.raises(ServerError, match="No module named"), running_server("tests.no_such_server", log=log):
        pytest.fail("it cannot have started")


def test_a_server_that_never_answers_is_given_up(silent: Server) -> None:
    deadline = time.monotonic() + 20
    while "loading" not in silent.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ServerError, match=f"no response from {silent.base_url} after 0 s:\nloading"):
        silent.wait_until_ready(0.1)
    assert runs(silent.process.pid)  # giving up is not stopping


def test_stop_ends_a_child_that_ignores_sigterm(log: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "child.pid"
    with running_server(STUBBORN, "--pid-file", str(pid_file), log=log) as base_url:
        assert httpx.get(f"{base_url}/health").status_code == 200
        child = int(pid_file.read_text())
        assert runs(child) and os.getpgid(child) != os.getpgid(0)
    deadline = time.monotonic() + 30  # it would end by itself after 60
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(child)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{base_url}/health")


def test_a_server_is_stopped_when_the_block_raises(log: Path) -> None:
    with pytest.raises(KeyError), running_server(STUBBORN, log=log) as base_url:
        raise KeyError
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{base_url}/health")


def test_stopping_twice_is_harmless(silent: Server) -> None:
    silent.stop()
    silent.stop()
    assert silent.process.poll() is not None


def test_a_port_is_kept_until_its_server_has_ended(silent: Server) -> None:
    """It takes a server a while to listen there, and meanwhile nobody else may be given its port."""
    port = int(silent.base_url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    kept = [keep_port() for _ in range(200)]
    assert len({one.getsockname()[1] for one in kept} | {port}) == 201
    for one in kept:
        one.close()
    silent.stop()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_a_port_that_was_asked_for(log: Path) -> None:
    port = free_port()
    server = start(STUBBORN, log=log, port=port)
    try:
        assert server.base_url == f"http://127.0.0.1:{port}"
        server.wait_until_ready(30)
    finally:
        server.stop()
