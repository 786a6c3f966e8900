"""What a WhiFlash server says of one request (`GET /whiflash/requests/ID`), and what many of these add up to.

Counts are of rounds and of the tokens that they committed, the bonus token included, so that tokens / rounds is the
acceptance length (AL). The first token of a reply comes from the prefill and belongs to no round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class _Said(BaseModel):
    # A newer server may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Round(_Said):
    """One round of the token view: who proposed what, and what the target made of it."""

    drafter: str  # `none`: nobody drafted
    drafts: list[str] = []
    accepted: int
    tokens: list[str]  # committed, the bonus token last
    entropy: float | None = None  # nats
    score: float | None = None  # the router's, in tokens of AL
    prior: float | None = None  # what was added to it
    span: str


class SpanCount(_Said):
    rounds: int
    tokens: int


class RequestFigures(_Said):
    """Speculation figures of one request; `trace` only where it was asked for."""

    rounds: int
    rounds_by_drafter: dict[str, int]
    accepted_by_drafter: dict[str, int]
    drafted_by_drafter: dict[str, int] = {}
    switches: int = 0
    by_span: dict[str, SpanCount] = {}
    context_kind: str | None = None
    tool: str | None = None
    first: str | None = None
    trace: list[Round] | None = None


class Count(NamedTuple):
    rounds: int = 0
    tokens: int = 0

    def plus(self, rounds: int, tokens: int) -> Count:
        return Count(self.rounds + rounds, self.tokens + tokens)

    def figures(self) -> dict[str, Any]:
        al = round(self.tokens / self.rounds, 3) if self.rounds else None
        return {"rounds": self.rounds, "tokens": self.tokens, "acceptance_length": al}


Counts = dict[str, Count]


def by_drafter(rounds: Mapping[str, int], accepted: Mapping[str, int]) -> Counts:
    return {name: Count(n, n + accepted.get(name, 0)) for name, n in rounds.items()}


def breakdown(requests: Iterable[RequestFigures]) -> dict[str, dict[str, Any]]:
    """Rounds, tokens and AL of all requests by drafter, by span, by context kind and by the tool that spoke last."""
    kinds: dict[str, Counts] = {"drafter": {}, "span": {}, "context_kind": {}, "tool": {}}

    def add(kind: str, name: str, rounds: int, tokens: int) -> None:
        kinds[kind][name] = kinds[kind].get(name, Count()).plus(rounds, tokens)

    for request in requests:
        for name, count in by_drafter(request.rounds_by_drafter, request.accepted_by_drafter).items():
            add("drafter", name, *count)
        for name, span in request.by_span.items():
            add("span", name, span.rounds, span.tokens)
        tokens = request.rounds + sum(request.accepted_by_drafter.values())
        if request.context_kind is not None:
            add("context_kind", request.context_kind, request.rounds, tokens)
        if request.tool is not None:
            add("tool", request.tool, request.rounds, tokens)
    return {f"by_{kind}": plain(counts) for kind, counts in kinds.items()}


def plain(counts: Counts) -> dict[str, Any]:
    return {name: count.figures() for name, count in counts.items()}
