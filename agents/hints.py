"""Hints from a client to the server's router, validated before sending.

    hints = Hints(route="auto", span="tool_call", prior=0.5, tool="lookup_order")
    hints.into({"top_k": 1})    # an `extra_body` with the hints under `custom_params.whiflash`

| field | meaning |
|---|---|
| `route` | `auto`: the server's router decides. `e3`, `df`: this drafter in every round. `off`: no drafts |
| `span` | the span that the reply starts with: `reasoning`, `tool_call` or `answer` |
| `prior` | added to the router's score, in acceptance length, -16 to 16; positive values favor EAGLE-3 |
| `tool` | name of the tool whose output the reply is about, up to 128 characters |
| `trace` | `True`: include every round with its drafts and tokens in the reply's figures |

All fields are optional. An invalid one raises `HintError`, which names field, value and fix, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ROUTES = ("auto", "e3", "df", "off")
SPANS = ("reasoning", "tool_call", "answer")
MAX_PRIOR = 16
MAX_TOOL_NAME = 128
PARAMS, NAMESPACE = "custom_params", "whiflash"


class HintError(ValueError):
    """An invalid hint: its field, the value, the problem and the fix."""

    def __init__(self, field: str, value: object, problem: str, fix: str):
        self.field, self.value = field, value
        super().__init__(f"hint {field}={value!r}: {problem}; {fix}")


@dataclass(frozen=True)
class Hints:
    """The hints of one request. Fields that are None are not sent."""

    route: str | None = None
    span: str | None = None
    prior: float | None = None
    tool: str | None = None
    trace: bool | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("route", ROUTES), ("span", SPANS)):
            value = getattr(self, field)
            if value is not None and value not in allowed:
                raise HintError(field, value, "unknown", "give one of " + ", ".join(allowed))
        is_number = isinstance(self.prior, int | float) and not isinstance(self.prior, bool)
        if self.prior is not None and not (is_number and -MAX_PRIOR <= self.prior <= MAX_PRIOR):
            fix = f"give units of acceptance length from {-MAX_PRIOR} to {MAX_PRIOR}, e.g. 0.5"
            raise HintError("prior", self.prior, "not a number within bounds", fix)
        if self.tool is not None and not (isinstance(self.tool, str) and 1 <= len(self.tool) <= MAX_TOOL_NAME):
            fix = f"give the name in the tool's schema, 1 to {MAX_TOOL_NAME} characters"
            raise HintError("tool", self.tool, "not a tool's name", fix)
        if not isinstance(self.trace, bool | None):
            raise HintError("trace", self.trace, "not a boolean", "give True or False")

    @classmethod
    def parse(cls, given: Hints | Mapping[str, Any] | None) -> Hints:
        """Convert `Hints`, a mapping of fields, or None to Hints. Raises HintError."""
        if given is None or isinstance(given, Hints):
            return given or cls()
        if not isinstance(given, Mapping):
            raise HintError(NAMESPACE, given, "not a mapping", "give fields and values, e.g. {'route': 'df'}")
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise HintError(str(name), value, "unknown field", "give one of " + ", ".join(known))
        return cls(**given)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, other: Hints) -> Hints:
        """These hints, with unset fields taken from `other`."""
        return Hints(**(other.given | self.given))

    def into(self, extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
        """A copy of `extra_body` with these hints added, if there are any."""
        body = dict(extra_body or {})
        if self.given:
            body[PARAMS] = {**(body.get(PARAMS) or {}), NAMESPACE: self.given}
        return body


def hints_in(extra_body: Mapping[str, Any] | None) -> Hints:
    """The hints in an `extra_body`. Raises HintError."""
    return Hints.parse(((extra_body or {}).get(PARAMS) or {}).get(NAMESPACE))
