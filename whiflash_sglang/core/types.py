"""The words of a decode round, and the records that one step hands to the next.

target          the big model; its greedy or sampled text is what the user gets, exactly
drafter         a small model that proposes tokens: `e3` (EAGLE-3, a chain of K steps) or `df` (DFlash, one block)
round           route -> catch up -> draft -> verify -> accept -> commit -> read
bonus token     the one token a round always yields: the target's own choice after the accepted drafts. It has no KV yet
anchor          the bonus token of the previous round; the first token of this round's verify window
committed       positions whose tokens are final and have target KV: 0 .. prefix_len - 1 (without the anchor)
verify width    tokens a row in the verify forward: the anchor and up to width - 1 drafts; one width a batch
acceptance length (AL)  tokens committed by a round, bonus included; accepted drafts = AL - 1
feature         the target's captured hidden states at a position, concatenated over the captured layers; a drafter's
                own `fc` reduces them to its width
final hidden state  what the target's head reads at a position: the last layer's output behind the last norm
request slot    row of SGLang's request table; per-request state of ours is keyed by it
KV slot         index into the KV pool. Every drafter has a pool of its own and uses the target's KV slots
ingest          write a drafter's K and V for committed positions, from features (KV-only: no query, attention or MLP)
host, device    where decisions and records are, and where models compute; the round reads from the device once
span, context kind  what a request's text is in, and what it reacts to: see `spans.py`
backlog         committed positions that a drafter has not ingested; catch-up ingests them in one batched pass

Worked example, width 4, committed tokens `the cat` (prefix_len 2), anchor `sat`:

    position          2      3     4     5
    verify window     sat    on    a     mat      drafts: on, a, mat
    prediction        on     the   mat   .        the target's choice after each
    accepted          on                          one draft; `the` != `a` ends it
    committed tokens  on     the                  AL 2; `the` is the bonus token and the next anchor
    new prefix_len 4: positions 2 and 3 (`sat on`) now have KV
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

Plan = Sequence[str | None]
"""[rows], the drafter of each row; None: the row is not drafted for in this round."""


class Standing(NamedTuple):
    """Where a request stands as a round begins, and what it asked for (see `spans.py`, `hints.py`)."""

    span: str  # reasoning, tool_call, answer
    context_kind: str  # user, tool_output
    tool: str | None  # whose output the reply reacts to
    asked_prior: float  # what the request wants to be added to the router's score, AL
    route: str  # auto, or the drafter that the request wants, or off
    prior: float = 0.0  # what is known to be missing in the router's score there, AL (`priors.py`)


class HostRows(NamedTuple):
    """The rows of a decode batch as the host knows them, without asking the device: who drafts is decided by these."""

    slots: Sequence[int]  # [rows], request slots
    prefix_lens: Sequence[int]  # [rows], committed positions
    draftable: Sequence[bool] | None = None  # [rows], or None where all rows may be drafted for
    standings: Sequence[Standing] | None = None  # [rows], or None where nobody follows the texts

    def may_draft(self) -> list[int]:
        """Numbers of the rows that may be drafted for, ascending."""
        if self.draftable is None:
            return list(range(len(self.slots)))
        return [row for row, may in enumerate(self.draftable) if may]


class Rows(NamedTuple):
    """The requests of one decode batch, one row each: on the device, for forwards, and what the host knows of them."""

    slots: torch.Tensor  # [rows] int64, request slots
    anchors: torch.Tensor  # [rows] int64, bonus tokens of the last round
    prefix_lens: torch.Tensor  # [rows] int64, committed positions
    kv_slots: (
        torch.Tensor
    )  # [rows, 1 + max_width] int64, KV slots of positions prefix_len - 1 .. prefix_len + max_width - 1
    host: HostRows

    def pick(self, rows: Sequence[int], index: torch.Tensor) -> Rows:
        """The rows of these numbers [n], in that order; `index` is the same on the device, int64 [n]."""
        slots, prefix_lens, draftable, standings = self.host
        host = HostRows(
            [slots[row] for row in rows],
            [prefix_lens[row] for row in rows],
            None if draftable is None else [draftable[row] for row in rows],
            None if standings is None else [standings[row] for row in rows],
        )
        return Rows(self.slots[index], self.anchors[index], self.prefix_lens[index], self.kv_slots[index], host)


class Proposal(NamedTuple):
    """What is to be verified. Columns beyond 1 + num_drafts are padding, which is never accepted."""

    tokens: torch.Tensor  # [rows, width] int64; column 0 is the anchor
    num_drafts: torch.Tensor  # [rows] int64, 0 .. width - 1


class Verified(NamedTuple):
    """What the target says to a proposal."""

    predictions: torch.Tensor  # [rows, width] int64; column j is the target's token after window column j
    logits: torch.Tensor  # [rows, width, vocab]
    features: torch.Tensor  # [rows, width, captures * hidden]
    hidden: torch.Tensor  # [rows, width, hidden] final hidden states; [rows, width, 0] where no router reads them


class Accepted(NamedTuple):
    """What a round commits."""

    tokens: torch.Tensor  # [rows, width] int64; columns 0 .. num_committed - 1 are the new tokens, the rest is padding
    num_committed: torch.Tensor  # [rows] int64, acceptance length, 1 .. width; the last of them is the bonus token


class Prefill(NamedTuple):
    """Prompt positions that the target has just computed, flat over requests."""

    features: torch.Tensor  # [n, captures * hidden]
    hidden: torch.Tensor  # [n, hidden] final hidden states; [n, 0] where no router reads them
    next_tokens: torch.Tensor  # [n] int64, the token at position + 1
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64
    last: torch.Tensor  # [requests] int64, index into n of each request's last position
    sampled: torch.Tensor  # [requests] int64, what the target chose behind it
    slots: Sequence[int]  # [requests], request slots
    lens: Sequence[int]  # [requests], positions that each request now has


class Entries(NamedTuple):
    """Positions whose K and V a drafter is to write, flat over requests."""

    features: torch.Tensor  # [n, captures * hidden], the target's
    next_tokens: torch.Tensor  # [n] int64, the token at position + 1
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64


class Drafts(NamedTuple):
    """What a drafter proposes."""

    tokens: torch.Tensor  # [rows, num_drafts] int64
    finite: torch.Tensor  # [rows] bool; False where what a row's drafts were made of holds a NaN or an infinity


class CatchUp(NamedTuple):
    """A pass that brought a drafter up to date."""

    slots: Sequence[int]  # request slots
    lens: Sequence[int]  # positions that were ingested for each
    missed: Sequence[int]  # those of them that an earlier round than the last one had committed
    seconds: float  # wall time


class Probe(NamedTuple):
    """A drafter drafts for one row and nothing of it is verified: what the target says next shows what it was worth."""

    drafter: str
    row: int
    drafts: Sequence[int] = ()  # when the host has got them


class RoundResult(NamedTuple):
    """What a round came to, all of it on the host."""

    plan: Plan
    num_drafts: Sequence[int]  # [rows]
    window: torch.Tensor  # [rows, width] int64, what was verified: anchor, drafts, padding
    tokens: torch.Tensor  # [rows, width] int64, as `Accepted.tokens`
    committed: Sequence[Sequence[int]]  # [rows], the new tokens of each; their number is its acceptance length
    finite: Mapping[str, Sequence[bool]]  # by drafter that drafted, of its rows in the plan: `Drafts.finite`
    catch_ups: Mapping[str, CatchUp]  # by drafter
    probe: Probe | None = None
