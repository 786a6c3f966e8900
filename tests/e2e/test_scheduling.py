"""What clients and operators do in the middle of a text, and the ways in which SGLang orders requests: whatever happens
to a request, its text is that of the server without speculation, and its KV slots come back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from whiflash_workloads.bench import demo_servers
from whiflash_workloads.stress.servers import flush, load, wait_until_free
from whiflash_workloads.tokens import ask, heldout_histories, totals

pytestmark = pytest.mark.e2e

NUM_TOKENS = 160
LONG = 1000  # tokens of a text to which something is done while it is written
WAIT = 600  # seconds, for what has to happen at last
READERS = ThreadPoolExecutor(16)
SMALL = ("--context-length", "2048", "--max-total-tokens", "6000")
# The drafter changes at random in both of them.
SERVERS = {
    # Whole pages, prompts in parts, and of the waiting ones those first that share most.
    "pages": ("--page-size", "16", "--chunked-prefill-size", "128", "--schedule-policy", "dfs-weight"),
    # Few at a time, longest first; a request that matters more takes the place of others.
    "priorities": (
        *("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "1"),
        *("--default-priority-value", "0", "--schedule-policy", "lof", "--max-running-requests", "2"),
        *("--retraction-policy", "priority"),
    ),
}
TokenIds = list[int]


@pytest.fixture(scope="module")
def prompts() -> list[TokenIds]:
    return [turn for turns in heldout_histories(3) for turn in turns[:4]][:8]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    flags = {name: (*SMALL, "--whiflash-router", "random:1", *own) for name, own in SERVERS.items()}
    flags["off"] = (*SMALL, "--whiflash-router", "off")
    with demo_servers(flags, tmp_path_factory.mktemp("scheduling"), at_once=True) as urls:
        yield urls


@pytest.fixture(scope="module")
def texts(prompts: list[TokenIds], servers: dict[str, str]) -> list[TokenIds]:
    """What follows each prompt, without speculation; a greedy text that is asked to be shorter begins the same."""
    return ask(servers["off"], prompts, NUM_TOKENS, in_flight=4, sampling={"ignore_eos": True}).texts


@pytest.fixture(scope="module", params=SERVERS)
def base_url(request: pytest.FixtureRequest, servers: dict[str, str]) -> str:
    return servers[request.param]


@pytest.fixture(autouse=True)
def nothing_is_lost(base_url: str) -> Iterator[None]:
    """Every slot is free again, or in the radix tree."""
    yield
    assert wait_until_free(base_url) >= 5900


class Stream:
    """A text that is being read: to its end, or until `leave_at` tokens are there and the reader may leave. A text of
    LONG tokens is still being written, however fast the server is, when a test does something to it."""

    def __init__(self, base_url: str, prompt: TokenIds, num_tokens: int, leave_at: int | None = None, **more: Any):
        params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        self.body = {"input_ids": prompt, "sampling_params": params, "stream": True, **more}
        self.tokens: TokenIds = []
        self.reason: dict[str, Any] | None = None
        self.began, self.may_leave = threading.Event(), threading.Event()
        self.ended_at = 0.0
        self._url, self._leave_at = base_url, leave_at
        self._reading = READERS.submit(self._read)

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/generate", json=self.body, timeout=2 * WAIT) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line.removeprefix("data: "))
                    self.tokens = piece.get("output_ids", self.tokens)
                    self.reason = piece["meta_info"]["finish_reason"]
                    self.began.set()
                    if self._is_enough():
                        break
        self.ended_at = time.monotonic()

    def _is_enough(self) -> bool:
        return self._leave_at is not None and len(self.tokens) >= self._leave_at and self.may_leave.is_set()

    def wait(self) -> Stream:
        """Until it has ended; what went wrong while it was read is raised here, and a request that hangs."""
        self._reading.result(WAIT)
        return self


@contextmanager
def streams(base_url: str, prompts: list[TokenIds]) -> Iterator[list[Stream]]:
    """A long text for each prompt, all of them with the scheduler and at least one of them begun. In the end they are
    read as far as NUM_TOKENS."""
    found = [Stream(base_url, prompt, LONG, leave_at=NUM_TOKENS) for prompt in prompts]
    try:
        until(lambda: any(stream.began.is_set() for stream in found), "no text begins")
        until(lambda: in_scheduler(base_url) == len(prompts), "not all requests are with the scheduler")
        yield found
    finally:
        for stream in found:
            stream.may_leave.set()
        for stream in found:
            stream.wait()


def in_scheduler(base_url: str) -> int:
    now = load(base_url)
    return int(now["num_running_reqs"] + now["num_waiting_reqs"])


def until(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.02)


def begun(running: list[Stream]) -> list[TokenIds]:
    """What was read of long texts, as far as is known what it has to be."""
    return [stream.tokens[:NUM_TOKENS] for stream in running]


@contextmanager
def paused(base_url: str, mode: str) -> Iterator[None]:
    post(base_url, "pause_generation", mode=mode).raise_for_status()
    try:
        yield
    finally:
        post(base_url, "continue_generation").raise_for_status()


def post(base_url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{base_url}/{path}", json=body, timeout=600)


def test_texts(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    for sampling in ({"ignore_eos": True}, {"ignore_eos": True, "min_new_tokens": 8}):
        assert ask(base_url, prompts, NUM_TOKENS, in_flight=8, sampling=sampling).texts == texts


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_is_not_seen_in_the_text(
    base_url: str, prompts: list[TokenIds], texts: list[TokenIds], mode: str
) -> None:
    with streams(base_url, prompts[:4]) as running, ThreadPoolExecutor() as pool:
        with paused(base_url, mode):
            # Each look is a turn of the scheduler's loop.
            before = rounds(base_url)
            late = pool.submit(ask, base_url, prompts[4:5], 20, sampling={"ignore_eos": True})
            assert [rounds(base_url) for _ in range(20)] == [before] * 20, "nothing is decoded meanwhile"
            assert not late.done() and all(stream.reason is None for stream in running)
        assert late.result(timeout=WAIT).texts == [texts[4][:20]]
    assert begun(running) == texts[:4] and rounds(base_url) > before


def rounds(base_url: str) -> int:
    counted = totals(base_url)
    assert counted is not None
    return int(counted["rounds"])


def test_a_pause_that_aborts_ends_everything(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    with streams(base_url, prompts[:4]) as running, paused(base_url, "abort"):
        for stream in running:
            stream.wait()
    assert all(stream.reason is not None and stream.reason["type"] == "abort" for stream in running)
    for stream, text in zip(running, texts, strict=False):
        known = stream.tokens[:NUM_TOKENS]
        assert known == text[: len(known)]
    assert ask(base_url, prompts[:2], 20, sampling={"ignore_eos": True}).texts == [text[:20] for text in texts[:2]]


def test_clients_that_leave_harm_nobody(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    with streams(base_url, prompts[:4]) as staying:
        leaving = [Stream(base_url, prompt, LONG, leave_at=1 + 5 * i) for i, prompt in enumerate(prompts[4:])]
        for stream in leaving:
            stream.may_leave.set()
    assert begun(staying) == texts[:4]
    for stream, text in zip(leaving, texts[4:], strict=True):
        known = stream.wait().tokens[:NUM_TOKENS]
        assert known and stream.reason is None, "it left in the middle"
        assert known == text[: len(known)]


def test_a_flush_waits_for_nobody(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    """It is refused while requests run, and then the cache is as it was."""
    with streams(base_url, prompts[:4]) as running:
        refused = post(base_url, "flush_cache")
        assert all(stream.reason is None for stream in running)
    assert refused.status_code == 400
    assert begun(running) == texts[:4]
    assert ask(base_url, prompts[:1], 4, sampling={"ignore_eos": True}).cached_tokens > 0
    flush(base_url)
    again = ask(base_url, prompts[:1], 20, sampling={"ignore_eos": True})
    assert again.cached_tokens == 0 and again.texts == [texts[0][:20]]


def test_a_session_goes_on_with_what_it_has_said(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    """SGLang's own sessions, where a request is only what is new."""
    session = post(base_url, "open_session", capacity_of_str_len=4096).json()
    params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    first = post(
        base_url, "generate", input_ids=prompts[0], sampling_params=params, session_params={"id": session, "rid": None}
    ).json()
    second = post(
        base_url,
        "generate",
        input_ids=prompts[1][-30:],
        sampling_params=params,
        session_params={"id": session, "rid": first["meta_info"]["id"]},
    ).json()
    post(base_url, "close_session", session_id=session).raise_for_status()
    whole = prompts[0] + first["output_ids"] + prompts[1][-30:]
    assert first["output_ids"] == texts[0][:20]
    assert second["output_ids"] == ask(base_url, [whole], 20, sampling={"ignore_eos": True}).texts[0]


@pytest.mark.parametrize("base_url", ["priorities"], indirect=True, scope="module")
def test_what_matters_more_comes_first(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    with streams(base_url, prompts[:6]) as running:  # two at a time
        urgent = Stream(base_url, prompts[6], NUM_TOKENS, priority=10).wait()
        assert not any(stream.ended_at for stream in running), "it waited for those before it"
    assert urgent.tokens == texts[6] and begun(running) == texts[:6]
