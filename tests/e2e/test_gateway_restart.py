"""One of two servers behind SGLang's gateway is killed under 16 sessions, and started again at its address.

A client's own retry saves every session, with the text that a server gives that never ended; and a session's prefix is
in a cache again two turns later. The turns of all sessions go in step, so that it is known what is in flight: in the
third turn the server is killed while every reply is being written, before the fourth it is back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import httpx
import openai
import pytest

pytest.importorskip("sglang")

from tests.e2e.test_gateway import PYTHON
from whiflash_agents.chat import GATEWAY_HEADER
from whiflash_workloads import server
from whiflash_workloads.demo.generate import sessions

pytestmark = pytest.mark.e2e

LAUNCHER, GATEWAY = "whiflash_sglang.launch_server", "sglang_router.launch_router"
FLAGS = ("--demo", "--whiflash-router", "entropy", "--max-running-requests", "16")
NUM_SESSIONS, TURNS = 16, 5
KILLED_IN = 2  # a turn, counted from 0
SHORT, LONG = 16, 128  # tokens of a reply, LONG in the turn in which the server is killed
RETRIES = 2  # of a client, as OpenAI's makes them
KNOWN_SECONDS = 120
# The gateway asks a server every minute whether it lives, unless told otherwise.
OFTEN = ("--health-check-interval-secs", "1", "--health-success-threshold", "1")


class Turn(NamedTuple):
    """A reply, and how often it was asked for."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    asked: int


@pytest.fixture
def steady(tmp_path: Path) -> Iterator[server.Server]:
    """The server that never ends."""
    running = server.start(LAUNCHER, *FLAGS, log=tmp_path / "steady.log")
    yield running
    running.stop()


@pytest.fixture
def killed(tmp_path: Path, steady: server.Server) -> Iterator[list[server.Server]]:
    """The server that is killed, and in its place, at the same address, the one that is started then."""
    started = [server.start(LAUNCHER, *FLAGS, log=tmp_path / "killed.log")]
    for one in (steady, started[0]):
        one.wait_until_ready()
    yield started
    for one in started:
        one.stop()


@pytest.fixture
def gateway(tmp_path: Path, steady: server.Server, killed: list[server.Server]) -> Iterator[str]:
    """It keeps a session at one server, and gives each of them as many."""
    urls = steady.base_url, killed[0].base_url
    metrics = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(server.free_port()))
    flags = ("--worker-urls", *urls, "--policy", "manual", "--assignment-mode", "min_group", *OFTEN, *metrics)
    running = server.start(GATEWAY, *flags, log=tmp_path / "gateway.log", python=PYTHON)
    try:
        running.wait_until_ready()
        wait_until(lambda: healthy(running.base_url) == set(urls))
        yield running.base_url
    finally:
        running.stop()


def healthy(base_url: str) -> set[str]:
    known = httpx.get(f"{base_url}/workers", timeout=600).json()["workers"]
    return {worker["url"] for worker in known if worker["is_healthy"]}


def wait_until(is_so: Callable[[], bool]) -> None:
    pause = Event()
    for _ in range(KNOWN_SECONDS * 4):
        if is_so():
            return
        pause.wait(0.25)
    raise AssertionError("the gateway does not know it")


class Session:
    """A client with one session. It asks again for a reply that broke off, as its user would."""

    def __init__(self, base_url: str, number: int, recorded: dict[str, Any]):
        headers = {GATEWAY_HEADER: f"session-{number}"}
        self.client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", timeout=600, default_headers=headers, max_retries=RETRIES
        )
        self.recorded = recorded
        self.begun = [Event() for _ in range(TURNS)]

    def turn(self, number: int) -> Turn:
        for asked in range(1, RETRIES + 2):
            try:
                return self.reply(number)._replace(asked=asked)
            except (openai.OpenAIError, httpx.HTTPError, Incomplete):
                if asked > RETRIES:
                    raise
        raise AssertionError

    def reply(self, number: int) -> Turn:
        messages = self.recorded["messages"]
        end = [i for i, message in enumerate(messages) if message["role"] == "assistant"][number]
        text, reason, usage = "", None, None
        for chunk in self.client.chat.completions.create(
            model="whiflash-demo",
            messages=messages[:end],
            tools=self.recorded["tools"],
            tool_choice="none",
            temperature=0,
            max_tokens=LONG if number == KILLED_IN else SHORT,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}},
        ):
            self.begun[number].set()
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        if reason != "length" or usage is None:
            raise Incomplete(f"{len(text)} characters, {reason}")
        details = usage.prompt_tokens_details  # left out where nothing was cached
        return Turn(text, usage.prompt_tokens, (details.cached_tokens or 0) if details else 0, 0)


class Incomplete(Exception):
    """A stream that ended before the reply did."""


def test_no_session_is_lost(gateway: str, steady: server.Server, killed: list[server.Server], tmp_path: Path) -> None:
    recorded = [s for s in sessions("heldout", 60) if sum(m["role"] == "assistant" for m in s["messages"]) >= TURNS]
    clients = [Session(gateway, number, one) for number, one in enumerate(islice(recorded, NUM_SESSIONS))]
    turns: list[list[Turn]] = []
    with ThreadPoolExecutor(NUM_SESSIONS) as pool:
        for number in range(TURNS):
            replies = [pool.submit(client.turn, number) for client in clients]
            if number == KILLED_IN:
                assert all(client.begun[number].wait(120) for client in clients)
                os.killpg(killed[0].process.pid, signal.SIGKILL)
                killed[0].process.wait(30)
            turns.append([reply.result(300) for reply in replies])
            if number == KILLED_IN:
                port = int(killed[0].base_url.rpartition(":")[2])
                killed.append(server.start(LAUNCHER, *FLAGS, log=tmp_path / "again.log", port=port))
                killed[1].wait_until_ready()
                wait_until(lambda: healthy(gateway) == {steady.base_url, killed[0].base_url})
        broken = sum(turn.asked > 1 for turn in turns[KILLED_IN])
        assert 0 < broken < NUM_SESSIONS, "some were at the server that was killed, others were not"
        expected = list(pool.map(lambda client: client.turn(KILLED_IN), at(steady.base_url, clients)))
    assert [turn.text for turn in turns[KILLED_IN]] == [turn.text for turn in expected]
    for before, after in zip(turns[KILLED_IN + 1], turns[KILLED_IN + 2], strict=True):
        assert after.cached_tokens >= before.prompt_tokens - 1, (before, after)


def at(base_url: str, clients: list[Session]) -> list[Session]:
    """The same sessions, asked of one server."""
    return [Session(base_url, number, client.recorded) for number, client in enumerate(clients)]
