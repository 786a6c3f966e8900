"""Requests of careless or hostile clients, drawn by hypothesis (a dependency of the extra `dev`).

    cases(5000, seed=1)     the same requests for the same seed and version of hypothesis

A request is a valid body with a few fields replaced: by values that the field's type allows, by values at and beyond
its bounds, or by any JSON. A few bodies are not JSON. Requests that keep SGLang itself busy for minutes are left out:
regular expressions with exponential time, grammars with thousands of repetitions, `n` above `MAX_N`
(docs/security.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from whiflash_workloads.stress.requests import Fate, Request

MAX_TOKENS = 6
MAX_N = 3
VOCABULARY = 4096  # at least that of the demo models, so that ids around it are tried
Body = dict[str, Any]


class Case(NamedTuple):
    """One request. A client that leaves closes the connection after a tenth of a second."""

    method: str
    path: str
    body: bytes
    leaves: bool = False

    def request(self) -> Request:
        """The request for the client."""
        fate: Fate = "leave" if self.leaves else "finish"
        return Request("malformed", self.path, self.body, self.method, fate=fate, cut_at=1, replies=0)


def cases(number: int, seed: int) -> list[Case]:
    """Draw requests."""
    found: list[Case] = []
    while len(found) < number:

        @hypothesis.seed(seed + len(found))
        @settings(
            max_examples=number - len(found),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(any_case())
        def collect(case: Case) -> None:
            found.append(case)

        collect()
    return found[:number]


# Values

NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 2**31, 2**31 - 1, -(2**31) - 1, 2**63, -(2**63), 2**64, 10**30),
        *(0.5, 1e-9, 1e-45, -0.0, 1e38, 1e39, 1e300, float("inf"), float("-inf"), float("nan")),
    ]
)
TEXTS = st.sampled_from(
    [
        *("", " ", "a", "</think>", "<tool_call>", "<|im_end|>"),
        *("\x00", "\ud800", "\udfff\ud800", "é€\U0001f600", "\u202e", "\r\nX: y", "a" * 9000),
        *("<script>alert(1)</script>", "../../etc/passwd", "'; DROP TABLE x; --", "{{7*7}}", "%s%n"),
    ]
) | st.text(max_size=12)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
TOKENS = st.integers(0, 400) | st.sampled_from([-1, VOCABULARY, 2**31, 2**63 - 1, -(2**63)])
FRACTIONS = st.floats(0, 1) | NUMBERS
PENALTIES = st.floats(-2, 2) | NUMBERS
COUNTS = st.integers(0, MAX_TOKENS) | NUMBERS
FLAGS = st.booleans()
BIASES = st.dictionaries(TOKENS.map(str) | TEXTS, st.floats(-100, 100) | NUMBERS, max_size=3)
STOPS = TEXTS | st.lists(TEXTS, max_size=4)
NAMES = st.sampled_from(["get_order", "", "x" * 128, "x" * 129, "<b>", "a b", "\ud800"]) | st.text(max_size=6)

SCHEMAS = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        {"enum": ["a", "b"]},
        {"type": "strange"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"properties": 5},
        {"type": "object", "properties": {"": {"not": {}}}},
        {"allOf": []},
        {"type": "string", "pattern": "(["},
        {"minimum": 5, "maximum": 1, "type": "integer"},
        True,
        {},
    ]
)
REGEXES = st.sampled_from(["[ab]+", "a|b", "", "(", "[", "a{2,1}", "(?=x)y", "\\", "\\p{L}", "(?P<a>b)(?P=a)", "\x00"])
EBNFS = st.sampled_from(['root ::= "a" | "b"', "root ::= root", "root ::=", "x", "", 'root ::= "a', "root ::= b"])


@st.composite
def hints(draw: st.DrawFn) -> Body:
    fields: Mapping[str, st.SearchStrategy[Any]] = {
        "route": st.sampled_from(["auto", "e3", "df", "off", "e4", ""]),
        "span": st.sampled_from(["reasoning", "tool_call", "answer", "thought"]),
        "prior": st.floats(-16, 16) | NUMBERS,
        "tool": NAMES,
        "trace": FLAGS,
        "\ud800\n": JUNK,
    }
    return with_fields(draw, {}, fields, most=3)


@st.composite
def custom_params(draw: st.DrawFn) -> Body:
    fields = {
        "whiflash": hints() | hints() | JUNK,
        "whiflash_context": st.fixed_dictionaries(
            {"kind": st.sampled_from(["user", "tool_output", "x"]), "tool": NAMES}
        ),
        "thinking_budget": NUMBERS,
        "__req__": JUNK,
        "nested": JUNK,
    }
    return with_fields(draw, {}, fields, most=2)


def with_fields(draw: st.DrawFn, body: Body, fields: Mapping[str, st.SearchStrategy[Any]], most: int) -> Body:
    """`body` with up to `most` other fields, one in eight of them with any JSON."""
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True)):
        body[name] = draw(JUNK if draw(st.integers(0, 7)) == 0 else fields[name])
    return body


# Bodies

SAMPLING: Mapping[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2) | NUMBERS,
    "top_p": FRACTIONS,
    "top_k": st.integers(-1, 50) | NUMBERS,
    "min_p": FRACTIONS,
    "frequency_penalty": PENALTIES,
    "presence_penalty": PENALTIES,
    "repetition_penalty": st.floats(0, 2) | NUMBERS,
    "logit_bias": BIASES,
    "stop": STOPS,
    "stop_token_ids": st.lists(TOKENS, max_size=3),
    "stop_regex": REGEXES | st.lists(REGEXES, max_size=2),
    "n": st.integers(-1, MAX_N),
    "regex": REGEXES,
    "ebnf": EBNFS,
    "ignore_eos": FLAGS,
    "skip_special_tokens": FLAGS,
    "no_stop_trim": FLAGS,
    "custom_params": custom_params() | custom_params() | JUNK,
}
ONLY_GENERATE: Mapping[str, st.SearchStrategy[Any]] = {
    "min_new_tokens": COUNTS,
    "max_new_tokens": COUNTS,
    "json_schema": SCHEMAS.map(json.dumps) | SCHEMAS | TEXTS,
    "structural_tag": TEXTS,
    "sampling_seed": NUMBERS,
    "stream_interval": NUMBERS,
    "spaces_between_special_tokens": FLAGS,
    "unknown_field": JUNK,
    "stop_strs": STOPS,
    "stop_str_max_len": NUMBERS,
    "is_normalized": FLAGS,
}
ALL_ENDPOINTS: Mapping[str, st.SearchStrategy[Any]] = {
    "rid": NAMES | TEXTS,
    "session_id": TEXTS,
    "session_params": st.fixed_dictionaries({"id": TEXTS}, optional={"rid": TEXTS, "offset": NUMBERS, "x": JUNK}),
    "lora_path": TEXTS,
    "priority": NUMBERS,
    "extra_key": TEXTS,
    "custom_logit_processor": TEXTS,
    "return_hidden_states": FLAGS | st.just("last"),
    "return_routed_experts": FLAGS,
    "routed_experts_start_len": NUMBERS,
    "bootstrap_room": NUMBERS,
    "bootstrap_host": TEXTS,
    "routed_dp_rank": NUMBERS,
    "images_config": JUNK,
    "unknown_field": JUNK,
}
GENERATE: Mapping[str, st.SearchStrategy[Any]] = {
    **ALL_ENDPOINTS,
    "text": TEXTS | st.lists(TEXTS, max_size=2),
    "input_ids": st.lists(TOKENS, max_size=5) | st.lists(st.lists(TOKENS, max_size=3), max_size=2),
    "input_embeds": st.just([[0.0] * 4]) | JUNK,
    "image_data": TEXTS | st.lists(TEXTS, max_size=2),
    "audio_data": TEXTS,
    "video_data": TEXTS,
    "modalities": st.lists(TEXTS, max_size=2),
    "return_logprob": FLAGS | st.lists(FLAGS, max_size=2),
    "logprob_start_len": st.integers(-2, 5) | NUMBERS,
    "top_logprobs_num": st.integers(-1, 5) | NUMBERS,
    "token_ids_logprob": st.lists(TOKENS, max_size=3),
    "return_text_in_logprobs": FLAGS,
    "return_flat_raw_top_logprobs": FLAGS,
    "return_sampling_mask": FLAGS,
    "return_entropy": FLAGS,
    "return_indexer_topk": FLAGS,
    "return_prompt_token_ids": FLAGS,
    "lora_id": TEXTS,
    "positional_embed_overrides": JUNK,
    "multi_item_delimiter_indices": st.lists(TOKENS, max_size=2),
    "http_worker_ipc": TEXTS,
    "num_items_assigned": JUNK,
    "encoder_urls": st.lists(TEXTS, max_size=1),
    "decode_tp_size": NUMBERS,
    "max_thinking_tokens": COUNTS,
    "require_reasoning": FLAGS,
    "received_time": NUMBERS,
    "external_trace_header": JUNK,
    "custom_labels": JUNK,
    "conversation_id": TEXTS,
    "background": FLAGS,
}
OPENAI: Mapping[str, st.SearchStrategy[Any]] = {
    **SAMPLING,
    **ALL_ENDPOINTS,
    "min_tokens": COUNTS,
    "seed": NUMBERS,
    "user": TEXTS,
    "stream_options": st.fixed_dictionaries({"include_usage": FLAGS}) | JUNK,
    "cache_salt": TEXTS | JUNK,
    "return_token_ids": FLAGS,
    "response_format": st.builds(
        lambda kind, schema: {"type": kind, "json_schema": {"name": "a", "schema": schema}},
        st.sampled_from(["json_schema", "json_object", "text", "structural_tag", "x"]),
        SCHEMAS,
    ),
}
COMPLETIONS: Mapping[str, st.SearchStrategy[Any]] = {
    **OPENAI,
    "prompt": TEXTS
    | st.lists(TEXTS, max_size=2)
    | st.lists(TOKENS, max_size=4)
    | st.lists(st.lists(TOKENS), max_size=2),
    "logprobs": st.integers(0, 5) | NUMBERS,
    "echo": FLAGS,
    "best_of": NUMBERS,
    "suffix": TEXTS,
    "json_schema": SCHEMAS.map(json.dumps) | TEXTS,
}
FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES}, optional={"parameters": SCHEMAS | JUNK, "strict": FLAGS, "description": TEXTS}
)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function") | TEXTS, "function": FUNCTIONS}), max_size=3)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXTS,
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": NAMES, "arguments": TEXTS}),
        }
    ),
    max_size=2,
)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": TEXTS})})
    | st.fixed_dictionaries({"type": st.just("audio_url"), "audio_url": JUNK})
    | JUNK,
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer", "function", "x"])},
        optional={
            "content": TEXTS | PARTS | st.none(),
            "tool_calls": CALLS | JUNK,
            "tool_call_id": TEXTS,
            "name": NAMES,
            "reasoning_content": TEXTS,
        },
    ),
    max_size=4,
)
CHAT: Mapping[str, st.SearchStrategy[Any]] = {
    **OPENAI,
    "messages": MESSAGES,
    "tools": TOOLS,
    "tool_choice": st.sampled_from(["auto", "none", "required", "x"])
    | st.builds(lambda name: {"type": "function", "function": {"name": name}}, NAMES),
    "parallel_tool_calls": FLAGS,
    "logprobs": FLAGS,
    "top_logprobs": st.integers(-1, 6) | NUMBERS,
    "max_completion_tokens": COUNTS,
    "reasoning_effort": st.sampled_from(["none", "low", "max", "x"]) | FRACTIONS,
    "chat_template_kwargs": st.fixed_dictionaries({"enable_thinking": FLAGS | JUNK}) | JUNK,
    "continue_final_message": FLAGS,
    "separate_reasoning": FLAGS,
    "stream_reasoning": FLAGS,
    "input_ids": st.lists(TOKENS, max_size=4),
}
TALK = [{"role": "user", "content": "where is order 1042?"}]
TOOL_TALK = [
    *TALK,
    {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "shipped"},
]


@st.composite
def generate(draw: st.DrawFn) -> Body:
    sampling = with_fields(
        draw, {"max_new_tokens": MAX_TOKENS, "temperature": 0}, {**SAMPLING, **ONLY_GENERATE}, most=3
    )
    prompt = draw(st.sampled_from([{"text": "where is order 1042?"}, {"input_ids": [5, 6, 7]}]))
    body = with_fields(draw, {**prompt, "sampling_params": sampling, "stream": draw(FLAGS)}, GENERATE, most=2)
    if draw(st.integers(0, 30)) == 0:
        body["sampling_params"] = draw(JUNK | st.lists(st.just(sampling), max_size=2))
    return body


@st.composite
def completion(draw: st.DrawFn) -> Body:
    body = {"model": "whiflash-demo", "prompt": "where is", "max_tokens": MAX_TOKENS, "stream": draw(FLAGS)}
    return with_fields(draw, body, COMPLETIONS, most=4)


@st.composite
def chat(draw: st.DrawFn) -> Body:
    messages = draw(st.sampled_from([TALK, TOOL_TALK]))
    body = {"model": "whiflash-demo", "messages": messages, "max_tokens": MAX_TOKENS, "stream": draw(FLAGS)}
    return with_fields(draw, body, CHAT, most=4)


# Requests

NO_JSON = st.sampled_from(
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"text": "\xed\xa0\x80"}', b'{"a": 1' + b"0" * 5000 + b"}"]
    + [b"[" * depth + b"]" * depth for depth in (50, 2_000, 100_000)]
    + [b'{"sampling_params": ' + b'{"custom_params":' * 900 + b"1" + b"}" * 901]
)
IDS = (NAMES | TEXTS | st.sampled_from(["..", "a/b", "stats", "0" * 32])).filter(lambda text: len(text) < 200)


def encoded(body: Body) -> bytes:
    """JSON as Python writes it: lone surrogates escaped, NaN and Infinity as they are."""
    return json.dumps(body).encode()


def any_case() -> st.SearchStrategy[Case]:
    bodies = {"/generate": generate(), "/v1/completions": completion(), "/v1/chat/completions": chat()}
    leaves = st.integers(0, 9).map(lambda die: die == 9)
    posts = [
        st.builds(Case, st.just("POST"), st.just(path), body.map(encoded), leaves) for path, body in bodies.items()
    ]
    raw = st.builds(Case, st.just("POST"), st.sampled_from(sorted(bodies)), NO_JSON, leaves)
    ids = IDS.map(lambda text: quote(text, safe="", errors="surrogatepass"))
    paths = st.sampled_from(["/whiflash/stats", "/whiflash/priors", "/whiflash", "/whiflash/x"]) | ids.map(
        "/whiflash/requests/{}".format
    )
    methods = st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
    ours = st.builds(Case, methods, paths, NO_JSON | st.just(b""))
    return st.one_of(*posts, *posts, *posts, raw, ours)
