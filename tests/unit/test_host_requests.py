"""What the hooks do with a request: hints judged on both sides, a chat's context told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from whiflash_sglang.config import WhiFlashConfig
from whiflash_sglang.errors import HintError
from whiflash_sglang.hints import Asked, Hints
from whiflash_sglang.host import _judge_custom_params, _name_ourselves, _tell_context, asked
from whiflash_sglang.spans import Context

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
    assert _name_ourselves(None, request({"whiflash": {"prior": 2}})) is None
    bad = request({"whiflash": {"prior": "2"}})
    refusal = _name_ourselves(None, bad)
    assert refusal is not None
    assert refusal.startswith("custom_params.whiflash.prior '2': not a number")
    assert asked(bad, CONFIG) == Asked()


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


@pytest.mark.parametrize("way", ["update_weights_from_disk", "update_weights_from_ipc"])
def test_new_weights_are_the_targets_alone(way: str) -> None:
    """SGLang would load the target's checkpoint into "the" drafter, by an attribute that ends the scheduler here."""
    from whiflash_sglang.worker import WhiFlashWorker

    worker = object.__new__(WhiFlashWorker)
    done, message = getattr(worker, way)(SimpleNamespace(model_path="target"))
    assert done and "drafters keep theirs" in message
