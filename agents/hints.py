"""What a client knows about a request and its server's router does not, and the check that it is well formed.

    hints = Hints(route="auto", span="tool_call", prior=0.5, tool="lookup_order")
    hints.into({"top_k": 1})    # an `extra_body` with them under `custom_params.whiflash`

| field | meaning |
|---|---|
| `route` | `auto`: the server's router decides. `e3`, `df`: this drafter in every round. `off`: no drafts |
| `span` | what the reply will be: `reasoning`, `tool_call` or `answer` |
| `prior` | added to the router's score, in units of acceptance length, -16 to 16; above 0 speaks for EAGLE-3 |
| `tool` | name of the tool whose output the reply is about, up to 128 characters |
| `trace` | `True`: the reply's figures hold every round with its drafts and tokens |

Every field may be left out. A wrong one raises `HintError`, which names field, value and mend, before anything is sent.
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
    """A hint that no server would take: its field, the value, what is wrong and what to give instead."""

    def __init__(self, field: str, value: object, problem: str, mend: str):
        self.field, self.value = field, value
        super().__init__(f"hint {field}={value!r}: {problem}; {mend}")


@dataclass(frozen=True)
class Hints:
    """The hints of one request; None is not sent."""

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
            mend = f"give units of acceptance length from {-MAX_PRIOR} to {MAX_PRIOR}, e.g. 0.5"
            raise HintError("prior", self.prior, "no number within bounds", mend)
        if self.tool is not None and not (isinstance(self.tool, str) and 1 <= len(self.tool) <= MAX_TOOL_NAME):
            mend = f"give the name in the tool's schema, 1 to {MAX_TOOL_NAME} characters"
            raise HintError("tool", self.tool, "not a tool's name", mend)
        if not isinstance(self.trace, bool | None):
            raise HintError("trace", self.trace, "not a truth value", "give True or False")

    @classmethod
    def parse(cls, given: Hints | Mapping[str, Any] | None) -> Hints:
        """Hints as a user may write them: a record, a mapping of fields, or None for no hints."""
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
        """The fields that say something."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, other: Hints) -> Hints:
        """These, and those of `other` where nothing is given here."""
        return Hints(**(other.given | self.given))

    def into(self, extra_body: Mapping[str, Any] | None) -> dict[str, Any]:
        """`extra_body` with these hints in it; as it was, if there are none."""
        body = dict(extra_body or {})
        if self.given:
            body[PARAMS] = {**(body.get(PARAMS) or {}), NAMESPACE: self.given}
        return body


def hints_in(extra_body: Mapping[str, Any] | None) -> Hints:
    """The hints that a user put into an `extra_body` by hand."""
    return Hints.parse(((extra_body or {}).get(PARAMS) or {}).get(NAMESPACE))
