"""Start test servers by forking a process that has already imported SGLang, which is half of a small server's startup.

One process per run imports SGLang for the first server, then forks a child per server. The child takes the server's
arguments, environment and log, and runs its module like `python -m`. This replaces `whiflash_workloads.server.spawn`,
only in tests and for the modules listed here. Servers in Triton's interpreter have a separate zygote.

To be safe to fork, the zygote starts no threads and opens nothing but its socket; `OMP_NUM_THREADS=1` keeps torch from
creating workers. SGLang reads many variables during import. A server whose environment differs in any variable not
known to be read later is started with `python -m`.

    pytest  --one message: module, arguments, environment, the log's descriptor-->  zygote
                                                     zygote --fork--> supervisor --fork--> server, in its own session
    pytest  <--its pid; in the end its exit status--  supervisor

The server is terminated when the supervisor, and so the run, ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from whiflash_workloads import server

FOLDER = "WHIFLASH_TEST_ZYGOTES"  # environment variable with the folder of the zygotes' sockets
KINDS = {"plain": {}, "interpreted": {"TRITON_INTERPRET": "1"}}  # with their environment during import
MODULES = (
    "whiflash_sglang.launch_server",
    "sglang.launch_server",
    "tests.e2e.dumping_server",
    "tests.interpreted_upstream",
    "tests.pretend_cuda_graphs",
    "tests.pretend_target",
)
IMPORTED = ("sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler", "sglang.srt.models.registry")
# Variables that are read at run time, not during import. pytest's own are not read at all.
READ_LATE = ("WHIFLASH_", "PRETENDED_", "PYTEST_")
MAX_MESSAGE = 2**16
PR_SET_PDEATHSIG = 1

python_m = server.spawn


@contextmanager
def zygotes() -> Iterator[None]:
    """Start the zygotes, which import lazily. Each ends when its standard input is closed."""
    with tempfile.TemporaryDirectory(prefix="zygotes-") as folder, ExitStack() as stack:
        os.environ[FOLDER] = folder
        for kind, environment in KINDS.items():
            log = stack.enter_context(open(f"{folder}/{kind}.log", "wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", f"{folder}/{kind}"],
                cwd=Path(__file__).parents[1],
                env={"OMP_NUM_THREADS": "1", **os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(process.communicate)
            assert process.stdout is not None
            process.stdout.readline()  # printed once it listens
        yield


# In the test's process


class Forked:
    """A server forked by a zygote, with the part of `subprocess.Popen`'s interface that servers use."""

    def __init__(self, kind: str, module: str, arguments: Sequence[str], output: BinaryIO, late: Mapping[str, str]):
        self.returncode: int | None = None
        self._supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._supervisor.connect(f"{os.environ[FOLDER]}/{kind}")
        message = json.dumps({"module": module, "arguments": arguments, "environment": late, "cwd": os.getcwd()})
        socket.send_fds(self._supervisor, [message.encode()], [output.fileno()])
        if not (said := self._supervisor.recv(MAX_MESSAGE)):
            raise server.ServerError(Path(f"{os.environ[FOLDER]}/{kind}.log").read_text())
        self.pid = int(said)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._ended(timeout)) is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked server", timeout)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._supervisor], [], [], timeout)[0]:
            said = self._supervisor.recv(MAX_MESSAGE)
            self._supervisor.close()
            self.returncode = int(said) if said else -signal.SIGKILL
        return self.returncode


def spawn(command: Sequence[str], output: BinaryIO, environment: Mapping[str, str]) -> Any:
    """Replaces `whiflash_workloads.server.spawn`."""
    python, _, module, *arguments = command
    early = {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}
    kind = next((kind for kind, own in KINDS.items() if own == early), None)
    if module not in MODULES or python != sys.executable or kind is None:
        return python_m(command, output, environment)
    late = {name: value for name, value in {**os.environ, **environment}.items() if name.startswith(READ_LATE)}
    return Forked(kind, module, arguments, output, late)


# In the zygote


def serve_forks(path: str) -> dict[str, Any]:
    """Fork a child for each request until standard input ends. Returns in the child, with the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap supervisors automatically
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        print("listening", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            message, (output,), *_ = socket.recv_fds(connection, MAX_MESSAGE, 1)
            prepare()
            if os.fork() == 0:
                listener.close()
                return supervise(connection, output) or json.loads(message)
            connection.close()
            os.close(output)
    sys.exit()


def prepare() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    from whiflash_sglang.cpu.processes import other_threads

    if others := other_threads():
        raise SystemExit(f"a fork would lack the threads of this process: {others}")
    gc.freeze()  # keep the children's garbage collector from writing to shared memory


def supervise(connection: socket.socket, output: int) -> None:
    """Fork the server, send its pid, and later its exit status. Returns in the server process."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server_pid = os.fork()
    if server_pid == 0:
        os.setsid()
        end_with_parent(signal.SIGTERM)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        connection.send(str(os.getpid()).encode())  # its process group now exists and can be killed
        connection.close()
        return
    _, status = os.waitpid(server_pid, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def end_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def run(module: str, arguments: Sequence[str], environment: Mapping[str, str], cwd: str) -> None:
    """Run a module like `python -m module arguments...`."""
    os.chdir(cwd)
    for name in [name for name in os.environ if name.startswith(READ_LATE)]:
        del os.environ[name]
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(**serve_forks(sys.argv[1]))
