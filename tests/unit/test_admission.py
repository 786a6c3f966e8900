"""What would end SGLang's scheduler is refused before it gets there, and what it can bear is not."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import dec_hook, msgpack_encode
from sglang.srt.sampling.sampling_params import SamplingParams

from whiflash_sglang.bridge.admission import (
    FILLED_IN,
    MAX_NESTING,
    judge_grammars,
    judge_logprobs,
    judge_names,
    judge_prompt,
    judge_samples,
    judge_sampling,
    judge_types,
)
from whiflash_sglang.bridge.scheduler_hooks import _open_dead_ends
from whiflash_sglang.core.errors import MAX_SHOWN, RequestError

VOCABULARY = 100


def sampling(**given: Any) -> SamplingParams:
    """As the HTTP process makes them of a body's `sampling_params`."""
    params = SamplingParams(**given)
    params.normalize(FakeTokenizer())
    params.verify(VOCABULARY)
    return params


class FakeTokenizer:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1]


def judge(params: SamplingParams) -> None:
    judge_types(params, "sampling_params", msgpack_encode, dec_hook)
    judge_sampling(params, VOCABULARY)
    judge_grammars(params)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "max_new_tokens": 4, "min_new_tokens": 2},
        {"stop": ["a", "é"], "stop_token_ids": [0, VOCABULARY - 1], "logit_bias": {"5": -100, "6": 100.5}},
        {"json_schema": '{"type": "object"}', "custom_params": {"whiflash": {"route": "off"}, "n": [1, 2]}},
        {"regex": "(" * 150 + ")" * 150, "sampling_seed": -5, "repetition_penalty": 0.1, "stream_interval": 0},
    ],
)
def test_honest_requests_pass(given: dict[str, Any]) -> None:
    judge(sampling(**given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"json_schema": {"type": "object"}}, "sampling_params.json_schema: Expected `str | null`, got `object`"),
        ({"max_new_tokens": 3.5}, "sampling_params.max_new_tokens: Expected `int | null`, got `float`"),
        ({"stop": ["a", "\ud800"]}, "sampling_params: 'utf-8' codec can't encode"),
        ({"logit_bias": {"5": "x"}}, "sampling_params.logit_bias[...]: Expected `float`, got `str`"),
        ({"custom_params": {"a": [[1]]}}, "sampling_params.custom_params[...][0]: Expected"),
        ({"sampling_seed": 2**64}, "sampling_params: "),
        ({"sampling_seed": 2**63}, "sampling_seed 9223372036854775808: out of bounds"),
        ({"top_k": 2**31}, "top_k 2147483648: out of bounds"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, "min_new_tokens 2147483648: out of bounds"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids 100: outside the vocabulary"),
        ({"stop_token_ids": [-1]}, "stop_token_ids -1: outside the vocabulary"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty 1e-45: out of bounds"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias['5'] nan: out of bounds"),
        ({"logit_bias": {"5": float("inf")}}, "logit_bias['5'] inf: out of bounds"),
        ({"logit_bias": {"5": 1e39}}, "logit_bias['5'] 1e+39: out of bounds"),
        ({"regex": "\0"}, "regex '\\x00': contains a NUL character"),
        ({"json_schema": '{"pattern": "\\u0000"}'}, 'json_schema \'{"pattern": "\\\\u0000"}\': contains a NUL'),
        ({"json_schema": '{"items": ' * 201 + "{}" + "}" * 201}, "too deeply nested; nest at most 200 levels"),
    ],
)
def test_what_would_end_the_scheduler_is_refused(given: dict[str, Any], said: str) -> None:
    """A refusal is a ValueError, so HTTP 400."""
    with pytest.raises(RequestError) as refusal:
        judge(sampling(**given))
    message = str(refusal.value)
    assert said in message
    assert message.isprintable() and len(message) < 300


@pytest.mark.parametrize("field", FILLED_IN)
def test_fields_that_sglang_fills_in_are_not_a_clients(field: str) -> None:
    """`is_normalized: true` made SGLang take a request's raw fields for checked ones, which ended the scheduler."""
    assert field in SamplingParams.__struct_fields__
    with pytest.raises(RequestError, match=rf"sampling_params\.{field}: not a field of requests"):
        judge_names({"temperature": 0, field: True})
    judge_names({"temperature": 0})


@pytest.mark.parametrize("ids", [[-1], [5, VOCABULARY], [2**63 - 1], [-(2**63), 0]])
def test_prompts_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(RequestError, match=r"input_ids .*: outside the vocabulary; give ids from 0 to 99"):
        judge_prompt(array("q", ids), VOCABULARY)


def test_replies_by_the_million() -> None:
    for number in (-1, 0, 1, 4096, "2", None, 1.5):
        judge_samples(number)
    with pytest.raises(RequestError, match="n 4097: out of bounds; give at most 4096"):
        judge_samples(4097)


def test_empty_prompts() -> None:
    """One of a list of prompts; SGLang refuses it alone."""
    with pytest.raises(RequestError, match="input_ids: an empty prompt"):
        judge_prompt(array("q"), VOCABULARY)


@pytest.mark.parametrize("ids", [None, [0, VOCABULARY - 1]])
def test_prompts_within_it(ids: list[int] | None) -> None:
    judge_prompt(None if ids is None else array("q", ids), VOCABULARY)


def test_more_logprobs_than_tokens() -> None:
    for number in (-1, VOCABULARY + 1):
        with pytest.raises(RequestError, match=f"top_logprobs_num {number}: out of bounds"):
            judge_logprobs(number, VOCABULARY)
    judge_logprobs(VOCABULARY, VOCABULARY)


def test_errors_show_what_was_sent_on_one_printable_line() -> None:
    with pytest.raises(RequestError) as refusal:
        judge_sampling(SamplingParams(logit_bias={"\ud800\n" * 100: float("nan")}), VOCABULARY)
    assert str(refusal.value).isprintable()
    assert "\\ud800\\n" in str(refusal.value)
    assert len(str(refusal.value)) < 100 + MAX_SHOWN


def test_nesting_is_counted_and_not_brackets() -> None:
    judge_grammars(SamplingParams(regex="(a)" * 1000))
    with pytest.raises(RequestError, match="too deeply nested"):
        judge_grammars(SamplingParams(ebnf="root ::= " + "(" * (MAX_NESTING + 1)))


def test_a_grammar_that_allows_nothing_ends_no_sampler() -> None:
    """`root ::= root` masks every token: the softmax of it is NaN, of which multinomial raised in the scheduler."""
    logits = torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]])

    class Sampling:
        grammar_mask: object = None

    _open_dead_ends(None, Sampling(), logits)
    assert not logits[1].isfinite().any(), "without a grammar logits are left alone"
    Sampling.grammar_mask = object()
    _open_dead_ends(None, Sampling(), logits)
    assert logits.tolist() == [[0.5, -torch.inf], [0.0, 0.0]]
    torch.multinomial(logits.softmax(dim=-1), 1)
