"""Hints: what is refused, what wins, what is sent."""

from __future__ import annotations

import math

import pytest

from whiflash_agents.hints import HintError, Hints, hints_in


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("route", "gpu"),
        ("route", ""),
        ("route", ["df"]),
        ("span", "answers"),
        ("span", 1),
        ("prior", "0.5"),
        ("prior", True),
        ("prior", math.nan),
        ("prior", math.inf),
        ("prior", -16.5),
        ("tool", ""),
        ("tool", 7),
        ("tool", "x" * 129),
        ("trace", 1),
    ],
)
def test_a_wrong_value_names_field_value_and_mend(field: str, value: object) -> None:
    with pytest.raises(HintError) as caught:
        Hints.parse({field: value})
    assert (caught.value.field, caught.value.value) == (field, value) or value is math.nan
    assert f"{field}={value!r}" in str(caught.value) and "; give " in str(caught.value)


@pytest.mark.parametrize("given", [["route"], "df", 1])
def test_hints_are_a_mapping(given: object) -> None:
    with pytest.raises(HintError, match="not a mapping"):
        Hints.parse(given)  # type: ignore[arg-type]


def test_nothing_is_no_hint() -> None:
    assert Hints.parse(None) == Hints.parse({}) == Hints() == hints_in(None) == hints_in({"top_k": 1})
    assert Hints().into(None) == {} and Hints().into({"top_k": 1}) == {"top_k": 1}


def test_a_prior_of_zero_is_a_hint() -> None:
    assert Hints(prior=0, trace=False).given == {"prior": 0, "trace": False}
    assert Hints(prior=0).over(Hints(prior=2.0, route="df")) == Hints(prior=0, route="df")


def test_what_is_sent_leaves_the_users_own_alone() -> None:
    extra = {"custom_params": {"whiflash": {"route": "df"}, "mine": 1}}
    assert Hints(tool="x").over(hints_in(extra)).into(extra) == {
        "custom_params": {"whiflash": {"route": "df", "tool": "x"}, "mine": 1}
    }
    assert extra == {"custom_params": {"whiflash": {"route": "df"}, "mine": 1}}
