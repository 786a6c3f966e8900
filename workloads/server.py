"""Start a server as a user would, wait until it answers, and stop it with all that it started.

    with running_server("whiflash_sglang.launch_server", "--demo", log=Path("server.log")) as base_url: ...

Several at once, each in its own process group: `start` does not wait, `Server.wait_until_ready` does.
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
LOG_TAIL = 4000  # characters of the log that an error shows


class ServerError(RuntimeError):
    """A server that ended or did not answer in time; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """A server process and where it answers."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    port: socket.socket | None = None  # keeps it for this server

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with {self.process.returncode}:\n{self._log_tail()}")
            if self._answers():
                return
            time.sleep(0.3)
        raise ServerError(f"no answer from {self.base_url} after {seconds:.0f} s:\n{self._log_tail()}")

    def stop(self) -> None:
        """End the whole process group: politely, then, after a few seconds, for certain."""
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
        """Ids of the processes in the server's group that still run; one that waits only to be reaped does not."""
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
    """`python -m module arguments...` on a local port, a free one unless told; its output goes to `log`.

    `environment` adds to this process's own.
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
    """A process in a session of its own, so that the processes it starts can be stopped with it."""
    # Small models gain nothing from a second thread, and servers side by side lose much by it.
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True)


def stop_on_signals() -> None:
    """End this script as Ctrl-C does when it is told to end or loses its terminal, so that its servers are stopped."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


@contextmanager
def running_server(module: str, *arguments: str, log: Path) -> Iterator[str]:
    """Base URL of a server that answers, stopped at the end of the block."""
    server = start(module, *arguments, log=log)
    try:
        server.wait_until_ready()
        yield server.base_url
    finally:
        server.stop()


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those behind `--`, which are for the servers that it starts."""
    given = list(arguments)
    own = given.index("--") if "--" in given else len(given)
    return given[:own], given[own + 1 :]


def keep_port() -> socket.socket:
    """A socket that is bound to a free port and does not listen. Until it is closed nobody else is given the port; a
    server that asks for it by number, and with SO_REUSEADDR as servers do, may listen there."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    return keeper


def free_port() -> int:
    """A port that is free now. What is started there later may find it taken: see `keep_port`."""
    with keep_port() as keeper:
        return int(keeper.getsockname()[1])
