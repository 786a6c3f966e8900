"""A server for tests of stopping: it responds to /health, and its child process ignores SIGTERM.

python -m tests.stubborn_server --host 127.0.0.1 --port 8000 --pid-file child.pid
python -m tests.stubborn_server --host 127.0.0.1 --port 8000 --fail "no such model"
python -m tests.stubborn_server --host 127.0.0.1 --port 8000 --silent
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

CHILD = """
import pathlib, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid-file", type=Path, help="start a child that ignores SIGTERM and writes its pid here")
    parser.add_argument("--fail", help="print this text and exit with status 3")
    parser.add_argument("--silent", action="store_true", help="never respond")
    args = parser.parse_args()
    if args.fail is not None:
        print("x" * 5000)
        print(args.fail)
        sys.exit(3)
    if args.silent:
        print("loading", flush=True)
        time.sleep(60)
    if args.pid_file is not None:
        subprocess.Popen([sys.executable, "-c", CHILD, str(args.pid_file)])
        while not (args.pid_file.exists() and args.pid_file.read_text()):
            time.sleep(0.02)
    HTTPServer((args.host, args.port), _Health).serve_forever()


if __name__ == "__main__":
    main()
