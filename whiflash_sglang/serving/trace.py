"""The trace of a request with the hint `trace`: every round, with its tokens and the router's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from whiflash_sglang.core.types import RoundResult, RowState

NOBODY = "none"  # the drafter of a row that was not drafted for
MAX_TRACED_ROUNDS = 1024  # per request; later rounds are only counted

Signals = Mapping[str, Sequence[float]]
"""The router's inputs by kind (`entropy` in nats, `score` in AL), one number per row."""


@runtime_checkable
class Explains(Protocol):
    """A router that can report its inputs."""

    def signals(self, slots: Sequence[int]) -> Signals:
        """Kind -> one number per request slot, [rows]."""
        ...


class Trace:
    """Every round of one request, as token ids."""

    def __init__(self) -> None:
        self.first: int | None = None  # token sampled by the prefill
        self.rounds: list[dict[str, Any]] = []
        self.left_out = 0

    def begin(self, token: int, span: str) -> None:
        """Record the token that a prefill sampled. After a retraction it is added as a round without drafts."""
        if self.first is None:
            self.first = token
        else:
            self._append(NOBODY, [], [token], span, {})

    def add(self, result: RoundResult, row: int, tokens: Sequence[int], state: RowState, signals: Signals) -> None:
        """Append a round of `row` that committed `tokens`, up to `MAX_TRACED_ROUNDS`.

        `state`: the row's at the beginning of the round.
        """
        inputs = {kind: signals[kind][row] for kind in ("entropy", "score") if kind in signals}
        prior = state.prior + state.asked_prior
        if prior and "score" in signals:  # entropy thresholds in nats do not use priors
            inputs["prior"] = round(prior, 4)
        drafts = result.window[row, 1 : 1 + result.num_drafts[row]].tolist()
        self._append(result.plan[row] or NOBODY, drafts, tokens, state.span, inputs)

    def _append(
        self, drafter: str, drafts: list[int], tokens: Sequence[int], span: str, inputs: Mapping[str, float]
    ) -> None:
        if len(self.rounds) >= MAX_TRACED_ROUNDS:
            self.left_out += 1
            return
        entry = {"drafter": drafter, "drafts": drafts, "accepted": len(tokens) - 1, "tokens": tokens, "span": span}
        self.rounds.append({**entry, "entropy": None, "score": None, **inputs})

    def figures(self) -> dict[str, Any]:
        """The trace as plain data."""
        return {"first": self.first, "trace": self.rounds, "trace_rounds_left_out": self.left_out}
