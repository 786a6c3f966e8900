"""Record an agent's requests through a reverse proxy on 127.0.0.1, as traces for `python -m whiflash_workloads.replay`.

    python -m whiflash_workloads.record --upstream http://127.0.0.1:30000 --port 8000 --out run.jsonl

and give the agent http://127.0.0.1:8000/v1 as its base URL. Sessions are distinguished by the header
X-Session-Affinity, and by which request extends which. Streams are passed through without buffering. Headers and
credentials are never written. Ctrl-C stops the recording and prints a summary. An existing file is appended to.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette

from whiflash_workloads.printing import to_readers
from whiflash_workloads.record.proxy import build_app, shown
from whiflash_workloads.record.recorder import Recorder, RecordError

HOST = "127.0.0.1"
STOP_SECONDS = 5  # for replies in flight at Ctrl-C; a second Ctrl-C ends them immediately


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_workloads.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--upstream", type=_url, required=True, help="the server, e.g. http://127.0.0.1:30000")
    parser.add_argument("--port", type=_port, default=8000, help="port of the proxy; 0: any (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="trace file (JSON lines)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listen(args.port))
            recorder = stack.enter_context(Recorder(args.out))
        except (OSError, RecordError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if problem := _unreachable(args.upstream):
            said = f"--upstream {shown(args.upstream)} does not respond ({problem})"
            print(f"warning: {said}; start it; until then clients get status 502", file=sys.stderr)
        address = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        started = f"recording {address} -> {shown(args.upstream)}/v1 to {args.out}; stop with Ctrl-C"
        _serve(build_app(args.upstream, recorder), listener, started)
        with to_readers():
            print(recorder.summary())
    return 0


class _Server(uvicorn.Server):
    """Prints `started` once it listens."""

    def __init__(self, config: uvicorn.Config, started: str):
        super().__init__(config)
        self.words = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        with to_readers():
            print(self.words)


def _serve(app: Starlette, listener: socket.socket, started: str) -> None:
    """Serve until Ctrl-C or SIGTERM. uvicorn re-raises the signal after shutdown; ignore it then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS, lifespan="off")
    _Server(config, started).run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise OSError(f"--port {port}: cannot be bound ({error.strerror}); give another port, or 0") from error
    return listener


def _unreachable(upstream: httpx.URL) -> str | None:
    """Why the upstream does not respond; None if it responds with any status."""
    try:
        httpx.get(upstream.copy_with(path=upstream.path.rstrip("/") + "/v1/models"), timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(
            f"`{text}` is not a URL ({error}); give e.g. http://localhost:30000"
        ) from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.userinfo:
        raise argparse.ArgumentTypeError(
            f"`{shown(url)}` is not a plain address; give e.g. http://127.0.0.1:30000; credentials go in the client"
        )
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1") or "/")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"`{text}` is not a port; give 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
