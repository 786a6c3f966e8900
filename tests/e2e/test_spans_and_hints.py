"""Spans, hints and figures of requests behind a real server with an API key: one server for the whole file."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("sglang")

import numpy as np
from transformers import AutoTokenizer

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.text import SPANS, span_labels
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.demo.prompts import histories
from whiflash_workloads.server import running_server

pytestmark = pytest.mark.e2e

KEY = "secret"
ROUTES = ["auto", "e3", "df", "off"]
MODEL = "whiflash-demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("spans") / "server.log"
    # The plain threshold: the same text is drafted for in the same way each time, whatever rounds cost meanwhile.
    flags = ["--demo", "--whiflash-entropy-threshold", "0.1"]
    flags += ["--api-key", KEY, "--enable-metrics", "--chunked-prefill-size", "128"]
    # More is admitted than fits, so that requests are retracted for room.
    flags += ["--max-total-tokens", "3500", "--schedule-conservativeness", "0.05"]
    with running_server("whiflash_sglang.launch_server", *flags, log=log) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server, headers={"Authorization": f"Bearer {KEY}"}, timeout=600) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODELS / "target")


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    found = (prompt for session in sessions("heldout", 6) for _, prompt in histories(session, tokenizer))
    return list(islice(found, 12))


def generate(client: httpx.Client, prompt: list[int], **hints: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": 160, "custom_params": {"whiflash": hints} if hints else None}
    reply = client.post("/generate", json={"input_ids": prompt, "sampling_params": params})
    reply.raise_for_status()
    return reply.json()


def chat(session: dict[str, Any], turn: int, **more: Any) -> dict[str, Any]:
    """The request for the `turn`-th assistant message of a session."""
    index = [i for i, message in enumerate(session["messages"]) if message["role"] == "assistant"][turn]
    messages = session["messages"][:index]
    return {
        "model": MODEL,
        "messages": messages,
        "tools": session["tools"],
        "temperature": 0,
        "max_tokens": 200,
        **more,
    }


def figures(client: httpx.Client, request_id: str) -> dict[str, Any]:
    reply = client.get(f"/whiflash/requests/{request_id}")
    reply.raise_for_status()
    return reply.json()


@pytest.fixture(scope="module")
def session() -> dict[str, Any]:
    return next(iter(sessions("heldout", 1)))


def test_spans_are_those_that_the_drafters_are_trained_with(client, tokenizer, prompts):
    """Round by round: a round began where the labels of the whole text say, and counted all of its tokens there."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        reply = generate(client, prompt, trace=True)
        shown = reply["meta_info"]["whiflash"][0]
        ids = np.array([*prompt, *reply["output_ids"]])
        labels = [SPANS[label] for label in span_labels(ids, tokenizer)]
        closing = set(tokenizer.convert_tokens_to_ids(["</think>", "</tool_call>"]))
        expected: dict[str, Counter[str]] = {}
        at = len(prompt) + 1  # behind the prefill's token
        for entry in shown["trace"]:
            span = "answer" if int(ids[at - 1]) in closing else labels[at - 1]
            assert entry["span"] == span
            expected.setdefault(span, Counter()).update(rounds=1, tokens=len(entry["tokens"]))
            at += len(entry["tokens"])
        assert shown["by_span"] == expected
        assert sum(count["rounds"] for count in shown["by_span"].values()) == shown["rounds"]
        seen.update(list(shown["by_span"]))
    assert set(seen) == {"reasoning", "tool_call", "answer"}


def test_a_trace_joins_to_the_text(client, tokenizer, prompts):
    reply = generate(client, prompts[0], trace=True)
    shown = reply["meta_info"]["whiflash"][0]
    text = shown["first"] + "".join(token for entry in shown["trace"] for token in entry["tokens"])
    assert text.startswith(tokenizer.decode(reply["output_ids"]))
    for entry in shown["trace"]:
        assert entry["drafts"][: entry["accepted"]] == entry["tokens"][: entry["accepted"]]
        assert len(entry["tokens"]) == entry["accepted"] + 1
        assert entry["entropy"] >= 0
        assert entry["drafter"] in ("df", "e3")
    assert figures(client, reply["meta_info"]["id"])["trace"] == shown["trace"]


def test_the_first_round_is_routed_by_the_same_entropy_as_the_rest(client, prompts):
    """After a prefill it was that of the distribution that had been sampled from: tempered, masked, penalized."""
    entropies = []
    for more in ({}, {"temperature": 0.2}, {"temperature": 0.7, "top_k": 3}, {"frequency_penalty": 1.5}):
        params = {"temperature": 0, "max_new_tokens": 2, "custom_params": {"whiflash": {"trace": True}}, **more}
        reply = client.post("/generate", json={"input_ids": prompts[0], "sampling_params": params})
        reply.raise_for_status()
        entropies.append(reply.json()["meta_info"]["whiflash"][0]["trace"][0]["entropy"])
    assert entropies == pytest.approx([entropies[0]] * len(entropies), rel=1e-3) and entropies[0] > 0


@pytest.mark.parametrize("route", ROUTES[1:])
def test_every_route_gives_the_same_text_by_its_drafter(client, prompts, route):
    for prompt in prompts[:4]:
        plain, routed = generate(client, prompt), generate(client, prompt, route=route)
        assert routed["output_ids"] == plain["output_ids"]
        shown = routed["meta_info"]["whiflash"][0]
        drafter = "none" if route == "off" else route
        assert shown["rounds_by_drafter"] == {drafter: shown["rounds"]}
        assert shown["hints"] == {"route": route}
        assert all(set(by_drafter) == {drafter} for by_drafter in shown["by_span_drafter"].values())


def test_routes_beside_each_other_in_one_batch(client, prompts):
    plain = [generate(client, prompt)["output_ids"] for prompt in prompts[:8]]
    params = [
        {"temperature": 0, "max_new_tokens": 160, "custom_params": {"whiflash": {"route": ROUTES[i % 4]}}}
        for i in range(8)
    ]
    batch = client.post("/generate", json={"input_ids": prompts[:8], "sampling_params": params}).json()
    assert [reply["output_ids"] for reply in batch] == plain
    for i, reply in enumerate(batch):
        drafters = set(reply["meta_info"]["whiflash"][0]["rounds_by_drafter"])
        assert drafters <= {"auto": {"df", "e3"}, "off": {"none"}}.get(ROUTES[i % 4], {ROUTES[i % 4]})


BAD = [
    ({"route": "e4"}, "route 'e4'"),
    ({"route": [["e3"]]}, "route [['e3']]"),
    ({"span": 3}, "span 3"),
    ({"prior": "high"}, "prior 'high'"),
    ({"prior": 99}, "prior 99"),
    ({"tool": "x" * 200}, "tool 'xxx"),
    ({"trace": "yes"}, "trace 'yes'"),
    ({"rote": "e3"}, "rote 'e3'"),
    ("e3", "whiflash 'e3'"),
]


@pytest.mark.parametrize(("hints", "named"), BAD, ids=lambda value: json.dumps(value)[:24])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_hints_are_refused_everywhere(client, session, hints, named, stream):
    custom_params = {"whiflash": hints}
    bodies = {
        "/v1/chat/completions": chat(session, 0, custom_params=custom_params, stream=stream),
        "/v1/completions": {"model": MODEL, "prompt": "a", "custom_params": custom_params, "stream": stream},
        "/generate": {"text": "a", "sampling_params": {"custom_params": custom_params}, "stream": stream},
    }
    for path, body in bodies.items():
        reply = client.post(path, json=body)
        assert f"custom_params.whiflash{'' if hints == 'e3' else '.'}" in reply.text
        assert named in reply.text.replace('\\"', '"')
        if stream and path == "/generate":  # SGLang has answered 200 before it looks at a stream's parameters
            assert '"code":400' in reply.text
        else:
            assert reply.status_code == 400


@pytest.mark.parametrize("custom_params", [5, "x", {"own": [[1]]}, {"own": {"a": {"b": 1}}}])
def test_custom_params_that_would_end_the_scheduler(client, prompts, custom_params):
    """SGLang checks them first when the scheduler decodes them, where nothing catches the error."""
    params = {"custom_params": custom_params, "max_new_tokens": 2}
    reply = client.post("/generate", json={"input_ids": prompts[0], "sampling_params": params})
    assert reply.status_code == 400
    assert "custom_params" in reply.text


def test_after_all_refusals_the_server_answers_as_before(client, prompts):
    first = generate(client, prompts[1])
    for hints, _ in BAD:
        params = {"custom_params": {"whiflash": hints}}
        assert client.post("/generate", json={"text": "a", "sampling_params": params}).status_code == 400
    again = generate(client, prompts[1])
    assert again["output_ids"] == first["output_ids"]
    assert again["meta_info"]["whiflash"][0]["hints"] == {}


def test_hints_are_shown_with_the_figures(client, prompts):
    hints = {"span": "tool_call", "prior": 1.5, "tool": "get_order"}
    shown = generate(client, prompts[0], **hints)["meta_info"]["whiflash"][0]
    assert shown["hints"] == hints
    assert shown["tool"] == "get_order"
    assert "trace" not in shown


def test_a_prompt_of_several_chunks_has_one_trace(client, tokenizer, prompts):
    client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    prompt = max(prompts, key=len)
    assert len(prompt) > 256, "chunks are 128 tokens here"
    shown = generate(client, prompt, trace=True)["meta_info"]["whiflash"][0]
    assert shown["first"] == "<think>"
    assert shown["trace"][0]["span"] == "reasoning"
    assert len(shown["trace"]) == shown["rounds"]


def test_a_retracted_request_keeps_its_span_and_its_trace(client, tokenizer, prompts):
    """Its rounds are counted anew, but the trace goes on; a span read from the prompt alone would be wrong."""
    client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    hints = {"whiflash": {"trace": True}}
    params = {"temperature": 0, "max_new_tokens": 480, "ignore_eos": True, "custom_params": hints}
    body = {"input_ids": prompts[:8], "sampling_params": [params] * 8}
    replies = client.post("/generate", json=body).json()
    retracted = [reply for reply in replies if reply["meta_info"]["num_retractions"]]
    assert retracted
    for reply in retracted:
        shown = reply["meta_info"]["whiflash"][0]
        tokens = [shown["first"], *(token for entry in shown["trace"] for token in entry["tokens"])]
        assert "".join(tokens).startswith(tokenizer.decode(reply["output_ids"]))
        assert len(shown["trace"]) > shown["rounds"]
        span, closes = "answer", {"reasoning": "</think>", "tool_call": "</tool_call>"}
        for entry in [{"tokens": [shown["first"]], "span": "answer"}, *shown["trace"]]:
            assert entry["span"] == span
            for token in entry["tokens"]:
                if token == "<tool_call>" and span != "tool_call":
                    span = "tool_call"
                elif token == "<think>" and span == "answer":
                    span = "reasoning"
                elif token == closes.get(span):
                    span = "answer"


def test_context_from_tokens_alone(client, prompts, tokenizer):
    kinds = []
    for prompt in prompts:
        kinds.append(generate(client, prompt)["meta_info"]["whiflash"][0]["context_kind"])
        ends_with_output = tokenizer.decode(prompt).rpartition("<|im_start|>user")[2].count("<tool_response>") > 0
        assert kinds[-1] == ("tool_output" if ends_with_output else "user")
    assert set(kinds) == {"user", "tool_output"}


def test_streamed_chats_of_a_plain_client_have_figures(server, client, session):
    """Spans, context and tool without any help from the client, and the same as of a chat that is not streamed."""
    plain = openai.OpenAI(base_url=f"{server}/v1", api_key=KEY)
    for turn, (kind, tool) in enumerate([("user", None), ("tool_output", session_tool(session, 0))]):
        body = chat(session, turn)
        whole = plain.chat.completions.create(**body)
        chunks = list(plain.chat.completions.create(**body, stream=True))
        assert len({chunk.id for chunk in chunks}) == 1
        shown, streamed = figures(client, whole.id), figures(client, chunks[-1].id)
        assert (shown["context_kind"], shown["tool"]) == (kind, tool)
        assert shown["by_span"]["reasoning"]["rounds"] > 0
        assert shown["by_span"]["tool_call"]["tokens"] > 0
        assert (shown["id"], shown["finish_reason"]) == (whole.id, "stop")
        assert shown["completion_tokens"] == whole.usage.completion_tokens
        same = ("by_span", "context_kind", "tool", "hints", "completion_tokens", "finish_reason")
        assert {key: shown[key] for key in same} == {key: streamed[key] for key in same}
        assert "trace" not in shown


def session_tool(session: dict[str, Any], call: int) -> str:
    calls = [message for message in session["messages"] if message.get("tool_calls")]
    return calls[call]["tool_calls"][0]["function"]["name"]


def test_completions_have_figures(client):
    body = {"model": MODEL, "prompt": "The order is", "temperature": 0, "max_tokens": 12}
    reply = client.post("/v1/completions", json={**body, "custom_params": {"whiflash": {"trace": True}}}).json()
    shown = figures(client, reply["id"])
    assert shown["first"] + "".join(t for entry in shown["trace"] for t in entry["tokens"]) != ""
    assert shown["by_span"]["answer"]["rounds"] == shown["rounds"]


def test_stats_are_the_totals(client, prompts):
    generate(client, prompts[0])
    stats = client.get("/whiflash/stats").json()
    totals = client.get("/server_info").json()["internal_states"][0]["whiflash"]
    assert {key: stats[key] for key in totals} == totals
    assert (stats["model"], stats["router"], set(stats["drafters"])) == (MODEL, "entropy", {"df", "e3"})
    for split in ("by_span", "by_context"):
        assert sum(count["rounds"] for count in stats[split].values()) == stats["rounds"]
    committed = sum(count["tokens"] for count in stats["by_span"].values())
    assert committed == stats["accepted_drafts"] + stats["rounds"]


def test_metrics_have_spans(client):
    shown = client.get("/metrics").text
    for line in ('whiflash_span_rounds_total{engine_type="unified",', 'span="reasoning"', 'context_kind="tool_output"'):
        assert line in shown


def test_routes_are_guarded_by_the_api_key(server, client):
    known = generate(client, [5, 6, 7])["meta_info"]["id"]
    paths = ("/whiflash/stats", f"/whiflash/requests/{known}", "/server_info")
    for path in paths:
        assert client.get(path).status_code == 200
        without = httpx.get(f"{server}{path}", timeout=600)
        wrong = httpx.get(f"{server}{path}", headers={"Authorization": "Bearer guess"}, timeout=600)
        assert (without.status_code, wrong.status_code) == (401, 401)
        assert "rounds" not in without.text
    missing = client.get("/whiflash/requests/nobody")
    assert missing.status_code == 404
    assert "nobody" in missing.json()["message"]


# Routes whose schemas know no hints


def elsewhere(session: dict[str, Any], route: str, **more: Any) -> dict[str, Any]:
    """A request of another route for a session's first reply."""
    system, user = (message["content"] for message in session["messages"][:2])
    asked = {"role": "user", "content": user}
    bodies = {
        "/v1/responses": {"instructions": system, "input": user, "max_output_tokens": 40, "temperature": 0},
        "/v1/messages": {"system": system, "messages": [asked], "max_tokens": 40, "temperature": 0},
        "/api/generate": {"system": system, "prompt": user},
    }
    if route.startswith("/api"):
        more = {"options": {"temperature": 0, "num_predict": 40}, "stream": False} | more
    return {"model": MODEL, **bodies[route], **more}


OTHER_ROUTES = ["/v1/responses", "/v1/messages", "/api/generate"]


def rounds_by_drafter(client: httpx.Client) -> Counter[str]:
    return Counter(client.get("/whiflash/stats").json()["rounds_by_drafter"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", OTHER_ROUTES)
def test_hints_work_on_every_route(client, session, route, stream):
    """Who drafts is as asked for, and the text is the same."""
    texts = set()
    for drafter, name in (("df", "df"), ("e3", "e3"), ("off", "none")):
        before = rounds_by_drafter(client)
        params = {"whiflash": {"route": drafter}}
        reply = client.post(route, json=elsewhere(session, route, stream=stream, custom_params=params))
        assert reply.status_code == 200, reply.text
        assert set(rounds_by_drafter(client) - before) == {name}
        texts.add(text_of(reply.text, stream))
    assert len(texts) == 1


def text_of(body: str, stream: bool) -> str:
    """All text of a reply, by whatever names the route gives it."""
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith(("data: {", "{"))]
    documents = [json.loads(line) for line in lines] if stream else [json.loads(body)]
    keys = ("delta", "text", "thinking", "content", "response")
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(value[key] for key in keys if isinstance(value.get(key), str))
            value = list(value.values())
        for part in value if isinstance(value, list) else ():
            walk(part)

    walk(documents)
    assert "".join(found)
    return "".join(found)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", OTHER_ROUTES)
@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"whiflash": {"route": "bogus"}}, "custom_params.whiflash.route"),
        ({"whiflash": "df"}, "custom_params.whiflash"),
        (["whiflash"], "custom_params"),
        ({"other": {"deep": [[1]]}}, "custom_params"),
    ],
)
def test_wrong_hints_are_refused_on_every_route(client, session, route, stream, params, said):
    reply = client.post(route, json=elsewhere(session, route, stream=stream, custom_params=params))
    assert reply.status_code == 400 and said in reply.text
