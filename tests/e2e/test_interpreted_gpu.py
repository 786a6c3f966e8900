"""The server as far on a GPU's ways as Triton's interpreter goes (tests/interpreted_gpu.py), against the CPU's own.

Texts are those of the server without speculation. Drafts are compared too, round by round: whatever a drafter reads,
text is exact, and a drafter on wrong attention or with wrong entries only guesses worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")
pytest.importorskip("triton")

from workloads.server import Server, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_TOKENS = 12
ROUTES = ("e3", "df", "auto")  # `auto`: they take turns
QUESTIONS = ("Where is order 1042?", "Cancel order 77.")
WAIT = 600  # seconds: a round takes the interpreter seconds

Reply = dict[str, Any]


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def ask(server: Server, text: str, route: str) -> Reply:
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    params["custom_params"] = {"whiflash": {"route": route, "trace": True}}
    body = {"text": text, "sampling_params": params}
    reply = httpx.post(f"{server.base_url}/generate", json=body, timeout=WAIT)
    reply.raise_for_status()
    return reply.json()


def ask_together(server: Server, texts: list[str], routes: tuple[str, ...] = ROUTES) -> list[Reply]:
    """Every text with every route, in one batch."""
    asked = [(text, route) for text in texts for route in routes]
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: ask(server, *pair), asked))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder: Path = tmp_path_factory.mktemp("interpreted")
    plain, gpu = "whiflash_sglang.launch_server", "tests.interpreted_gpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        begin = partial(start, gpu, "--demo", "--whiflash-router")
        running = {"gpu": begin("alternate", log=folder / "gpu.log")}
    for name, router in (("cpu", "alternate"), ("off", "off")):
        running[name] = start(plain, "--demo", "--whiflash-router", router, log=folder / f"{name}.log")
    try:
        for server in running.values():
            server.wait_until_ready()
        yield running
    finally:
        for server in running.values():
            server.stop()


def rounds(reply: Reply) -> list[tuple[Any, ...]]:
    """Who drafted what in each round, and how much of it stood."""
    trace = reply["meta_info"]["whiflash"]["trace"]
    return [tuple(entry[name] for name in ("drafter", "drafts", "accepted", "tokens")) for entry in trace]


def check(servers: dict[str, Server], texts: list[str]) -> list[list[Reply]]:
    """The GPU's replies to every text, by route; text and rounds are as they should be."""
    found, expected = (ask_together(servers[name], texts) for name in ("gpu", "cpu"))
    without = [reply for text in texts for reply in 3 * ask_together(servers["off"], [text], ("auto",))]
    for reply, other, plain in zip(found, expected, without, strict=True):
        assert reply["output_ids"] == other["output_ids"] == plain["output_ids"]
        assert rounds(reply) == rounds(other)
    return [found[first : first + len(ROUTES)] for first in range(0, len(found), len(ROUTES))]


def test_text_and_drafts_are_those_of_the_cpu(servers):
    """New prompts with every drafter and with both in turns, in one batch; then the next turns, behind what is cached.

    EAGLE-3's windows are narrower than the block that the server's arguments know.
    """
    info = httpx.get(f"{servers['gpu'].base_url}/server_info", timeout=30).json()
    assert info["attention_backend"] == "triton"
    replies = check(servers, [turn(question) for question in QUESTIONS])
    drafters = [{entry[0] for entry in rounds(reply)} for reply in replies[0]]
    assert drafters == [{"e3"}, {"df"}, {"e3", "df"}]
    for number, route in enumerate(ROUTES):
        assert sum(entry[2] for of_text in replies for entry in rounds(of_text[number])) > 2, f"{route} was never right"
    answered = f"{turn(QUESTIONS[0])}{replies[0][0]['text']}<|im_end|>\n"
    again = check(servers, [answered + turn(QUESTIONS[1])])
    assert all(reply["meta_info"]["cached_tokens"] > 10 for reply in again[0])
