"""WhiFlash's figures of a request (`GET /whiflash/requests/ID`), and their sums.

Counts are rounds and the tokens they committed, including bonus tokens, so tokens / rounds is the acceptance length
(AL). A reply's first token comes from the prefill and belongs to no round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class _Said(BaseModel):
    # A newer server may return more fields.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Round(_Said):
    """One round of the token view: drafter, drafts and committed tokens."""

    drafter: str  # `none`: no drafts
    drafts: list[str] = []
    accepted: int
    tokens: list[str]  # committed; the bonus token is last
    entropy: float | None = None  # nats
    score: float | None = None  # the router's score, in AL
    prior: float | None = None  # added to the score
    span: str


class SpanCount(_Said):
    rounds: int
    tokens: int


class RequestFigures(_Said):
    """Speculation figures of one request; `trace` only if requested."""

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
    """Rounds and the tokens they committed."""

    rounds: int = 0
    tokens: int = 0

    def plus(self, rounds: int, tokens: int) -> Count:
        """The sum."""
        return Count(self.rounds + rounds, self.tokens + tokens)

    def figures(self) -> dict[str, Any]:
        """As plain data, with AL."""
        al = round(self.tokens / self.rounds, 3) if self.rounds else None
        return {"rounds": self.rounds, "tokens": self.tokens, "acceptance_length": al}


Counts = dict[str, Count]


def by_drafter(rounds: Mapping[str, int], accepted: Mapping[str, int]) -> Counts:
    """Counts by drafter, from rounds and accepted drafts."""
    return {name: Count(n, n + accepted.get(name, 0)) for name, n in rounds.items()}


def breakdown(requests: Iterable[RequestFigures]) -> dict[str, dict[str, Any]]:
    """Rounds, tokens and AL over all requests, by drafter, span, context kind and last tool."""
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
    """Counts as plain data, with AL."""
    return {name: count.figures() for name, count in counts.items()}
