"""Run several servers with SGLang's gateway in front of them, all on 127.0.0.1, until Ctrl-C.

    python scripts/gateway.py [--port 30000] [--workers 2] [--policy cache_aware] [-- FLAGS OF THE SERVERS]

Clients only need the gateway's address. `cache_aware` sends a prompt to the server that got its longest prefix before,
or else to the least loaded one. `manual` keeps all requests with the same `X-SMG-Routing-Key`, which `ChatWhiFlash`
sends, on one server. Flags after `--` are for the servers (default: `--demo`). See docs/scaling.md.

The gateway is the package sglang-router (`pip install '.[gateway]'`); `--gateway-python` selects another environment
that has it. If a server or the gateway exits, all others are stopped, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import httpx

from whiflash_workloads import server

LAUNCHER = "whiflash_sglang.launch_server"
GATEWAY = "sglang_router.launch_router"
POLICIES = ("cache_aware", "manual", "round_robin", "random", "power_of_two")
REGISTER_SECONDS = 60
LOGS = Path(".runs") / "gateway"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse(argv)
    if not has_gateway(args.gateway_python):
        fix = "install it with `pip install '.[gateway]'`, or give the python of an environment that has it"
        print(f"error: --gateway-python {args.gateway_python}: has no sglang-router; {fix}", file=sys.stderr)
        return 2
    server.stop_on_signals()
    try:
        with contextlib.ExitStack() as stack:
            serve(args, stack)
    except server.ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=30000, help="port of the gateway (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of servers (default: %(default)s)")
    parser.add_argument("--policy", choices=POLICIES, default="cache_aware", help="default: %(default)s")
    parser.add_argument("--gateway-python", default=sys.executable, metavar="PYTHON", help="default: this one")
    parser.add_argument("flags", nargs="*", help="flags for the servers, after `--` (default: --demo)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    return args


def has_gateway(python: str) -> bool:
    """Whether the given Python has sglang-router."""
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang_router') is None)"
    try:
        return subprocess.run([python, "-c", found], check=False).returncode == 0
    except OSError:
        return False


def serve(args: argparse.Namespace, stack: contextlib.ExitStack) -> NoReturn:
    """Run until a process exits; `stack` stops all processes, the gateway first. Raises ServerError."""
    workers = []
    for number in range(args.workers):
        workers.append(server.start(LAUNCHER, *(args.flags or ["--demo"]), log=LOGS / f"worker-{number}.log"))
        stack.callback(workers[-1].stop)
    for worker in workers:
        worker.wait_until_ready()
        print(f"server   {worker.base_url}  ({worker.log})", flush=True)
    gateway = server.start(
        GATEWAY,
        *("--worker-urls", *(worker.base_url for worker in workers)),
        *("--policy", args.policy),
        # By default, its metrics use a fixed port on all interfaces.
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(server.free_port())),
        log=LOGS / "gateway.log",
        port=args.port,
        python=args.gateway_python,
    )
    stack.callback(gateway.stop)
    gateway.wait_until_ready()
    wait_until_known(gateway, args.workers)
    print(f"gateway  {gateway.base_url}  ({gateway.log}), {args.policy}; stop all with Ctrl-C", flush=True)
    first_end([gateway, *workers])


def wait_until_known(gateway: server.Server, num_workers: int) -> None:
    """Wait until the gateway has registered all servers, which happens after it starts to respond. Raises
    ServerError."""
    deadline = time.monotonic() + REGISTER_SECONDS
    while time.monotonic() < deadline:
        known = httpx.get(f"{gateway.base_url}/workers", timeout=REGISTER_SECONDS).json()["workers"]
        if sum(worker["is_healthy"] for worker in known) == num_workers:
            return
        time.sleep(0.3)
    raise server.ServerError(f"the gateway has not registered all {num_workers} servers, see {gateway.log}")


def first_end(servers: Sequence[server.Server]) -> NoReturn:
    """Wait for one of the servers to exit, then raise ServerError."""
    while True:
        for one in servers:
            if one.process.poll() is not None:
                raise server.ServerError(f"{one.base_url} exited with {one.process.returncode}, see {one.log}")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
