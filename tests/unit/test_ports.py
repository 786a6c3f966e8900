"""Addresses that a server cannot listen on are found before anything is loaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup import ports
from whiflash_workloads.server import free_port


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_a_free_port_passes_and_is_free_afterwards() -> None:
    port = str(free_port())
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        ports.check({"--host": [host], "--port": [port]})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_named(taken: str, host: str) -> None:
    with pytest.raises(ConfigError, match=f"^--port {taken}: is in use on {host}; stop the process"):
        ports.check({"--host": [host], "--port": [taken]})


@pytest.mark.parametrize("flag", ["--nccl-port", "--grpc-port"])
def test_other_ports_that_are_given_are_tried_too(taken: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} {taken}: is in use"):
        ports.check({"--port": [str(free_port())], flag: [taken]})


def test_the_place_where_ranks_meet(taken: str) -> None:
    port = {"--port": [str(free_port())]}
    with pytest.raises(ConfigError, match=f"^--dist-init-addr {taken}: is in use"):
        ports.check({**port, "--dist-init-addr": [f"127.0.0.1:{taken}"]})
    ports.check({**port, "--dist-init-addr": [f"127.0.0.1:{taken}"], "--node-rank": ["1"]})  # another node's
    with pytest.raises(ConfigError, match=r"^--dist-init-addr 127\.0\.0\.1: has no port"):
        ports.check({**port, "--dist-init-addr": ["127.0.0.1"]})


def test_two_flags_with_the_same_port() -> None:
    port = str(free_port())
    with pytest.raises(ConfigError, match=f"^--nccl-port {port}: is in use"):
        ports.check({"--port": [port], "--nccl-port": [port]})


@pytest.mark.parametrize(
    ("host", "said"),
    [("192.0.2.1", "is not an address of this machine"), ("nobody.invalid", "cannot be resolved")],
)
def test_a_host_that_is_not_this_machine(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^--host {host}: {said}.*give an address of this machine"):
        ports.check({"--host": [host], "--port": [str(free_port())]})
