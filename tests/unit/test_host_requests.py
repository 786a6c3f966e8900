"""What the hooks do with a request: hints judged on both sides, a chat's context told."""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    FlushCacheReqInput,
    GetInternalStateReq,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from whiflash_sglang.bridge.builders import asked
from whiflash_sglang.bridge.http_hooks import _judge_request, _states_without_keys, _tell_context, ask_schedulers
from whiflash_sglang.bridge.scheduler_hooks import (
    PRIORS_FIELD,
    RANKS_FIELD,
    _add_stats,
    _judge_custom_params,
    _name_ourselves,
)
from whiflash_sglang.core.errors import HintError
from whiflash_sglang.core.hints import Asked, Hints
from whiflash_sglang.core.spans import Context
from whiflash_sglang.startup.config import WhiFlashConfig

CONFIG = WhiFlashConfig(drafters="e3", eagle_draft="e", router="fixed:e3")


def request(custom_params: object, **more: Any) -> SimpleNamespace:
    params = SimpleNamespace(custom_params=custom_params)
    return SimpleNamespace(**({"sampling_params": params, "return_hidden_states": False} | more))


def test_sampling_parameters_are_judged_by_the_loaded_drafters() -> None:
    judge = lambda custom_params: _judge_custom_params(  # noqa: E731
        CONFIG.drafter_names, None, SimpleNamespace(custom_params=custom_params), 1280
    )
    judge(None)
    judge({"whiflash": {"route": "e3"}, "thinking_budget": 5, "stops": [1, 2]})
    with pytest.raises(ValueError, match="route 'df'"):
        judge({"whiflash": {"route": "df"}})
    with pytest.raises(HintError, match=r"custom_params: Expected .* got `array`"):
        judge({"stops": [[1]]})


def test_a_request_that_came_another_way_is_refused_by_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """And passes through it without hints: a refused request is still prefilled, one token long."""
    monkeypatch.setenv("WHIFLASH_CONFIG", CONFIG.to_json())
    allowed = lambda request: None  # noqa: E731
    assert _name_ourselves(allowed, request({"whiflash": {"prior": 2}})) is None
    bad = request({"whiflash": {"prior": "2"}})
    refusal = _name_ourselves(allowed, bad)
    assert refusal is not None
    assert refusal.startswith("custom_params.whiflash.prior '2': not a number")
    assert asked(bad, CONFIG) == Asked()


def test_log_probabilities_are_not_refused_as_those_of_the_family_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_CONFIG", CONFIG.to_json())

    def refuses(request: SimpleNamespace) -> str:
        return f"DFLASH speculative decoding does not support {request.asked} yet."

    def judged(asked: str) -> str | None:
        return _name_ourselves(refuses, SimpleNamespace(**vars(request(None)), asked=asked))

    assert judged("return_logprob") is None
    assert judged("other") is not None and "WHIFLASH" in judged("other") and "--whiflash-router off" in judged("other")


def test_a_chat_tells_its_context_beside_the_hints() -> None:
    call = SimpleNamespace(id="a", function=SimpleNamespace(name="get_order"))
    messages = [
        SimpleNamespace(role="assistant", tool_calls=[call]),
        SimpleNamespace(role="tool", name=None, tool_call_id="a"),
    ]
    for given, hints in ((None, Hints()), ({"whiflash": {"prior": 1}}, Hints(prior=1.0))):
        adapted = SimpleNamespace(sampling_params={"custom_params": given})
        _tell_context((adapted, None), None, SimpleNamespace(messages=messages))
        found = asked(request(adapted.sampling_params["custom_params"]), CONFIG)
        assert found == Asked(hints, Context("tool_output", "get_order"))


MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


def tokenized(**given: Any) -> TokenizedGenerateReqInput:
    """As SGLang makes it of a request, with a field of no declared type."""
    fields: dict[str, Any] = {
        "rid": "a",
        "input_text": "x",
        "input_ids": array("q", [1, 2]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
        "time_stats": object(),
    }
    return TokenizedGenerateReqInput(**fields | given)


def test_a_request_is_judged_where_it_leaves_for_the_scheduler() -> None:
    request = tokenized()
    statistics = request.time_stats
    _judge_request(MANAGER, request)
    assert request.time_stats is statistics, "what is judged is sent as it was"
    _judge_request(MANAGER, BatchTokenizedGenerateReqInput(batch=[tokenized(), tokenized(rid="b")]))
    _judge_request(MANAGER, FlushCacheReqInput())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"session_id": 5}, r"request\.session_id: Expected `str \| null`, got `int`"),
        ({"lora_id": ["x"]}, r"request\.lora_id: Expected"),
        ({"extra_key": "\ud800"}, "request: 'utf-8' codec"),
        ({"input_ids": array("q", [100])}, "input_ids 100: outside the vocabulary"),
        ({"top_logprobs_num": 101}, "top_logprobs_num 101"),
        ({"sampling_params": SamplingParams(json_schema={"a": 1})}, r"sampling_params\.json_schema: Expected"),
        ({"sampling_params": SamplingParams(regex="\0")}, "NUL"),
    ],
)
def test_one_bad_request_of_a_batch_is_enough(given: dict[str, Any], said: str) -> None:
    for sent in (tokenized(**given), BatchTokenizedGenerateReqInput(batch=[tokenized(), tokenized(**given)])):
        with pytest.raises(ValueError, match=said):
            _judge_request(MANAGER, sent)


def test_the_state_of_the_scheduler_is_shown_without_keys() -> None:
    async def state(manager: object) -> list[dict[str, Any]]:
        return [{"api_key": "a", "admin_api_key": "b", "whiflash": {"rounds": 1}}, {RANKS_FIELD: {"replica": 1}}]

    shown = asyncio.run(_states_without_keys(state, None))
    assert shown == [{"api_key": None, "admin_api_key": None, "whiflash": {"rounds": 1}}, {RANKS_FIELD: {"replica": 1}}]


def test_a_document_of_priors_is_made_only_where_it_is_asked_for() -> None:
    """Not for `/server_info` or `/whiflash/stats`, however often these are read."""
    made: list[str] = []
    worker = SimpleNamespace(
        totals=SimpleNamespace(snapshot=lambda: {"rounds": 1}),
        ranks=SimpleNamespace(snapshot=lambda: {"size": 1}),
        priors_document=lambda: made.append("document") or {"scores": {}},
    )
    scheduler = SimpleNamespace(draft_worker=worker, ps=SimpleNamespace(dp_rank=None))

    async def ask(request: GetInternalStateReq) -> list[Any]:
        return [_add_stats(SimpleNamespace(internal_state={}), scheduler, request)]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, get_internal_state_communicator=ask)
    for _ in range(10):
        (state,) = asyncio.run(ask_schedulers(manager, priors=False))
        asyncio.run(ask(GetInternalStateReq()))  # SGLang's own
        assert PRIORS_FIELD not in state and state["whiflash"] == {"rounds": 1}
    assert not made
    (state,) = asyncio.run(ask_schedulers(manager, priors=True))
    assert state[PRIORS_FIELD] == {"scores": {}} and made == ["document"]


@pytest.mark.parametrize("way", ["update_weights_from_disk", "update_weights_from_ipc"])
def test_new_weights_are_the_targets_alone(way: str) -> None:
    """SGLang would load the target's checkpoint into "the" drafter, by an attribute that ends the scheduler here."""
    from whiflash_sglang.serving.worker import WhiFlashWorker

    worker = object.__new__(WhiFlashWorker)
    done, message = getattr(worker, way)(SimpleNamespace(model_path="target"))
    assert done and "drafters keep theirs" in message
