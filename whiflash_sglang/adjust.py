"""The adjustments that requests ask of the target's logits, at every column of a verify window.

Penalties, `min_tokens` and grammars depend on the text so far, which within a window is another one at each column: the
request's output (the anchor is its last token) and the drafts before. A column's logits are adjusted as a decode step
would adjust them after that text, so that rows with such adjustments are drafted for like any other, and what is
accepted is the target's own adjusted choice.

The order is SGLang's: additive penalties, repetition penalty, grammar, logit bias. Its own penalizers count one token a
step and forget what a retracted request has said; here all is computed from the request's output, each time anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from whiflash_sglang.ends import forbidden_ends


def adjust(logits: torch.Tensor, window: torch.Tensor, batch: Any) -> torch.Tensor:
    """`logits` [rows, width, vocab] that follow `window` [rows, width], as the requests of the batch want them.

    The tensor itself where nobody wants anything, else a copy: the target's own are kept for the router's entropy.
    """
    sampling = batch.sampling_info
    penalized = Penalized.of(batch.reqs, logits.shape[-1], logits.device)
    if penalized is None and not batch.has_grammar and sampling.logit_bias is None:
        return logits
    logits = logits.clone()
    if penalized is not None:
        penalized.apply(logits, window)
    if batch.has_grammar:
        tree = GrammarTree.from_linear_chain(window)
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs, tree=tree, sampling_info=sampling, device=logits.device, barrier=None
        )
        if mask is not None:
            mask.apply(logits.view(-1, logits.shape[-1]))
            open_dead_ends(logits)
    if sampling.logit_bias is not None:
        logits += sampling.logit_bias[:, None]
    return logits


def open_dead_ends(logits: torch.Tensor) -> None:
    """Allow every token where a grammar allows none, in place [..., vocab]: without probabilities a sampler ends
    the scheduler. Whichever is chosen, the grammar refuses it, and SGLang then ends that request with an error."""
    logits.masked_fill_(logits.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


class Penalized(NamedTuple):
    """The rows with penalties, and what they have said so far."""

    rows: torch.Tensor  # [k] int64, rows of the batch
    counts: torch.Tensor  # [k, vocab] float32, how often each token stands in the row's output
    frequency: torch.Tensor  # [k, 1] float32
    presence: torch.Tensor  # [k, 1] float32
    repetition: torch.Tensor  # [k, 1] float32
    stops: Sequence[tuple[int, list[int]]]  # [k] tokens for which the row's end is still forbidden, and what ends it

    @classmethod
    def of(cls, requests: Sequence[Any], vocab: int, device: torch.device) -> Penalized | None:
        """None where no request has a penalty."""
        rows = [row for row, request in enumerate(requests) if has_penalty(request.sampling_params)]
        if not rows:
            return None
        picked = [requests[row] for row in rows]
        outputs = [torch.tensor(request.output_ids, dtype=torch.int64) for request in picked]
        counts = torch.stack([torch.bincount(output, minlength=vocab) for output in outputs])
        params = [request.sampling_params for request in picked]
        strengths = [[p.frequency_penalty, p.presence_penalty, p.repetition_penalty] for p in params]
        frequency, presence, repetition = torch.tensor(strengths, dtype=torch.float32, device=device).unbind(1)
        return cls(
            torch.tensor(rows, device=device),
            counts.to(device, torch.float32),
            frequency[:, None],
            presence[:, None],
            repetition[:, None],
            [(r.sampling_params.min_new_tokens - len(r.output_ids), sorted(forbidden_ends(r))) for r in picked],
        )

    def apply(self, logits: torch.Tensor, window: torch.Tensor) -> None:
        """Adjust `logits` [rows, width, vocab] in place; column j counts drafts 1 .. j of `window` [rows, width]."""
        counts = self.counts.clone()
        one = torch.ones((len(self.rows), 1), device=counts.device)
        for column in range(window.shape[1]):
            if column > 0:
                counts.scatter_add_(1, window[self.rows, column : column + 1], one)
            additive, scaling = self.penalties(counts, column)
            adjusted = logits[self.rows, column] + additive
            logits[self.rows, column] = torch.where(adjusted < 0, adjusted * scaling, adjusted / scaling).to(
                logits.dtype
            )

    def penalties(self, counts: torch.Tensor, said: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What to add to the logits, then what to scale them with [k, vocab], `said` tokens behind the output."""
        seen = counts > 0
        additive = -self.frequency * counts - self.presence * seen
        for row, (missing, ends) in enumerate(self.stops):
            if said < missing:
                additive[row, ends] = -torch.inf
        return additive, torch.where(seen, self.repetition, 1.0)


def penalize_next(batch: Any) -> None:
    """Let SGLang's own sampling after a prefill count what requests have said before they were retracted."""
    if not any(request.output_ids for request in batch.reqs):
        return
    sampling = batch.sampling_info
    penalized = Penalized.of(batch.reqs, sampling.vocab_size, sampling.temperatures.device)
    if penalized is None:
        return
    additive, scaling = penalized.penalties(penalized.counts)
    shape = (len(batch.reqs), sampling.vocab_size)
    sampling.acc_additive_penalties = additive.new_zeros(shape).index_copy_(0, penalized.rows, additive)
    sampling.acc_scaling_penalties = scaling.new_ones(shape).index_copy_(0, penalized.rows, scaling)


def has_penalty(params: Any) -> bool:
    return bool(
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )
