"""What clients and operators do in the middle of a text, and the ways in which SGLang orders requests: whatever happens
to a request, its text is that of the server without speculation, and its KV slots come back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from workloads.server import running_server
from workloads.tokens import ask, heldout_histories
from workloads.vitals import flush, wait_until_free

pytestmark = pytest.mark.e2e

LAUNCHER = "whiflash_sglang.launch_server"
NUM_TOKENS = 160
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
def texts(prompts: list[TokenIds], tmp_path_factory: pytest.TempPathFactory) -> list[TokenIds]:
    """What follows each prompt, without speculation; a greedy text that is asked to be shorter begins the same."""
    log = tmp_path_factory.mktemp("scheduling") / "off.log"
    with running_server(LAUNCHER, "--demo", *SMALL, "--whiflash-router", "off", log=log) as base_url:
        return ask(base_url, prompts, NUM_TOKENS, in_flight=4, sampling={"ignore_eos": True}).texts


@pytest.fixture(scope="module", params=SERVERS)
def base_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = SERVERS[request.param]
    log = tmp_path_factory.mktemp("scheduling") / "server.log"
    with running_server(LAUNCHER, "--demo", *SMALL, "--whiflash-router", "random:1", *flags, log=log) as url:
        yield url


@pytest.fixture(autouse=True)
def nothing_is_lost(base_url: str) -> Iterator[None]:
    """Every slot is free again, or in the radix tree."""
    yield
    assert wait_until_free(base_url, seconds=20) >= 5900


class Stream:
    """A text that is being read."""

    def __init__(self, base_url: str, prompt: TokenIds, stop_reading_at: int = NUM_TOKENS + 1, **more: Any):
        params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        self.body = {"input_ids": prompt, "sampling_params": params, "stream": True, **more}
        self.tokens: TokenIds = []
        self.reason: dict[str, Any] | None = None
        self.began = threading.Event()
        self.ended_at = 0.0
        self._url, self._stop_reading_at = base_url, stop_reading_at
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/generate", json=self.body, timeout=120) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line.removeprefix("data: "))
                    self.tokens = piece.get("output_ids", self.tokens)
                    self.reason = piece["meta_info"]["finish_reason"]
                    self.began.set()
                    if len(self.tokens) >= self._stop_reading_at:
                        break
        self.ended_at = time.monotonic()

    def wait(self) -> Stream:
        self._thread.join(timeout=120)
        assert not self._thread.is_alive(), "a request hangs"
        return self


@contextmanager
def streams(base_url: str, prompts: list[TokenIds]) -> Iterator[list[Stream]]:
    """One stream for each prompt, of which at least one has begun; all have ended in the end."""
    found = [Stream(base_url, prompt) for prompt in prompts]
    deadline = time.monotonic() + 60
    while not any(stream.began.is_set() for stream in found) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield found
    finally:
        for stream in found:
            stream.wait()


@contextmanager
def paused(base_url: str, mode: str) -> Iterator[None]:
    post(base_url, "pause_generation", mode=mode).raise_for_status()
    try:
        yield
    finally:
        post(base_url, "continue_generation").raise_for_status()


def post(base_url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{base_url}/{path}", json=body, timeout=60)


def test_texts(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    for sampling in ({"ignore_eos": True}, {"ignore_eos": True, "min_new_tokens": 8}):
        assert ask(base_url, prompts, NUM_TOKENS, in_flight=8, sampling=sampling).texts == texts


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_is_not_seen_in_the_text(
    base_url: str, prompts: list[TokenIds], texts: list[TokenIds], mode: str
) -> None:
    with streams(base_url, prompts[:4]) as running, ThreadPoolExecutor() as pool:
        with paused(base_url, mode):
            time.sleep(0.3)  # what was on its way
            before = [len(stream.tokens) for stream in running]
            late: Future[Any] = pool.submit(ask, base_url, prompts[4:5], 20, sampling={"ignore_eos": True})
            time.sleep(0.7)
            assert [len(stream.tokens) for stream in running] == before, "nothing is said meanwhile"
            assert not late.done() and sum(before) < 4 * NUM_TOKENS
        assert late.result(timeout=60).texts == [texts[4][:20]]
    assert [stream.tokens for stream in running] == texts[:4]


def test_a_pause_that_aborts_ends_everything(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    with streams(base_url, prompts[:4]) as running, paused(base_url, "abort"):
        for stream in running:
            stream.wait()
    aborted = [stream for stream in running if stream.reason is None or stream.reason["type"] == "abort"]
    assert aborted, "it came in the middle"
    for stream, text in zip(running, texts, strict=False):
        assert stream.tokens == text[: len(stream.tokens)]
    assert ask(base_url, prompts[:2], 20, sampling={"ignore_eos": True}).texts == [text[:20] for text in texts[:2]]


def test_clients_that_leave_harm_nobody(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    leaving = [Stream(base_url, prompt, stop_reading_at=1 + 5 * i) for i, prompt in enumerate(prompts[4:])]
    with streams(base_url, prompts[:4]) as staying:
        pass
    assert [stream.tokens for stream in staying] == texts[:4]
    for stream, text in zip(leaving, texts[4:], strict=True):
        assert 0 < len(stream.wait().tokens) < NUM_TOKENS
        assert stream.tokens == text[: len(stream.tokens)]


def test_a_flush_waits_for_nobody(base_url: str, prompts: list[TokenIds], texts: list[TokenIds]) -> None:
    """It is refused while requests run, and then the cache is as it was."""
    with streams(base_url, prompts[:4]) as running:
        refused = post(base_url, "flush_cache")
    assert refused.status_code == 400
    assert [stream.tokens for stream in running] == texts[:4]
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


def test_what_matters_more_comes_first(
    base_url: str, prompts: list[TokenIds], texts: list[TokenIds], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["base_url"] != "priorities":
        pytest.skip("no priorities are set")
    with streams(base_url, prompts[:6]) as running:  # two at a time
        urgent = Stream(base_url, prompts[6], priority=10).wait()
    assert urgent.tokens == texts[6] and [stream.tokens for stream in running] == texts[:6]
    assert sum(stream.ended_at < urgent.ended_at for stream in running) <= 2, "it waited for those before it"
