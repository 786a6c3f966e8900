"""What a request may say about itself: `custom_params.whiflash` of its body, on every endpoint.

    {"route": "auto" | "e3" | "df" | "off",         who drafts: the router decides, this drafter, nobody
     "span": "reasoning" | "tool_call" | "answer",  the span that the reply begins in, until a marker says otherwise
     "prior": -16.0 .. 16.0,                        added to the router's score, in units of AL
     "tool": "get_order",                           the tool whose output the reply reacts to
     "trace": true}                                 keep every round with its tokens, for `GET /whiflash/requests/{id}`

Hints change who drafts, never the text. A field that is null counts as left out; whatever else is not as above is
refused with an error that names the field, the value and the mend. Imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from whiflash_sglang.core.errors import HintError, shown
from whiflash_sglang.core.spans import CONTEXT_KINDS, MAX_TOOL_NAME, SPANS, Context

FIELD = "whiflash"  # of custom_params
CONTEXT_FIELD = "whiflash_context"  # what the HTTP side knows of a chat, on its way to the scheduler
AUTO, OFF = "auto", "off"
DRAFTERS = ("df", "e3")
MAX_PRIOR = 16.0  # AL


class Hints(NamedTuple):
    route: str = AUTO
    span: str | None = None
    prior: float = 0.0
    tool: str | None = None
    trace: bool = False

    def given(self) -> dict[str, Any]:
        """The hints that say anything."""
        silent = Hints()._asdict()
        return {field: value for field, value in self._asdict().items() if value != silent[field]}


class Asked(NamedTuple):
    """All that `custom_params` says to us."""

    hints: Hints = Hints()
    context: Context | None = None  # None: to be read from the prompt's tokens


def parse(custom_params: object, drafters: Sequence[str]) -> Asked:
    """Judge a request's `custom_params`. `drafters`: those that are loaded."""
    if custom_params is None:
        return Asked()
    content = _object("custom_params", custom_params)
    return Asked(_hints(content.get(FIELD), drafters), _context(content.get(CONTEXT_FIELD)))


def context_params(context: Context) -> dict[str, str | None]:
    """A context as `custom_params` carry it under `CONTEXT_FIELD`."""
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
        raise HintError(path, shown(value), "not an object", 'give e.g. {"whiflash": {"route": "auto"}}')
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
        mend = f"use {loaded}, or start the server with --whiflash-drafters df-e3"
        raise HintError(path, shown(route), "this server has not loaded that drafter", mend)
    return route


def _prior(path: str, value: object) -> float:
    if value is None:
        return 0.0
    bounds = f"give a number from {-MAX_PRIOR} to {MAX_PRIOR}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HintError(path, shown(value), "not a number", bounds)
    if not -MAX_PRIOR <= value <= MAX_PRIOR:  # nor is NaN within any bounds
        raise HintError(path, shown(value), "out of bounds", bounds)
    return float(value)


def _tool(path: str, value: object) -> str | None:
    if value is None:
        return None
    mend = f"give the tool's name, 1 to {MAX_TOOL_NAME} characters"
    if not isinstance(value, str):
        raise HintError(path, shown(value), "not text", mend)
    if not 1 <= len(value) <= MAX_TOOL_NAME:
        raise HintError(path, shown(value), f"{len(value)} characters long", mend)
    return value


def _trace(path: str, value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise HintError(path, shown(value), "not a truth value", "use true or false")
    return value
