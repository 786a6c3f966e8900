"""Adjust the target's logits (penalties, grammars, logit bias) at every column of a verify window.

Penalties, `min_tokens` and grammars depend on the text so far, which differs by column: the request's output (the
anchor is its last token) plus the drafts before. Each column's logits are adjusted as a decode step after that text
would adjust them. Such rows can therefore be drafted for, and the accepted tokens are the target's adjusted choices.

The order is SGLang's: additive penalties, repetition penalty, grammar, logit bias. SGLang's penalizers count one token
per step and forget the output of a retracted request; here counts are computed from the output itself (`Said`).

Penalties never wait for the device: only new output tokens are copied, by `to_device`. Grammar masks do. They are
computed on the host from drafts, so SGLang's `GrammarTree.resolve` waits for all device work issued before the tree was
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from whiflash_sglang.core.stop_conditions import forbidden_ends
from whiflash_sglang.core.transfer import Indices, to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_params import SamplingParams

kept_on = cache(Indices)
"""Row numbers, penalty strengths and forbidden tokens on a device, cached while the batch is the same."""


class Said:
    """Token counts of requests' outputs, on a device, updated incrementally.

    An output is identified by its list object, which stays the same across rounds; a new list is counted from its
    first token. Keeps the counts of the last call's outputs.
    """

    def __init__(self) -> None:
        self.outputs: Sequence[Sequence[int]] = ()
        self.lens: Sequence[int] = ()  # tokens of each that have been counted
        self.counts = torch.empty(0)  # [outputs, vocab] float32

    def of(self, outputs: Sequence[Sequence[int]], vocab: int, device: torch.device) -> torch.Tensor:
        """The token counts of `outputs`, [outputs, vocab] float32. Callers must not modify the result."""
        rows = {id(output): row for row, output in enumerate(self.outputs) if len(output) >= self.lens[row]}
        known = [(row, rows[id(output)]) for row, output in enumerate(outputs) if id(output) in rows]
        lens = [0] * len(outputs)
        for row, before in known:
            lens[row] = self.lens[before]
        if not len(known) == len(outputs) == len(self.outputs) or any(row != before for row, before in known):
            counts = torch.zeros((len(outputs), vocab), device=device)
            if known:
                to, origin = to_device(list(zip(*known, strict=True)), device)
                counts.index_copy_(0, to, self.counts.index_select(0, origin))
            self.counts = counts
        places = [row * vocab + token for row, output in enumerate(outputs) for token in output[lens[row] :]]
        if places:
            index = to_device(places, device)
            self.counts.view(-1).scatter_add_(0, index, torch.ones(len(index), device=device))
        self.outputs, self.lens = outputs, [len(output) for output in outputs]
        return self.counts


def adjust(
    logits: torch.Tensor,
    window: torch.Tensor,
    batch: ScheduleBatch,
    tree: GrammarTree | None = None,
    said: Said | None = None,
) -> torch.Tensor:
    """Adjust `logits` [rows, width, vocab], which follow `window` [rows, width], for the requests of the batch.

    Returns `logits` itself if nothing is to be adjusted, else a copy: the router reads the originals. `tree`:
    `GrammarTree.from_linear_chain(window)`, made before the target's forward is launched; masks are then computed
    during the forward instead of after it. `said`: counts from earlier rounds.
    """
    sampling = batch.sampling_info
    penalized = Penalized.of(batch.reqs, logits.shape[-1], logits.device, said or Said())
    if penalized is None and not batch.has_grammar and sampling.logit_bias is None:
        return logits
    logits = logits.clone()
    if penalized is not None:
        penalized.apply(logits, window)
    if batch.has_grammar:
        tree = tree or GrammarTree.from_linear_chain(window)
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
    """Allow every token where a grammar allows none, in place; `logits` [..., vocab].

    An all-zero distribution would crash the sampler and the scheduler. The grammar rejects any token chosen here, and
    SGLang then ends the request with an error.
    """
    logits.masked_fill_(logits.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


class Penalized(NamedTuple):
    """The rows with penalties, and their token counts."""

    rows: torch.Tensor  # [k] int64, rows of the batch
    counts: torch.Tensor  # [k, vocab] float32, token counts of the row's output
    frequency: torch.Tensor  # [k, 1] float32
    presence: torch.Tensor  # [k, 1] float32
    repetition: torch.Tensor  # [k, 1] float32
    stops: Sequence[tuple[int, list[int]]]  # [k] number of tokens during which ending is still forbidden, and the end
    # tokens as flat indices into [k, vocab]

    @classmethod
    def of(cls, requests: Sequence[Req], vocab: int, device: torch.device, said: Said) -> Penalized | None:
        """The batch's penalized rows, or None if there are none."""
        rows = tuple(row for row, request in enumerate(requests) if has_penalty(request.sampling_params))
        if not rows:
            return None
        picked = [requests[row] for row in rows]
        params = [request.sampling_params for request in picked]
        strengths = chain.from_iterable((p.frequency_penalty, p.presence_penalty, p.repetition_penalty) for p in params)
        on_device = kept_on(device).of(tuple(strengths), torch.float32).view(-1, 3, 1)
        frequency, presence, repetition = on_device.unbind(1)
        return cls(
            kept_on(device).of(rows),
            said.of([request.output_ids for request in picked], vocab, device),
            frequency,
            presence,
            repetition,
            [
                (own.min_new_tokens - len(request.output_ids), places(number, sorted(forbidden_ends(request)), vocab))
                for number, (request, own) in enumerate(zip(picked, params, strict=True))
            ],
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
        """Additive and scaling penalties, [k, vocab] each, at `said` tokens after the output."""
        seen = counts > 0
        additive = -self.frequency * counts - self.presence * seen
        forbidden = tuple(chain.from_iterable(ends for missing, ends in self.stops if said < missing))
        if forbidden:
            additive.view(-1).index_fill_(0, kept_on(counts.device).of(forbidden), -torch.inf)
        return additive, torch.where(seen, self.repetition, 1.0)


def places(row: int, tokens: Sequence[int], vocab: int) -> list[int]:
    """Flat indices of a row's `tokens` in [rows, vocab], without those outside the vocabulary."""
    return [row * vocab + token for token in tokens if token < vocab]


def penalize_next(batch: ScheduleBatch) -> None:
    """Make SGLang's sampling after a prefill count the output of retracted requests."""
    if not any(request.output_ids for request in batch.reqs):
        return
    sampling = batch.sampling_info
    penalized = Penalized.of(batch.reqs, sampling.vocab_size, sampling.temperatures.device, Said())
    if penalized is None:
        return
    additive, scaling = penalized.penalties(penalized.counts)
    shape = (len(batch.reqs), sampling.vocab_size)
    sampling.acc_additive_penalties = additive.new_zeros(shape).index_copy_(0, penalized.rows, additive)
    sampling.acc_scaling_penalties = scaling.new_ones(shape).index_copy_(0, penalized.rows, scaling)


def has_penalty(params: SamplingParams) -> bool:
    """Whether sampling parameters contain a penalty or `min_new_tokens`."""
    return bool(
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )
