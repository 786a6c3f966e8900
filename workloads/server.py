"""Start a server as a user would, wait until it responds, and stop it with all its child processes.

    with running_server("whiflash_sglang.launch_server", "--demo", log=Path("server.log")) as base_url: ...

To start several in parallel, use `start`, which does not wait, and `Server.wait_until_ready`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

START_SECONDS = 240
STOP_SECONDS = 10
LOG_TAIL = 4000  # characters of the log shown in errors


class ServerError(RuntimeError):
    """A server exited or did not respond in time. The message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A server process and its base URL."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    port: socket.socket | None = None  # reserves the port

    def wait_until_ready(self, seconds: float | None = None) -> None:
        """Wait until the server is healthy. Raises ServerError."""
        seconds = START_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server exited with {self.process.returncode}:\n{self._log_tail()}")
            if self._answers():
                return
            time.sleep(0.3)
        raise ServerError(f"no response from {self.base_url} after {seconds:.0f} s:\n{self._log_tail()}")

    def stop(self) -> None:
        """Stop the process group with SIGTERM, then SIGKILL after `STOP_SECONDS`."""
        for what in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, what)
                self.process.wait(STOP_SECONDS)
            except ProcessLookupError:  # the whole group has ended
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(STOP_SECONDS)
        if self.port is not None:
            self.port.close()

    def processes(self) -> list[int]:
        """Ids of the running processes in the server's group, without zombies."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                    continue
                if int(fields[2]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:]


def start(
    module: str,
    *arguments: str,
    log: Path,
    port: int | None = None,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Server:
    """Start `python -m module arguments...` on a local port (default: a free one), with output in `log`.

    `environment` is added to this process's environment.
    """
    kept = None
    if port is None:
        kept = keep_port()
        port = kept.getsockname()[1]
    command = [python, "-m", module, "--host", "127.0.0.1", "--port", str(port), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = spawn(command, output, environment or {})
    return Server(process, f"http://127.0.0.1:{port}", log, kept)


def spawn(command: Sequence[str], output: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a new session, so that its children can be stopped with it."""
    # Small models gain nothing from a second thread, and parallel servers would slow each other down.
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True)


def stop_on_signals() -> None:
    """Raise SystemExit on SIGTERM and SIGHUP, so that context managers stop the servers."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


@contextmanager
def running_server(module: str, *arguments: str, log: Path) -> Iterator[str]:
    """Start a server and yield its base URL; stop it at the end. Raises ServerError."""
    server = start(module, *arguments, log=log)
    try:
        server.wait_until_ready()
        yield server.base_url
    finally:
        server.stop()


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command's arguments into its own and those after `--`, which are for its servers."""
    given = list(arguments)
    own = given.index("--") if "--" in given else len(given)
    return given[:own], given[own + 1 :]


def keep_port() -> socket.socket:
    """Reserve a free port: bind a socket without listening. Until it is closed, the system does not hand out the port,
    but a server may still bind it explicitly with SO_REUSEADDR."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    return keeper


def free_port() -> int:
    """A port that is free now. It may be taken later; see `keep_port`."""
    with keep_port() as keeper:
        return int(keeper.getsockname()[1])
