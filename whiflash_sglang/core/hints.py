"""Hints of a request: `custom_params.whiflash` of the body, on every endpoint.

    {"route": "auto" | "e3" | "df" | "off",         router decides | this drafter | no drafter
     "span": "reasoning" | "tool_call" | "answer",  span at the beginning of the reply, until a marker changes it
     "prior": -16.0 .. 16.0,                        added to the router's score, in tokens of AL
     "tool": "get_order",                           tool whose output the reply reacts to
     "trace": true}                                 keep every round with its tokens, for `GET /whiflash/requests/{id}`

Hints change which drafter runs, never the text. A null field is the same as a missing one. Anything else raises
HintError. Imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from whiflash_sglang.core.errors import HintError, shown
from whiflash_sglang.core.spans import CONTEXT_KINDS, MAX_TOOL_NAME, SPANS, Context

FIELD = "whiflash"  # of custom_params
CONTEXT_FIELD = "whiflash_context"  # what the HTTP process knows about the chat, for the scheduler
AUTO, OFF = "auto", "off"
DRAFTERS = ("df", "e3")
MAX_PRIOR = 16.0  # AL


class Hints(NamedTuple):
    """The fields of `custom_params.whiflash`, with their defaults."""

    route: str = AUTO
    span: str | None = None
    prior: float = 0.0
    tool: str | None = None
    trace: bool = False

    def given(self) -> dict[str, Any]:
        """The hints that differ from the defaults."""
        silent = Hints()._asdict()
        return {field: value for field, value in self._asdict().items() if value != silent[field]}


class Asked(NamedTuple):
    """Our fields of `custom_params`."""

    hints: Hints = Hints()
    context: Context | None = None  # None: derive it from the prompt's tokens


def parse(custom_params: object, drafters: Sequence[str]) -> Asked:
    """Parse a request's `custom_params`. `drafters`: the loaded ones. Raises HintError."""
    if custom_params is None:
        return Asked()
    content = _object("custom_params", custom_params)
    return Asked(_hints(content.get(FIELD), drafters), _context(content.get(CONTEXT_FIELD)))


def context_params(context: Context) -> dict[str, str | None]:
    """The value of `CONTEXT_FIELD` in `custom_params` for a context."""
    return context._asdict()


def _hints(content: object, drafters: Sequence[str]) -> Hints:
    path = f"custom_params.{FIELD}"
    given = {} if content is None else _object(path, content)
    _known_fields(path, given, Hints._fields)
    return Hints(
        _route(f"{path}.route", given.get("route"), drafters),
        _choice(f"{path}.span", given.get("span"), SPANS),
        _prior(f"{path}.prior", given.get("prior")),
        _tool(f"{path}.tool", given.get("tool")),
        _trace(f"{path}.trace", given.get("trace")),
    )


def _context(content: object) -> Context | None:
    if content is None:
        return None
    path = f"custom_params.{CONTEXT_FIELD}"
    given = _object(path, content)
    _known_fields(path, given, Context._fields)
    kind = _choice(f"{path}.kind", given.get("kind"), CONTEXT_KINDS)
    return Context(kind or Context().kind, _tool(f"{path}.tool", given.get("tool")))


def _object(path: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise HintError(path, shown(value), "not an object", 'use e.g. {"whiflash": {"route": "auto"}}')
    return value


def _known_fields(path: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    for field in given:
        if field not in known:
            name = field if field.isidentifier() and len(field) <= MAX_TOOL_NAME else shown(field)
            raise HintError(f"{path}.{name}", shown(given[field]), "unknown field", f"use {', '.join(known)}")


def _choice(path: str, value: object, known: Sequence[str]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise HintError(path, shown(value), "unknown value", f"use {', '.join(known)}")
    return value


def _route(path: str, value: object, drafters: Sequence[str]) -> str:
    route = _choice(path, value, (AUTO, *DRAFTERS, OFF)) or AUTO
    if route in DRAFTERS and route not in drafters:
        loaded = ", ".join((AUTO, *drafters, OFF))
        fix = f"use {loaded}, or start the server with --whiflash-drafters df-e3"
        raise HintError(path, shown(route), "this drafter is not loaded", fix)
    return route


def _prior(path: str, value: object) -> float:
    if value is None:
        return 0.0
    bounds = f"use a number from {-MAX_PRIOR} to {MAX_PRIOR}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HintError(path, shown(value), "not a number", bounds)
    if not -MAX_PRIOR <= value <= MAX_PRIOR:  # NaN fails too
        raise HintError(path, shown(value), "out of bounds", bounds)
    return float(value)


def _tool(path: str, value: object) -> str | None:
    if value is None:
        return None
    fix = f"use the tool's name, 1 to {MAX_TOOL_NAME} characters"
    if not isinstance(value, str):
        raise HintError(path, shown(value), "not a string", fix)
    if not 1 <= len(value) <= MAX_TOOL_NAME:
        raise HintError(path, shown(value), f"{len(value)} characters long", fix)
    return value


def _trace(path: str, value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise HintError(path, shown(value), "not a boolean", "use true or false")
    return value
