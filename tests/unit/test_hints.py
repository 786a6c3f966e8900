"""What `custom_params` may hold, and how what it may not is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whiflash_sglang.core.errors import HintError
from whiflash_sglang.core.hints import CONTEXT_FIELD, FIELD, Asked, Hints, context_params, parse
from whiflash_sglang.core.spans import SPANS, Context

BOTH = ("df", "e3")


def hints(**given: Any) -> Hints:
    return parse({FIELD: given}, BOTH).hints


@pytest.mark.parametrize("custom_params", [None, {}, {FIELD: None}, {FIELD: {}}, {"thinking_budget": 5}])
def test_no_hints(custom_params: object) -> None:
    assert parse(custom_params, BOTH) == Asked()
    assert Hints().given() == {}


def test_all_hints() -> None:
    found = hints(route="e3", span="tool_call", prior=-2, tool="get_order", trace=True)
    assert found == Hints("e3", "tool_call", -2.0, "get_order", True)
    assert found.given() == {"route": "e3", "span": "tool_call", "prior": -2.0, "tool": "get_order", "trace": True}


def test_null_is_left_out() -> None:
    assert hints(route=None, span=None, prior=None, tool=None, trace=None) == Hints()


@pytest.mark.parametrize("route", ["auto", "off", "df", "e3"])
def test_every_route(route: str) -> None:
    assert hints(route=route).route == route


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"route": "e4"}, ["route 'e4'", "auto, df, e3, off"]),
        ({"route": ["df"]}, ["route ['df']"]),
        ({"span": "thought"}, ["span 'thought'", *SPANS]),
        ({"prior": "2"}, ["prior '2'", "not a number", "-16.0 to 16.0"]),
        ({"prior": True}, ["prior True", "not a number"]),
        ({"prior": 16.5}, ["prior 16.5", "-16.0 to 16.0"]),
        ({"prior": float("nan")}, ["prior nan", "-16.0 to 16.0"]),
        ({"prior": 10**400}, ["prior 1000", "-16.0 to 16.0"]),
        ({"tool": 5}, ["tool 5", "1 to 128 characters"]),
        ({"tool": ""}, ["tool ''", "1 to 128 characters"]),
        ({"tool": "x" * 129}, ["tool 'xxx", "129 characters long"]),
        ({"trace": 1}, ["trace 1", "true or false"]),
        ({"rout": "e3"}, ["rout 'e3'", "unknown field", "route, span, prior, tool, trace"]),
    ],
)
def test_refusals_name_field_value_and_mend(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(HintError) as refusal:
        parse({FIELD: given}, BOTH)
    message = str(refusal.value)
    assert message.startswith("custom_params.whiflash.")
    assert all(word in message for word in words), message
    assert len(message) < 300


@pytest.mark.parametrize("custom_params", [5, "x", [1], {FIELD: 5}, {FIELD: ["route"]}, {CONTEXT_FIELD: "user"}])
def test_what_is_no_object_is_refused(custom_params: object) -> None:
    with pytest.raises(HintError, match="not an object"):
        parse(custom_params, BOTH)


def test_a_drafter_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(HintError, match=r"route 'df': .*not loaded.*use auto, e3, off, or start the server with"):
        parse({FIELD: {"route": "df"}}, ("e3",))


def test_a_context_survives_its_way() -> None:
    context = Context("tool_output", "get_order")
    assert parse({CONTEXT_FIELD: context_params(context)}, BOTH).context == context
    with pytest.raises(HintError, match=r"whiflash_context\.kind 'agent'"):
        parse({CONTEXT_FIELD: {"kind": "agent"}}, BOTH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["auto", *SPANS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(Hints._fields), JSON) | JSON)
def test_any_json_is_taken_or_refused(content: object) -> None:
    """Anything else than a `HintError` would be answered with HTTP 500, or would end the scheduler."""
    try:
        found = parse({FIELD: content}, BOTH).hints
    except HintError:
        return
    assert found == hints(**found.given())
