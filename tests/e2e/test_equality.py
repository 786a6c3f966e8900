"""Greedy requests of every kind that the API knows, 8 in flight, against the same server without speculation.

A drafter by chance in every round has all of them; the routers by entropy and by a network, as they decide where
nothing else is said, have every second batch each.

Each example is a batch of requests that hypothesis has put together: penalties, logit bias, minimum lengths, stops,
grammars, log probabilities, several samples, streams, and hints of who drafts. Text, reason and usage have to be the
same, and log probabilities the same to 1e-4 (float32).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from itertools import cycle, islice
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads.bench import demo_servers
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.demo.prompts import histories

pytestmark = pytest.mark.e2e

IN_FLIGHT, EXAMPLES = 8, 25
CHANCE, CHOOSING = "random:0", ("entropy", "neural")  # routers
TOLERANCE = 1e-4  # of log probabilities
TIE = 1e-4  # two first tokens that are as near as this may change places: the sums of a verify have another order

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
PROMPTS = list(islice((p for s in sessions("heldout", 12) for _, p in histories(s, TOKENIZER)), 16))

ADDITIVE = ("frequency_penalty", "presence_penalty")

GRAMMARS: list[dict[str, Any]] = [
    {"regex": r"(order|status) [0-9]{2,5}: (shipped|open|lost)( [a-z]{1,8}){0,6}"},
    {"ebnf": 'root ::= item ("," item)*\nitem ::= [a-z]+ "=" [0-9]+'},
    {
        "json_schema": json.dumps(
            {
                "type": "object",
                "properties": {
                    "order": {"type": "integer"},
                    "items": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
                    "state": {"enum": ["open", "shipped", "cancelled"]},
                },
                "required": ["order", "items", "state"],
                "additionalProperties": False,
            }
        )
    },
]


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Most requests leave most things out."""
    return st.one_of(st.none(), st.none(), strategy)


tokens = st.sampled_from(sorted({token for prompt in PROMPTS for token in prompt[-40:]}))

params = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 48),
        "frequency_penalty": some(st.sampled_from([0.2, 0.7, 1.5, -0.4])),
        "presence_penalty": some(st.sampled_from([0.3, 0.9, 2.0])),
        "repetition_penalty": some(st.sampled_from([0.8, 1.1, 1.4])),
        "min_new_tokens": some(st.integers(1, 24)),
        "logit_bias": some(
            st.dictionaries(tokens.map(str), st.sampled_from([-100.0, -2.0, 3.0]), min_size=1, max_size=4)
        ),
        "stop": some(st.lists(st.sampled_from(["\n", " the", "order", '"', "1", "</think>"]), min_size=1, max_size=2)),
        "stop_token_ids": some(st.lists(tokens, min_size=1, max_size=2)),
        "ignore_eos": some(st.just(True)),
        "no_stop_trim": some(st.just(True)),
        "skip_special_tokens": some(st.just(False)),
        "n": some(st.just(2)),
        "grammar": some(st.sampled_from(GRAMMARS)),
    }
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    sampling = {name: value for name, value in draw(params).items() if value is not None}
    sampling |= sampling.pop("grammar", {})
    if sampling.keys() & {"regex", "ebnf", "json_schema"}:
        # SGLang looks whether a grammar has ended before it counts the newest token, but with any speculation after it:
        # with `ignore_eos`, plain decoding gives one more token, behind the end.
        sampling.pop("ignore_eos", None)
    if "repetition_penalty" in sampling:
        # Without speculation SGLang applies a request's penalties in the order of a set, which is another in each run.
        sampling = {name: value for name, value in sampling.items() if name not in ADDITIVE}
    sampling["min_new_tokens"] = min(sampling.get("min_new_tokens", 0), sampling["max_new_tokens"])
    prompt = draw(st.sampled_from(PROMPTS))
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": {"temperature": 0, **sampling}}
    if draw(st.integers(0, 2)) == 0:
        body["return_logprob"] = True
        body["top_logprobs_num"] = draw(st.sampled_from([0, 0, 1, 4]))
        body["logprob_start_len"] = draw(st.sampled_from([-1, -1, 0, len(prompt) - 3]))
    body["stream"] = draw(st.integers(0, 3)) == 0
    route = draw(st.sampled_from(["auto", "auto", "e3", "df", "off"]))
    sampling = body["sampling_params"]
    sampling["custom_params"] = {"whiflash": {"route": route}}
    return body


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Without speculation, and with each router, by name."""
    folder = tmp_path_factory.mktemp("equality")
    flags = {router: ("--whiflash-router", router) for router in (CHANCE, *CHOOSING)}
    # In SGLang's overlapped schedule, which WHIFLASH does not use, a token counts for penalties one step late.
    flags["off"] = ("--whiflash-router", "off", "--disable-overlap-schedule")
    with demo_servers(flags, folder, at_once=True) as urls:
        yield urls


async def ask(client: httpx.AsyncClient, base_url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies, one for each sample."""
    if not body["stream"]:
        reply = await client.post(f"{base_url}/generate", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json() if isinstance(reply.json(), list) else [reply.json()]
    last: dict[int, dict[str, Any]] = {}
    async with client.stream("POST", f"{base_url}/generate", json=body) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                last[chunk.get("index", 0)] = chunk
    return [last[index] for index in sorted(last)]


async def ask_all(base_url: str, bodies: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    async with httpx.AsyncClient(timeout=600) as client:
        return list(await asyncio.gather(*(ask(client, base_url, body) for body in bodies)))


def close(a: Any, b: Any) -> bool:
    """Nested lists of log probabilities and token ids: numbers to the tolerance, the rest equal."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=0, abs_tol=TOLERANCE) or (a < -1e30 and b < -1e30)
    return a == b


def is_tie(base_url: str, body: dict[str, Any], at: int) -> bool:
    """Whether the server without speculation had two first choices at place `at` of its text."""
    again = body | {"stream": False, "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": -1}
    again["sampling_params"] = body["sampling_params"] | {"n": 1}
    reply = httpx.post(f"{base_url}/generate", json=again, timeout=600).json()
    first, second = reply["meta_info"]["output_top_logprobs"][at][:2]
    return None not in (first[0], second[0]) and first[0] - second[0] < TIE


LOGPROBS = (
    "input_token_logprobs",
    "input_top_logprobs",
    "input_token_ids_logprobs",
    "output_token_logprobs",
    "output_top_logprobs",
    "output_token_ids_logprobs",
)
SAME = ("finish_reason", "prompt_tokens", "completion_tokens")
seen: Counter[str] = Counter()
turns = cycle(CHOOSING)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(bodies=st.lists(requests(), min_size=IN_FLIGHT, max_size=IN_FLIGHT))
def test_replies_are_those_of_the_server_without_speculation(servers, bodies):
    plain = servers["off"]
    expected = asyncio.run(ask_all(plain, bodies))
    for router in (CHANCE, next(turns)):
        found = asyncio.run(ask_all(servers[router], bodies))
        for body, ours, theirs in zip(bodies, found, expected, strict=True):
            compare(plain, body, ours, theirs)
            seen[router] += 1
    for body in bodies:
        seen.update(name for name in body["sampling_params"])


def compare(plain: str, body: dict[str, Any], ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The samples of one request, with and without speculation."""
    assert len(ours) == len(theirs) == body["sampling_params"].get("n", 1)
    for mine, reference in zip(ours, theirs, strict=True):
        a, b = mine["output_ids"], reference["output_ids"]
        ends = [one["meta_info"]["finish_reason"]["type"] for one in (mine, reference)]
        if ends == ["abort", "abort"]:
            # `min_new_tokens` forbids the end that a grammar wants. Tokens of such a dead end are no text: without
            # speculation SGLang counts the first two of them before it ends the request.
            assert mine["text"] == reference["text"] and a == b[: len(a)], body["sampling_params"]
            seen["dead ends"] += 1
            continue
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            assert is_tie(plain, body, at), f"token {at} with {body['sampling_params']}:\n{a}\n{b}"
            seen["ties"] += 1
            continue
        assert mine["text"] == reference["text"]
        for name in SAME:
            assert mine["meta_info"][name] == reference["meta_info"][name], (name, body)
        for name in LOGPROBS:
            pair = mine["meta_info"].get(name), reference["meta_info"].get(name)
            assert close(*pair), f"{name} of {body['sampling_params']}:\n{pair[0]}\n{pair[1]}"


@pytest.mark.parametrize("router", [CHANCE, *CHOOSING])
def test_log_probabilities_of_certain_tokens(servers, router):
    """Alone in both servers; then beside requests that ask for none, which ends SGLang's own scheduler."""
    plain, drafted = servers["off"], servers[router]
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    asked = {"return_logprob": True, "token_ids_logprob": [5, 300], "sampling_params": params, "stream": False}
    bodies = [{"input_ids": prompt} | asked for prompt in PROMPTS[:3]]
    others = [{"input_ids": prompt, "sampling_params": params, "stream": False} for prompt in PROMPTS[3:6]]
    others[0]["return_logprob"] = True
    expected = [asyncio.run(ask_all(plain, [body]))[0][0]["meta_info"] for body in bodies]
    together = asyncio.run(ask_all(drafted, [*bodies, *others]))
    for found, reference in zip(together, expected, strict=False):
        for name in LOGPROBS:
            assert close(found[0]["meta_info"].get(name), reference.get(name)), name
    assert all(len(reply[0]["output_ids"]) == 24 for reply in together)


def test_the_batches_had_everything_in_them(servers):
    """What was compared above: at least 200 requests, of every kind, hardly any of them left out as a tie; and drafts
    were made, of both drafters."""
    assert seen[CHANCE] == IN_FLIGHT * EXAMPLES
    assert seen["ties"] <= 2
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "stop", "n")
    assert all(seen[name] >= 5 for name in (*names, "regex", "ebnf", "json_schema", "min_new_tokens")), seen
    for router, least in {CHANCE: 50, **dict.fromkeys(CHOOSING, 25)}.items():
        assert seen[router] >= IN_FLIGHT * (EXAMPLES // 2)
        totals = httpx.get(f"{servers[router]}/whiflash/stats", timeout=600).json()
        assert all(totals["accepted_by_drafter"][name] > least for name in ("df", "e3")), (router, totals)
