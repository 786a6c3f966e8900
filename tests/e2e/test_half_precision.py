"""`--dtype float16` on a CPU: texts are those of the server without speculation in the same type.

A verify adds up in another order than a decode step. In float16 that moves a logit by a step of its rounding, so that a
text may leave the other where two tokens are as near as that, and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain

import pytest

pytest.importorskip("sglang")

from whiflash_workloads.bench import demo_servers
from whiflash_workloads.lossless import compare, generate
from whiflash_workloads.tokens import heldout_histories, totals

pytestmark = pytest.mark.e2e

ROUTERS = ("random:1", "entropy", "neural")
NUM_TOKENS, IN_FLIGHT = 64, 4
STEP = 2.0**-6  # between neighbours in float16, of a logit from 16 to 32
# The grammar does not end: where it has, SGLang's plain decoding gives one more token.
SAMPLINGS = {"greedy": {}, "penalties": {"frequency_penalty": 0.5}, "grammar": {"regex": "[a-z ]{90,2000}"}}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    flags = {router: ("--dtype", "float16", "--whiflash-router", router) for router in ROUTERS}
    # In SGLang's overlapped schedule a token counts for penalties one step late.
    flags["off"] = ("--dtype", "float16", "--whiflash-router", "off", "--disable-overlap-schedule")
    with demo_servers(flags, tmp_path_factory.mktemp("float16"), at_once=True) as urls:
        yield urls


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return list(chain(*(histories[:2] for histories in heldout_histories(4))))


@pytest.fixture(scope="module")
def expected(servers: dict[str, str], prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    return {name: texts(servers["off"], prompts, name) for name in SAMPLINGS}


def texts(base_url: str, prompts: list[list[int]], sampling: str) -> list[list[int]]:
    return asyncio.run(generate(base_url, prompts, NUM_TOKENS, IN_FLIGHT, SAMPLINGS[sampling]))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_texts(
    servers: dict[str, str],
    prompts: list[list[int]],
    expected: dict[str, list[list[int]]],
    router: str,
    sampling: str,
) -> None:
    found = texts(servers[router], prompts, sampling)
    if sampling == "greedy":
        comparison = compare(servers["off"], prompts, expected[sampling], found)
        assert all(difference.is_tie_within(STEP) for difference in comparison.differences), comparison.differences
    same = sum(one == other for one, other in zip(found, expected[sampling], strict=True))
    assert same >= len(prompts) - 2


@pytest.mark.parametrize("router", ROUTERS)
def test_drafts_were_accepted_meanwhile(servers: dict[str, str], router: str) -> None:
    counted = totals(servers[router])
    assert counted is not None
    assert counted["switched_off"] == {} and counted["accepted_drafts"] > 0
