"""The requests of a server under load: questions in every form that clients use, and requests it must refuse.

    asks = greedy_asks(questions, random)     the same questions greedily, each in one way; their texts can be compared
    draw = Draw(asks, random)
    draw.request()                            one in ten is bad; of the others, some are sampled, aborted or left

Hints change which drafter runs, never the text, so an ask has one text whatever hints are drawn for it. Nothing here
talks to a server.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
Fate = Literal["finish", "abort", "leave", "ended"]  # ended: with the server

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
MODEL = "whiflash-demo"

BAD = 0.1  # share of requests
SAMPLED = 0.4  # share of the good ones
STREAMED = 0.6
FATES: dict[Fate, int] = {"finish": 6, "abort": 1, "leave": 1}  # weights
ROUTES = ("auto", "e3", "df", "off", None)
WARMTH = ({"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.3, "top_k": 40})
LONG = 320  # tokens of the texts that are still being written when a server is told to end


class Question(NamedTuple):
    """A recorded history up to an assistant's turn, as each endpoint takes it."""

    ids: list[int]
    text: str
    messages: list[Json]
    tools: list[Json]


@dataclass(frozen=True)
class Request:
    """What is sent. `refused`: a healthy server answers with an error."""

    kind: str
    path: str
    body: Json | bytes
    method: str = "POST"
    refused: bool = False
    ask: int | None = None  # number of the greedy ask whose text is expected
    fate: Fate = "finish"
    cut_at: int = 0  # events after which a stream is cut short; tenths of a second if not streamed
    replies: int = 1  # 0: unknown; only status and errors are read
    tokens: int = 0  # of the prompt and at most the output

    @property
    def streamed(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True

    @property
    def json_expected(self) -> bool:
        return self.kind == "json schema"

    @property
    def rid(self) -> str:
        assert isinstance(self.body, dict)
        return str(self.body["rid"])


# ------------------------------------------------------------------------------------------------------------- good

SCHEMA = {
    "type": "object",
    "properties": {"order": {"type": "integer"}, "state": {"enum": ["shipped", "open", "cancelled"]}},
    "required": ["order", "state"],
    "additionalProperties": False,
}


def _generate(question: Question, max_tokens: int, **sampling: Any) -> Json:
    return {"input_ids": question.ids, "sampling_params": {"max_new_tokens": max_tokens, **sampling}}


def _chat(question: Question, max_tokens: int, **fields: Any) -> Json:
    return {"model": MODEL, "messages": question.messages, "max_tokens": max_tokens, **fields}


def _completion(question: Question, max_tokens: int, **fields: Any) -> Json:
    return {"model": MODEL, "prompt": question.text, "max_tokens": max_tokens, **fields}


def _json_schema(question: Question) -> Json:
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}
    return _chat(question, 64, response_format=form, chat_template_kwargs={"enable_thinking": False})


KINDS: dict[str, tuple[str, int, Callable[[Question], Json]]] = {
    "ids": (GENERATE, 96, lambda q: _generate(q, 96)),
    "tools": (CHAT, 300, lambda q: _chat(q, 300, tools=q.tools)),
    "json schema": (CHAT, 64, _json_schema),
    "two completions": (COMPLETIONS, 48, lambda q: _completion(q, 48, n=2)),
    "stop string": (GENERATE, 96, lambda q: _generate(q, 96, stop=["."])),
    "long": (GENERATE, LONG, lambda q: _generate(q, LONG, ignore_eos=True)),
    "penalties": (GENERATE, 64, lambda q: _generate(q, 64, frequency_penalty=0.3, presence_penalty=0.2)),
    "tool required": (CHAT, 200, lambda q: _chat(q, 200, tools=q.tools, tool_choice="required")),
    "regex": (GENERATE, 48, lambda q: _generate(q, 48, regex=r"(yes|no)(, order [0-9]{4})+\.")),
    "two chats": (CHAT, 96, lambda q: _chat(q, 96, n=2)),
    "at least": (GENERATE, 64, lambda q: _generate(q, 64, min_new_tokens=40)),
    "grammar": (GENERATE, 48, lambda q: _generate(q, 48, ebnf='root ::= ("order " [0-9]+ "\\n")+ "end"')),
}
"""Kind -> endpoint, maximum tokens of each reply, and body."""


def greedy_asks(questions: Sequence[Question]) -> list[Request]:
    """Every question once, in the kinds in turn."""
    asks = []
    for number, question in enumerate(questions):
        kind = list(KINDS)[number % len(KINDS)]
        path, max_tokens, build = KINDS[kind]
        body = build(question)
        _sampling(path, body)["temperature"] = 0
        replies = body.get("n", 1)
        tokens = len(question.ids) + replies * max_tokens
        asks.append(Request(kind, path, body, ask=number, replies=replies, tokens=tokens))
    return asks


def pool_for(asks: Sequence[Request], clients: int) -> int:
    """KV tokens: a quarter of what `clients` asks need."""
    return int(clients * statistics.mean(ask.tokens for ask in asks)) // 4


def as_stream(ask: Request, streamed: bool = True) -> Request:
    """The same ask, streamed or not."""
    return replace(ask, body={**_object(ask), "stream": streamed})


def with_logprobs(ask: Request) -> Json:
    """The body that also requests the two best tokens of each position."""
    asked: dict[str, Json] = {
        GENERATE: {"return_logprob": True, "top_logprobs_num": 2},
        CHAT: {"logprobs": True, "top_logprobs": 2},
        COMPLETIONS: {"logprobs": 2},
    }
    return {**_object(ask), **asked[ask.path]}


def _object(request: Request) -> Json:
    assert isinstance(request.body, dict)
    return request.body


def _sampling(path: str, body: Json) -> Json:
    """The part of a body that holds the sampling parameters."""
    found: Json = body["sampling_params"] if path == GENERATE else body
    return found


# -------------------------------------------------------------------------------------------------------------- bad


def bad_requests(question: Question, context: int) -> list[Request]:
    """One of each kind that a server must refuse. `context`: its maximum context length."""
    generate, chat, completion = _generate(question, 8), _chat(question, 8), _completion(question, 8)
    unclosed, colour = "(unclosed", {"type": "colour"}
    colours = {"type": "json_schema", "json_schema": {"name": "colours", "schema": colour}}
    too_long = [5] * (context + 1)

    def hint(**fields: Any) -> Json:
        return {"custom_params": {"whiflash": fields}}

    def sampling(**fields: Any) -> Json:
        return _generate(question, 8, **fields)

    bodies: dict[str, tuple[str, Json | bytes]] = {
        "unknown hint": (CHAT, chat | hint(nobody=1)),
        "unknown route": (COMPLETIONS, completion | hint(route="fastest")),
        "ill-typed hint": (GENERATE, sampling(**hint(prior="much"))),
        "ill-typed hint, streamed": (GENERATE, sampling(**hint(trace="yes")) | {"stream": True}),
        "custom_params of a wrong type": (COMPLETIONS, completion | {"custom_params": [1]}),
        "custom_params too deep": (CHAT, chat | {"custom_params": {"a": [[1]]}}),
        "temperature as text": (CHAT, chat | {"temperature": "warm"}),
        "negative temperature": (GENERATE, sampling(temperature=-1)),
        "top_p above 1": (CHAT, chat | {"top_p": 2}),
        "negative max_tokens": (CHAT, chat | {"max_tokens": -1, "stream": True}),
        "min above max": (GENERATE, sampling(min_new_tokens=9)),
        "sampling_params of a wrong type": (GENERATE, generate | {"sampling_params": "hot"}),
        "stop token as text": (GENERATE, sampling(stop_token_ids=["a"])),
        "logit_bias outside": (CHAT, chat | {"logit_bias": {"999999": 1}}),
        "n of 0": (CHAT, chat | {"n": 0}),
        "unclosed regex": (GENERATE, sampling(regex=unclosed)),
        "unclosed regex, streamed": (GENERATE, sampling(regex=unclosed) | {"stream": True}),
        "unclosed regex in a chat": (CHAT, chat | {"regex": unclosed}),
        "broken grammar": (GENERATE, sampling(ebnf="root ::= ((")),
        "schema that is no JSON": (GENERATE, sampling(json_schema="{not json")),
        "schema of no type": (CHAT, chat | {"response_format": colours}),
        "schema of no type, streamed": (CHAT, chat | {"response_format": colours, "stream": True}),
        "two grammars": (GENERATE, sampling(regex="a", ebnf='root ::= "a"')),
        "unknown response_format": (CHAT, chat | {"response_format": {"type": "poem"}}),
        "prompt too long": (GENERATE, generate | {"input_ids": too_long}),
        "prompt too long, streamed": (GENERATE, generate | {"input_ids": too_long, "stream": True}),
        "chat too long": (CHAT, chat | {"messages": [{"role": "user", "content": "order " * context}]}),
        "empty prompt": (GENERATE, generate | {"input_ids": []}),
        "tokens of no vocabulary": (GENERATE, generate | {"input_ids": [5, 10**6]}),
        "negative tokens": (GENERATE, generate | {"input_ids": [5, -5]}),
        "tokens as text": (GENERATE, generate | {"input_ids": ["five"]}),
        "no prompt": (GENERATE, {"sampling_params": {"max_new_tokens": 8}}),
        "no messages": (CHAT, {"model": MODEL, "max_tokens": 8}),
        "messages as text": (CHAT, chat | {"messages": "hello"}),
        "unknown role": (CHAT, chat | {"messages": [{"role": "pirate", "content": "hello"}]}),
        "tool without a function": (CHAT, chat | {"tools": [{"type": "function"}]}),
        "tool required of none": (CHAT, chat | {"tool_choice": "required"}),
        "no truth value": (CHAT, chat | {"stream": "perhaps"}),
        "broken JSON": (CHAT, b'{"model": "whiflash-demo", "messages": ['),
        "no UTF-8": (GENERATE, b"\xff\xfe{"),
        "no body": (GENERATE, b""),
        "unknown LoRA": (GENERATE, generate | {"lora_path": "none-such"}),
        "unknown URL": ("/v1/complete", completion),
        "unknown figures": ("/whiflash/requests/none-such", b""),
    }
    return [
        Request(kind, path, body, method="GET" if path.startswith("/whiflash/") else "POST", refused=True)
        for kind, (path, body) in bodies.items()
    ]


# -------------------------------------------------------------------------------------------------------------- draw


class Draw:
    """Draws requests, reproducibly for a seed."""

    def __init__(self, asks: Sequence[Request], bad: Sequence[Request], rng: random.Random):
        self.asks = asks
        self.bad = bad
        self.rng = rng

    def request(self) -> Request:
        """The next request."""
        return self.rng.choice(self.bad) if self.rng.random() < BAD else self.good(self.rng.choice(self.asks))

    def good(self, ask: Request) -> Request:
        """An ask with random hints, sampling, streaming and fate."""
        rng = self.rng
        (fate,) = rng.choices(list(FATES), list(FATES.values()))
        # All of one length: SGLang aborts every request whose id begins with the given one.
        body = {**_object(ask), "rid": f"chaos-{rng.getrandbits(64):016x}", "stream": rng.random() < STREAMED}
        if ask.path == GENERATE:
            body["sampling_params"] = dict(body["sampling_params"])
        params = _sampling(ask.path, body)
        if (route := rng.choice(ROUTES)) is not None:
            params["custom_params"] = {"whiflash": {"route": route}}
        number = ask.ask
        if rng.random() < SAMPLED:
            params |= rng.choice(WARMTH)
            number = None
        return replace(ask, body=body, ask=number, fate=fate, cut_at=rng.randint(0, 6))
