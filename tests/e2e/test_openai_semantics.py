"""What SGLang's own tests say of its OpenAI endpoints, asked of WHIFLASH servers and of the same server without
speculation: all must give the same answer, and the answer that those tests expect.

Run as they are, from the installed package (`sglang.test.kits`): grammars by regular expression and by EBNF, abort of
everything. Re-stated here, as SGLang's package does not bring them along:

    basic       completions (echo, list of prompts, token ids, n, streamed), chats (n, streamed, one finish a choice),
                regular expressions, penalties, prefilled replies, list and look-up of models
    features    JSON schema and JSON mode, EBNF, thinking on and off, separated reasoning, usage, usage while streaming
    functions   tool_choice auto, none, required and named, streamed too; the next turn with the tool's answer
    validation  matched stops (text, list, regular expression, token id, end of text, length), ignore_eos, min_tokens,
                long prompts, large max_tokens, bodies that are refused
    responses   the Responses route: text, instructions, tools that are called, forced and answered, streamed too
    messages    the Anthropic route: the same, and stop sequences

Left out: embeddings, rerank, transcription, LoRA, multimodal and hidden states, which WHIFLASH refuses; gRPC and
HTTP/2, which go through the same sampling; numbers that only a large model can get right.

A drafter by chance answers every case. The routers by entropy and by a network, which choose by what they have seen,
answer every second case each; here by score alone, so that each of their rounds is drafted for on any machine.
Requests go to each server eight at a time, so that grammars, penalties and plain rows share rounds. Ids, times and
cached tokens are masked: keys by bigrams cost one cached token a request. Of streams, what the chunks add up to is
compared, as a round commits several tokens, and white space at the edges of text is not: SGLang's parsers drop it or
keep it by where chunks end.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import httpx
import pytest

pytest.importorskip("sglang")

from sglang.test.kits.abort_timeout_kit import AbortAllMixin
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin
from transformers import AutoTokenizer

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.server import Server, start

pytestmark = pytest.mark.e2e

LAUNCHER = "whiflash_sglang.launch_server"
MODEL = "whiflash-demo"
IN_FLIGHT = 8
PROMPT = "The order of Ada Lovelace was"
TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
SESSION = next(iter(sessions("heldout", 1)))
SYSTEM = SESSION["messages"][0]["content"]
MASKED = {"id", "created", "rid", "cached_tokens", "prompt_tokens_details", "metadata", "sglext"}
# `input_tokens` of a message are those that were not cached.
MASKED |= {"created_at", "completed_at", "call_id", "input_tokens", "cache_read_input_tokens", "input_tokens_details"}
LOGPROB_TOLERANCE = 1e-4
CLOCK = re.compile(r"\[\d\d:\d\d:\d\d\]")  # in xgrammar's messages

Reply = Any
Body = dict[str, Any]


class Case(NamedTuple):
    """A request, and what is expected of its normalised reply beside being the same on both servers."""

    name: str
    path: str
    body: Body
    expect: Callable[[Reply], bool] = lambda reply: reply["status"] == 200


def completion(name: str, expect: Callable[[Reply], bool] | None = None, **body: Any) -> Case:
    given = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 24, **body}
    return Case(name, "/v1/completions", given, *([expect] if expect else []))


def chat(name: str, expect: Callable[[Reply], bool] | None = None, **body: Any) -> Case:
    given = {
        "model": MODEL,
        "messages": SESSION["messages"][:2],
        "temperature": 0,
        "max_tokens": 48,
        "chat_template_kwargs": {"enable_thinking": False},
        **body,
    }
    return Case(name, "/v1/chat/completions", given, *([expect] if expect else []))


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
MODES: tuple[tuple[str, Body], ...] = (("", {}), (" streamed", STREAMED))


def choices(count: int) -> Callable[[Reply], bool]:
    return lambda reply: reply["status"] == 200 and len(reply["choices"]) == count


def stopped(reason: str, matched: object) -> Callable[[Reply], bool]:
    def expect(reply: Reply) -> bool:
        first = reply["choices"][0]
        return (first["finish_reason"], first["matched_stop"]) == (reason, matched)

    return expect


def refused(*words: str) -> Callable[[Reply], bool]:
    return lambda reply: reply["status"] in (400, 422) and all(word in json.dumps(reply) for word in words)


def content(reply: Reply) -> str:
    return reply["choices"][0]["message"]["content"] or ""


def basic() -> Iterator[Case]:
    ids = TOKENIZER.encode(PROMPT)
    for (mode, streamed), echo, several, n, as_ids in product(
        MODES, (False, True), (False, True), (1, 2), (False, True)
    ):
        prompt: Any = ids if as_ids else PROMPT
        name = f"completion{mode}{' echo' * echo}{' list' * several}{f' n={n}' * (n > 1)}{' ids' * as_ids}"
        body = {"prompt": [prompt, prompt] if several else prompt, "echo": echo, "n": n, **streamed}
        yield completion(name, choices(n * (1 + several)), **body)
    for (mode, streamed), n in product(MODES, (1, 2)):
        yield chat(f"chat{mode} n={n}", choices(n), n=n, **streamed)
    regex = r'\{"order": "[A-Z]{2}-\d{4}", "count": \d{1,2}\}'
    yield chat("regex", lambda reply: set(json.loads(content(reply))) == {"order", "count"}, regex=regex)
    yield chat("regex streamed", regex=regex, **STREAMED)
    yield chat("frequency penalty", frequency_penalty=1.0)
    yield chat("presence penalty", presence_penalty=0.8)
    yield chat("repetition penalty", repetition_penalty=1.2)
    yield chat("logit bias", logit_bias={str(ids[0]): -100.0, str(ids[1]): 5.0})
    prefilled = [*SESSION["messages"][:2], {"role": "assistant", "content": "The order"}]
    yield chat("prefilled reply", messages=prefilled, continue_final_message=True)
    yield Case("models", "/v1/models", {}, lambda reply: reply["data"][0]["max_model_len"] == 8192)
    yield Case(f"model {MODEL}", f"/v1/models/{MODEL}", {}, lambda reply: reply["root"] is not None)
    yield Case("model unknown", "/v1/models/unknown", {}, lambda reply: reply["status"] == 404)


def features() -> Iterator[Case]:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Bern"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "count"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "stock", "schema": schema}}
    for mode, streamed in MODES:
        yield chat(f"JSON schema{mode}", response_format=format_, **streamed)
        yield chat(f"JSON mode{mode}", response_format={"type": "json_object"}, **streamed)
        yield chat(f"EBNF{mode}", ebnf='root ::= "The city is " ("Oslo" | "Bern") "."', **streamed)
        for thinking, separate in ((True, True), (True, False), (False, True)):
            asked = {"enable_thinking": thinking}
            body = {"chat_template_kwargs": asked, "separate_reasoning": separate, "max_tokens": 96, **streamed}
            yield chat(f"thinking={thinking} separate={separate}{mode}", **body)
    yield chat("JSON schema n=2", choices(2), response_format=format_, n=2)
    yield completion("JSON schema of a completion", json_schema=json.dumps(schema))
    options = {"include_usage": True, "continuous_usage_stats": True}
    yield chat("usage while streaming", stream=True, stream_options=options)


def functions() -> Iterator[Case]:
    tools = SESSION["tools"]
    name = tools[0]["function"]["name"]
    named = {"type": "function", "function": {"name": name}}
    for mode, streamed in MODES:
        thinking = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 160}
        yield chat(f"tools auto{mode}", tools=tools, tool_choice="auto", **thinking, **streamed)
        yield chat(f"tools none{mode}", tools=tools, tool_choice="none", **streamed)
        yield chat(f"tools required{mode}", calls(None), tools=tools, tool_choice="required", **streamed)
        yield chat(f"tools named{mode}", calls(None if streamed else name), tools=tools, tool_choice=named, **streamed)
        yield chat(f"tools one at a time{mode}", tools=tools, parallel_tool_calls=False, **thinking, **streamed)
    turns = [i for i, message in enumerate(SESSION["messages"]) if message["role"] == "assistant"]
    yield chat("behind a tool's answer", messages=SESSION["messages"][: turns[1]], tools=tools, **thinking)


def calls(name: str | None) -> Callable[[Reply], bool]:
    """The reply calls tools, of this name if it is given. A call that `max_tokens` cuts off counts too."""

    def expect(reply: Reply) -> bool:
        first = reply["choices"][0]
        made = first["message"]["tool_calls"] or []
        if first["finish_reason"] == "length" and not made:
            return True
        return bool(made) and all(name in (None, call["function"]["name"]) for call in made)

    return expect


def validation() -> Iterator[Case]:
    eos = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    for make in (completion, chat):
        kind = make.__name__
        yield make(f"{kind} stop text", stop=" the", max_tokens=120)
        yield make(f"{kind} stop list", stop=["never said", "."], max_tokens=120)
        yield make(f"{kind} stop streamed", stop=[".", "\n"], max_tokens=120, **STREAMED)
        yield make(f"{kind} stop regex", stop_regex="an|or", max_tokens=120)
        yield make(f"{kind} stop kept", stop=".", no_stop_trim=True, max_tokens=120)
        yield make(f"{kind} length", stopped("length", None), max_tokens=5, ignore_eos=True)
        yield make(f"{kind} ignore_eos", stopped("length", None), max_tokens=120, ignore_eos=True)
        yield make(f"{kind} min_tokens", min_tokens=40, max_tokens=60)
        yield make(f"{kind} one token", max_tokens=1)
        yield make(f"{kind} special tokens", skip_special_tokens=False, max_tokens=120)
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 400}
    yield chat("end of text", stopped("stop", eos), **thinking)
    yield chat("stop token ids", stop_token_ids=[TOKENIZER.encode(" order")[0], eos], max_tokens=120)
    yield chat("max_completion_tokens", stopped("length", None), max_completion_tokens=7, ignore_eos=True)
    for mode, streamed in MODES:
        long = [{"role": "user", "content": "order " * 9000}]
        yield chat(f"long prompt{mode}", refused("longer than the model's context length"), messages=long, **streamed)
        yield chat(f"large max_tokens{mode}", refused("max_completion_tokens"), max_tokens=20000, **streamed)
        yield completion(f"temperature below zero{mode}", refused("temperature"), temperature=-1, **streamed)
    yield completion("no prompt", refused(), prompt="")
    yield completion("n zero", refused(), n=0)
    yield completion("top_p two", refused("top_p"), top_p=2)
    yield completion("penalty out of range", refused("frequency_penalty"), frequency_penalty=5)
    yield completion("max_tokens below zero", refused(), max_tokens=-3)
    yield chat("no messages", refused(), messages=[])
    yield chat("unknown role", refused(), messages=[{"role": "king", "content": "hi"}])
    yield chat("tool without a name", refused(), tools=[{"type": "function", "function": {}}])
    unknown = {"type": "function", "function": {"name": "fly"}}
    yield chat("tool that is not there", refused("fly"), tools=SESSION["tools"], tool_choice=unknown)
    yield chat("regex that is none", refused(), regex="(unclosed")
    yield chat("grammar that is none", refused(), ebnf="root ::= unknown")
    yield chat("two grammars", refused(), regex="a", ebnf='root ::= "a"')
    yield Case("not JSON", "/v1/completions", {"prompt": ["a", 1], "model": MODEL}, refused())


def logprobs() -> Iterator[Case]:
    for mode, streamed in MODES:
        for echo in (False, True):
            yield completion(f"completion logprobs{' echo' * echo}{mode}", logprobs=5, echo=echo, **streamed)
        yield chat(f"chat logprobs{mode}", logprobs=True, top_logprobs=5, **streamed)
        yield chat(f"chat logprobs n=2{mode}", choices(2), logprobs=True, top_logprobs=2, n=2, **streamed)
        yield chat(f"chat logprobs alone{mode}", logprobs=True, **streamed)


def response(name: str, expect: Callable[[Reply], bool] | None = None, **body: Any) -> Case:
    given = {"model": MODEL, "input": SESSION["messages"][1]["content"], "instructions": SYSTEM, "temperature": 0}
    given |= {"max_output_tokens": 48, **body}
    return Case(f"response {name}", "/v1/responses", given, *([expect] if expect else []))


def responses() -> Iterator[Case]:
    tools = [{"type": "function", **tool["function"]} for tool in SESSION["tools"]]
    asked, call, result = SESSION["messages"][1:4]
    made = call["tool_calls"][0]["function"] | {"type": "function_call", "call_id": "call_1"}
    answered = [asked, made, {"type": "function_call_output", "call_id": "call_1", "output": result["content"]}]
    for mode, streamed in (("", {}), (" streamed", {"stream": True})):
        yield response(f"of a text{mode}", **streamed)
        yield response(f"of a list{mode}", input=SESSION["messages"][1:2], frequency_penalty=0.5, **streamed)
        yield response(f"with tools{mode}", tools=tools, max_output_tokens=160, **streamed)
        yield response(f"that has to call{mode}", as_it_comes, tools=tools, tool_choice="required", **streamed)
        yield response(f"that may not call{mode}", tools=tools, tool_choice="none", **streamed)
        yield response(f"to a tool's answer{mode}", input=answered, tools=tools, max_output_tokens=160, **streamed)
    yield response("to nothing", refused(), input=None)


def message(name: str, expect: Callable[[Reply], bool] | None = None, **body: Any) -> Case:
    given = {"model": MODEL, "system": SYSTEM, "messages": SESSION["messages"][1:2], "temperature": 0}
    given |= {"max_tokens": 48, **body}
    return Case(f"message {name}", "/v1/messages", given, *([expect] if expect else []))


def messages() -> Iterator[Case]:
    tools = [
        {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
        for function in (tool["function"] for tool in SESSION["tools"])
    ]
    asked, call, result = SESSION["messages"][1:4]
    made = call["tool_calls"][0]["function"]
    used = {"type": "tool_use", "id": "call_1", "name": made["name"], "input": json.loads(made["arguments"])}
    answer = {"type": "tool_result", "tool_use_id": "call_1", "content": result["content"]}
    answered = [asked, {"role": "assistant", "content": [used]}, {"role": "user", "content": [answer]}]
    named = {"type": "tool", "name": tools[0]["name"]}
    for mode, streamed in (("", {}), (" streamed", {"stream": True})):
        for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}):
            yield message(f"thinking {thinking['type']}{mode}", thinking=thinking, max_tokens=96, **streamed)
        yield message(f"with a stop{mode}", stop_sequences=[".", "\n\n"], max_tokens=120, **streamed)
        yield message(f"with tools{mode}", tools=tools, max_tokens=160, **streamed)
        for kind, choice in (("has to call", {"type": "any"}), ("calls by name", named)):
            yield message(f"that {kind}{mode}", as_it_comes, tools=tools, tool_choice=choice, **streamed)
        yield message(f"that may not call{mode}", tools=tools, tool_choice={"type": "none"}, **streamed)
        yield message(f"to a tool's answer{mode}", messages=answered, tools=tools, max_tokens=160, **streamed)
    yield message("without messages", messages=[])


def as_it_comes(reply: Reply) -> bool:
    """A forced call without `strict` may have arguments that are any JSON value, or come to no end. Where they are no
    object, SGLang's own conversion fails on the Messages route, with and without speculation."""
    return True


CASES = [*basic(), *features(), *functions(), *validation(), *logprobs(), *responses(), *messages()]

# The flags of each server behind `--whiflash-router`, and the cases that it is asked.
SERVERS: dict[str, tuple[tuple[str, ...], slice]] = {
    "off": (("off", "--disable-overlap-schedule"), slice(None)),
    "random": (("random:5",), slice(None)),
    "entropy": (("entropy", "--whiflash-entropy-threshold", "0.1"), slice(0, None, 2)),
    "neural": (("neural", "--whiflash-neural-router-threshold", "0"), slice(1, None, 2)),
}
ROUTED = ("random", "entropy", "neural")


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[dict[str, Server]]:
    """Side by side. Without overlapped steps, in which SGLang counts a token for penalties one step late."""
    folder = tmp_path_factory.mktemp("semantics")
    started: dict[str, Server] = {}
    try:
        for name, (router, _) in SERVERS.items():
            started[name] = start(LAUNCHER, "--demo", "--whiflash-router", *router, log=folder / f"{name}.log")
        for server in started.values():
            server.wait_until_ready()
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture(scope="module")
def replies(servers: dict[str, Server]) -> dict[str, dict[str, Reply]]:
    """Every case's normalised reply, by server."""
    return {name: ask_all(server.base_url, CASES[SERVERS[name][1]]) for name, server in servers.items()}


def ask_all(base_url: str, cases: Sequence[Case]) -> dict[str, Reply]:
    # A connection for each: after an exception of its own the server closes one that it had said would stay.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=base_url, timeout=300, limits=limits) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
        return dict(zip([case.name for case in cases], pool.map(lambda case: ask(client, case), cases), strict=True))


def ask(client: httpx.Client, case: Case) -> Reply:
    """The reply with its status, a stream as the reply that its chunks add up to."""
    reply = client.post(case.path, json=case.body) if case.body else client.get(case.path)
    if reply.headers["content-type"].startswith("text/event-stream"):
        whole = joined if case.path in ("/v1/completions", "/v1/chat/completions") else joined_events
        return with_status(reply, tidy(whole(reply.text)))
    if reply.headers["content-type"].startswith("text/plain"):
        return {"status": reply.status_code, "text": reply.text}
    return with_status(reply, tidy(reply.json()))


def with_status(reply: httpx.Response, body: Reply) -> Reply:
    """The status of HTTP; a response has one of its own."""
    return {**body, "status": reply.status_code, "state": body.get("status")}


def joined(stream: str) -> Reply:
    """A stream's chunks as one reply. Each choice ends once; the end is marked, and usage comes once behind it all."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert lines[-1] == "[DONE]" and lines.count("[DONE]") == 1
    chunks = [json.loads(line) for line in lines[:-1]]
    if "error" in chunks[-1]:
        return chunks[-1]
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = found.setdefault(part["index"], {"index": part["index"], "ends": 0, "roles": [], "text": {}})
            add(choice, part)
    assert all(choice.pop("ends") == 1 for choice in found.values())
    assert chunks[-1]["choices"] == []
    return {"choices": [whole(found[index]) for index in sorted(found)], "usage": chunks[-1]["usage"]}


def add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """One chunk of a choice to what came before."""
    delta = part.get("delta", {"text": part.get("text")})
    choice["roles"] += [delta["role"]] if delta.get("role") else []
    for field in ("content", "reasoning_content", "text"):
        if delta.get(field):
            choice["text"][field] = choice["text"].get(field, "") + delta[field]
    for call in delta.get("tool_calls") or []:
        made = choice.setdefault("calls", {}).setdefault(call["index"], {"name": None, "arguments": ""})
        made["name"] = call["function"].get("name") or made["name"]
        made["arguments"] += call["function"].get("arguments") or ""
    logged = part.get("logprobs")
    for field, values in (logged or {}).items():
        choice.setdefault("logprobs", {}).setdefault(field, []).extend(values or [])
    if part.get("finish_reason") is not None:
        choice["ends"] += 1
        choice["finish_reason"], choice["matched_stop"] = part["finish_reason"], part.get("matched_stop")


def whole(choice: dict[str, Any]) -> dict[str, Any]:
    """A joined choice in the form of one that was not streamed, where tests look at it."""
    made = [{"function": call} for _, call in sorted(choice.pop("calls", {}).items())]
    text = choice.pop("text")
    if choice["roles"] or "text" not in text:
        assert choice["roles"] in (["assistant"], []), "a chat's first chunk, and no other, has the role"
        message = {"content": text.get("content"), "reasoning_content": text.get("reasoning_content")}
        return {**choice, "message": {**message, "tool_calls": made}}
    return {**choice, "text": text["text"]}


def joined_events(stream: str) -> Reply:
    """A stream of typed events as the reply that they tell of, without parts that are white space alone."""
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    texts: dict[int, str] = {}  # by place of the item or block
    for event in events:
        if event["type"].endswith("delta") and event["type"] != "message_delta":
            place, delta = event.get("output_index", event.get("index")), event["delta"]
            said = delta if isinstance(delta, str) else "".join(delta[key] for key in delta if key != "type")
            texts[place] = texts.get(place, "") + said
    return joined_message(events, texts) if events[0]["type"] == "message_start" else joined_response(events, texts)


def joined_response(events: list[Reply], texts: dict[int, str]) -> Reply:
    """The response that the last event has whole. It is what the deltas add up to."""
    response = events[-1]["response"]
    items = [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in response["output"]
    ]
    said = [(kind, text.strip()) for kind, text in items if text.strip()]
    assert [text for _, text in said] == [texts[place].strip() for place in sorted(texts) if texts[place].strip()]
    return {**response, "output": [{"type": kind, "text": text} for kind, text in said]}


def joined_message(events: list[Reply], texts: dict[int, str]) -> Reply:
    """The message that is told of in blocks, each of which ends once."""
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    ends = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert ends == list(range(len(blocks))) and events[-1]["type"] == "message_stop"
    said = [block | {"said": texts.get(place, "").strip()} for place, block in enumerate(blocks)]
    end = next(event for event in events if event["type"] == "message_delta")
    content = [block for block in said if block["said"] or block["type"] == "tool_use"]
    return {**events[0]["message"], "content": content, **end["delta"], "usage": end["usage"]}


def tidy(value: Any) -> Any:
    """Without what differs from one request to the next."""
    if isinstance(value, dict):
        return {key: edges(key, tidy(inner)) for key, inner in value.items() if key not in MASKED}
    if isinstance(value, str):
        return CLOCK.sub("[time]", value)
    return [tidy(inner) for inner in value] if isinstance(value, list) else value


def edges(key: str, value: Any) -> Any:
    return (value.strip() or None) if key in ("content", "reasoning_content") and isinstance(value, str) else value


def same(found: Any, expected: Any) -> bool:
    """Equal, numbers that are no whole numbers (log probabilities) within the tolerance."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, abs_tol=LOGPROB_TOLERANCE)
    return bool(found == expected)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_reply_is_that_of_the_server_without_speculation(case: Case, replies: dict[str, dict[str, Reply]]) -> None:
    expected = replies["off"][case.name]
    assert case.expect(expected), f"not what SGLang's tests expect: {expected}"
    if case.name.startswith("chat logprobs") and case.name.endswith(" streamed"):
        # In a piece of several tokens, as a busy machine sends them, SGLang gives each the alternatives of the first.
        whole = replies["off"][case.name.removesuffix(" streamed")]["choices"]
        logprobs = [{"logprobs": choice["logprobs"]} for choice in whole]
        expected = {**expected, "choices": [one | own for one, own in zip(expected["choices"], logprobs, strict=True)]}
    found = {name: replies[name][case.name] for name in ROUTED if case.name in replies[name]}
    assert len(found) == 2
    for name, reply in found.items():
        assert same(reply, expected), f"{name}: {reply}\n{expected}"


@pytest.mark.parametrize("name", ROUTED)
def test_drafts_were_verified_meanwhile(
    name: str, servers: dict[str, Server], replies: dict[str, dict[str, Reply]]
) -> None:
    state = httpx.get(f"{servers[name].base_url}/server_info", timeout=600).json()["internal_states"][0]
    assert state["whiflash"]["accepted_drafts"] > 0
    assert {"df", "e3"} <= set(state["whiflash"]["rounds_by_drafter"])


class TestFromTheInstalledPackage(RegexConstrainedMixin, EBNFConstrainedMixin, AbortAllMixin):
    """SGLang's own tests, against the WHIFLASH server. Not those in which text of any length has to come to its end
    within 128 tokens, which the bundled model does not know how to do."""

    test_regex_generate_complex_json = test_ebnf_generate_complex_json = None
    test_regex_generate_custom_log_format = test_ebnf_generate_custom_log_format = None

    abort_all_num_requests, abort_all_max_new_tokens, abort_all_sleep = 12, 4000, 1

    @pytest.fixture(autouse=True)
    def reach(self, servers: dict[str, Server]) -> None:
        self.base_url, self.process = servers["random"].base_url, servers["random"].process

    def fail(self, message: str) -> None:
        pytest.fail(message)

    def assertEqual(self, found: object, expected: object, message: str = "") -> None:
        assert found == expected, message

    def assertIsNone(self, found: object, message: str = "") -> None:
        assert found is None, message
