"""The server as far on a GPU's ways as Triton's interpreter goes (tests/interpreted_gpu.py), against the CPU's own. Its
verify windows and drafts are replayed from CUDA graphs, which are pretended (tests/pretend_cuda_graphs.py).

Texts are those of the server without speculation. Drafts are compared too, round by round: whatever a drafter reads,
text is exact, and a drafter on wrong attention or with wrong entries only guesses worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")
pytest.importorskip("triton")

from tests.interpreted_gpu import PLAIN_WEIGHTS
from tests.pretend_cuda_graphs import REPLAYS_FILE
from whiflash_workloads.bench import LAUNCHER, Command
from whiflash_workloads.bench import servers as side_by_side

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_TOKENS = 12
# The interpreter copies whole pools in every launch.
FLAGS = ("--demo", "--max-total-tokens=1024", "--context-length=256", "--max-running-requests=3")
WAIT = 900  # seconds: a round takes the interpreter several
# Ends of prompts that both drafters are right about, each with who drafts; `auto`: they take turns.
ENDING = "</tool_response><|im_end|>\n<|im_start|>assistant\n"
PACKED = f'", "status": "packed", "placed": "2026-08-22", "total": 1091.05}}]}}]}}\n{ENDING}'
PROMPTS = (
    (f'1627.71 + 9.85 + 1091.05", "result": 2914.7}}\n{ENDING}', "e3"),
    (PACKED, "df"),
    (PACKED, "auto"),
)
DRAFTERS = {"e3": {"e3"}, "df": {"df"}, "auto": {"e3", "df"}}

REPLAYS = "replays.txt"

Reply = dict[str, Any]


def ask(url: str, text: str, route: str, num_tokens: int = NUM_TOKENS) -> Reply:
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    params["custom_params"] = {"whiflash": {"route": route, "trace": True}}
    body = {"text": text, "sampling_params": params}
    reply = httpx.post(f"{url}/generate", json=body, timeout=WAIT)
    reply.raise_for_status()
    return reply.json()


def ask_all(url: str) -> list[Reply]:
    """Every prompt with its route, in one batch."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: ask(url, *prompt), PROMPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interpreted")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, str]]:
    interpreted = {"TRITON_INTERPRET": "1", REPLAYS_FILE: str(folder / REPLAYS)}
    launchers = {
        "gpu": ("tests.pretend_cuda_graphs", "alternate", interpreted),
        "cpu": (LAUNCHER, "alternate", PLAIN_WEIGHTS),
        "off": (LAUNCHER, "off", PLAIN_WEIGHTS),
    }
    commands = {
        name: Command(module, (*FLAGS, f"--whiflash-router={router}"), environment, WAIT)
        for name, (module, router, environment) in launchers.items()
    }
    with side_by_side(commands, folder, at_once=True) as urls:
        yield urls


def rounds(reply: Reply) -> list[tuple[Any, ...]]:
    """Who drafted what in each round, and how much of it stood."""
    (figures,) = reply["meta_info"]["whiflash"]
    return [tuple(entry[name] for name in ("drafter", "drafts", "accepted", "tokens")) for entry in figures["trace"]]


def replays(folder: Path) -> list[str]:
    """Whose graphs were replayed for how many rows, in order; forgotten then."""
    file = folder / REPLAYS
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_text_and_drafts_are_those_of_the_cpu(servers):
    """One prompt with each drafter and one with both in turns, in one batch; then one that is cached. EAGLE-3's windows
    are narrower than the block that the server's arguments know.

    Who is first in turns hangs on what a request's slot has seen: each of these is the first in its slot.
    """
    info = httpx.get(f"{servers['gpu']}/server_info", timeout=600).json()
    assert info["attention_backend"] == "triton"
    found, expected, without = (ask_all(servers[name]) for name in ("gpu", "cpu", "off"))
    for (_, route), reply, other, plain in zip(PROMPTS, found, expected, without, strict=True):
        assert reply["output_ids"] == other["output_ids"] == plain["output_ids"]
        assert rounds(reply) == rounds(other)
        assert {drafter for drafter, *_ in rounds(reply)} == DRAFTERS[route]
        assert sum(accepted for _, _, accepted, _ in rounds(reply)) > 0, f"{route} was never right"
    again = ask(servers["gpu"], PACKED, "df", num_tokens=3)
    assert again["output_ids"] == found[1]["output_ids"][:3] and again["meta_info"]["cached_tokens"] > 30


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("off", {"width 1 rows 1"}),
        ("e3", {"width 6 rows 1", "drafts LlamaForCausalLMEagle3 rows 1"}),
        ("df", {"width 8 rows 1", "drafts DFlashDraftModel rows 1"}),
    ],
)
def test_every_round_is_replayed_from_graphs(servers, folder, route, expected):
    """Windows of each width, a whole EAGLE-3 chain and a DFlash block: all of them captured when the server started."""
    plain = ask(servers["off"], PACKED, "auto")
    replays(folder)
    reply = ask(servers["gpu"], PACKED, route)
    told = replays(folder)
    assert reply["output_ids"] == plain["output_ids"]
    assert {*told} == expected
    assert len(told) == len(rounds(reply)) * len(expected), "one replay a round of each"
