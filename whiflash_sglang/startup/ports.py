"""Check that the server can listen on its addresses, before minutes of loading."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping, Sequence

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup.bounds import BOUNDS
from whiflash_sglang.startup.command_line import last

FLAG_HOST, FLAG_PORT, FLAG_RENDEZVOUS = "--host", "--port", "--dist-init-addr"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", "30000"  # SGLang's
EVERYWHERE = ""


def check(given: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if an address is not local or a port is in use.

    Ports that SGLang picks itself are free. All sockets stay open until the last check, to catch two flags with the
    same port.
    """
    host = last(given, FLAG_HOST) or DEFAULT_HOST
    wanted = [(FLAG_PORT, host, last(given, FLAG_PORT) or DEFAULT_PORT)]
    wanted += [("--grpc-port", host, port)] if (port := last(given, "--grpc-port")) else []
    if int(last(given, "--node-rank") or 0) == 0:  # where the ranks meet
        wanted += [("--nccl-port", EVERYWHERE, port)] if (port := last(given, "--nccl-port")) else []
        if address := last(given, FLAG_RENDEZVOUS):
            wanted.append((FLAG_RENDEZVOUS, EVERYWHERE, _port_of(address)))
    with contextlib.ExitStack() as held:
        for flag, address, port in wanted:
            _listen(flag, address, int(port), held)


def _port_of(address: str) -> str:
    port = address.rpartition(":")[2]
    try:
        return f"{BOUNDS[FLAG_PORT].number(port):.0f}"
    except ValueError:
        raise ConfigError(FLAG_RENDEZVOUS, address, "has no port from 1 to 65535", "give HOST:PORT") from None


def _listen(flag: str, host: str, port: int, held: contextlib.ExitStack) -> None:
    """Listen on every address of `host`, as the server will."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        fix = "give an address of this machine, 127.0.0.1 or 0.0.0.0"
        raise ConfigError(FLAG_HOST, host, f"cannot be resolved ({error.strerror})", fix) from error
    problems = []
    for family, kind, protocol, _, address in found:
        try:
            listener = held.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen()
        except OSError as error:
            problems.append(error)
    if in_use := [error for error in problems if error.errno == errno.EADDRINUSE]:
        fix = "stop the process that uses it, or give another port"
        raise ConfigError(flag, port, f"is in use on {host or 'this machine'}", fix) from in_use[0]
    if len(problems) < len(found):
        return  # e.g. an IPv6 address on a machine without IPv6
    if problems[0].errno == errno.EADDRNOTAVAIL:
        fix = "give an address of this machine, 127.0.0.1 or 0.0.0.0"
        raise ConfigError(FLAG_HOST, host, "is not an address of this machine", fix) from problems[0]
    problem = f"cannot be bound ({problems[0].strerror})"
    raise ConfigError(flag, port, problem, "give another port") from problems[0]
