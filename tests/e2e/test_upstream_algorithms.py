"""SGLang's own EAGLE3 and DFLASH, started with the flags of `scripts/bench_gpu.py` in Triton's interpreter
(tests/interpreted_upstream.py), beside WHIFLASH with the same drafters and as many drafts.

Greedy text is the target's with any drafter: what tells two implementations of one drafter apart is how much of its
drafts stands in each round. Where ours made features, positions or K and V otherwise than SGLang does, it would show
here, and nowhere else without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")
pytest.importorskip("triton")

from transformers import AutoTokenizer

from tests.e2e.test_interpreted_gpu import WAIT
from tests.interpreted_gpu import PLAIN_WEIGHTS
from tests.scripts import load_script
from whiflash_sglang.training import bundled
from whiflash_workloads.bench import LAUNCHER, Command
from whiflash_workloads.bench import servers as side_by_side
from whiflash_workloads.gpu.judge import UPSTREAM, acceptance_length
from whiflash_workloads.stress.servers import WINDOW
from whiflash_workloads.tokens import Streamed, stream

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_TOKENS = 16
SIZES = ("--max-total-tokens=512", "--context-length=256", "--max-running-requests=3")
# Graphs and overlap are not to be had here, and texts of bfloat16 are wrong in the interpreter. One split of a decode
# kernel instead of eight: the interpreter takes each program's time.
CPU = (
    "--dtype=float32",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--triton-attention-num-kv-splits=1",
)
# Ends of prompts, and beginnings of replies that both drafters are right about here and there.
TEXTS = (
    ' "status": "in transit", "eta": "2026-10-18"}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n'
    "According to the tool, order 3788 is already shipped. That is what",
    'name": ..., "arguments": ...}</tool_call>.<|im_end|>\n<|im_start|>user\nWhich orders of Ada Costa are shipped?'
    "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    "They need the shipped orders of Ada Costa, as far as I can tell. I should",
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """SGLang's by the names of its algorithms, and `ours`, which drafts as each request asks."""
    bench = load_script("bench_gpu")
    interpreted = {"TRITON_INTERPRET": "1"}
    commands = {
        name: Command("tests.interpreted_upstream", (*flags, *bench.QUIET, *SIZES, *CPU), interpreted, WAIT)
        for name, flags in bench.upstream_flags(bundled.PATHS, WINDOW).items()
    }
    ours = ("--demo", *SIZES, "--whiflash-router=alternate")
    commands["ours"] = Command(LAUNCHER, ours, PLAIN_WEIGHTS, WAIT)
    with side_by_side(commands, tmp_path_factory.mktemp("upstream"), at_once=True) as urls:
        yield urls


def ask_all(url: str, route: str | None = None) -> list[Streamed]:
    """Every text in one batch, as it comes; of ours, drafted by one drafter."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.PATHS.target)
    params: dict[str, Any] = {"ignore_eos": True}
    if route is not None:
        params["custom_params"] = {"whiflash": {"route": route, "trace": True}}
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        found = [pool.submit(stream, url, tokenizer(text).input_ids, NUM_TOKENS, params) for text in TEXTS]
        return [one.result() for one in found]


def rounds(streamed: Streamed) -> list[int]:
    """How many tokens came of the prefill and of each round: at once, as rounds take the interpreter seconds; or as the
    trace says, up to the last token that was asked for."""
    if "whiflash" not in streamed.about:
        return [len(list(together)) for _, together in groupby(streamed.arrivals_s)]
    counts = [1]
    for entry in trace(streamed):
        counts.append(min(len(entry["tokens"]), NUM_TOKENS - sum(counts)))
    return counts


def accepted(streamed: Streamed) -> list[int]:
    """How many rounds accepted 0, 1, .. drafts, behind the end of the text too: where ours counts only what belongs to
    the text, SGLang's own algorithms count all."""
    if "whiflash" not in streamed.about:
        return list(streamed.about["spec_correct_drafts_histogram"])
    found = [entry["accepted"] for entry in trace(streamed)]
    return [found.count(number) for number in range(1 + max(found))]


def trace(streamed: Streamed) -> list[dict[str, Any]]:
    (figures,) = streamed.about["whiflash"]
    entries: list[dict[str, Any]] = figures["trace"]
    return entries


@pytest.mark.parametrize(("policy", "algorithm"), list(UPSTREAM.items()))
def test_text_and_accepted_drafts_are_those_of_upstream(servers, policy, algorithm):
    """Twice, as prompts are cached the second time and drafters read entries that another request has left."""
    httpx.post(f"{servers['ours']}/flush_cache", params={"timeout": 20}, timeout=600).raise_for_status()
    for _ in range(2):
        ours, theirs = (ask_all(servers[name], route) for name, route in (("ours", policy[-2:]), (algorithm, None)))
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert [rounds(one) for one in ours] == [rounds(one) for one in theirs]
        assert [accepted(one) for one in ours] == [accepted(one) for one in theirs]
        assert acceptance_length(ours) == acceptance_length(theirs) > 1.8, f"{algorithm} was hardly ever right"
