"""The terms of a decode round, and the records passed between its steps.

target          the large model; the output is exactly its greedy or sampled text
drafter         a small model that proposes tokens: `e3` (EAGLE-3, a chain of K steps) or `df` (DFlash, one block)
round           route -> catch up -> draft -> verify -> accept -> commit -> read
bonus token     the token every round yields: the target's own choice after the accepted drafts. It has no KV yet
anchor          the bonus token of the previous round; the first token of this round's verify window
committed       positions whose tokens are final and have target KV: 0 .. prefix_len - 1 (without the anchor)
verify width    tokens per row in the verify forward: the anchor and up to width - 1 drafts; one width per batch
acceptance length (AL)  tokens committed per row and round, bonus included; accepted drafts = AL - 1
feature         the target's captured hidden states at a position, concatenated over the captured layers; a drafter's
                own `fc` reduces them to its width
final hidden state  the input of the target's LM head at a position: the last layer's output after the final norm
request slot    row of SGLang's request table; our per-request state is keyed by it
KV slot         index into the KV pool. Every drafter has its own pool and uses the target's KV slots
ingest          write a drafter's K and V for committed positions, from features (KV-only: no query, attention or MLP)
host, device    the host routes and keeps records, the device runs models; a round reads from the device once
span, context kind  the kind of text a request is in, and what it reacts to: see `spans.py`
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
"""[rows], the drafter of each row; None: no drafts for the row in this round."""


class RowState(NamedTuple):
    """A request's span and context at the beginning of a round, and its hints (see `spans.py`, `hints.py`)."""

    span: str  # reasoning, tool_call, answer
    context_kind: str  # user, tool_output
    tool: str | None  # the tool whose output the reply reacts to
    asked_prior: float  # requested addition to the router's score, in tokens of AL
    route: str  # auto, the requested drafter, or off
    prior: float = 0.0  # learned correction of the router's score there, in tokens of AL (`priors.py`)


class HostRows(NamedTuple):
    """What the host knows of the rows of a decode batch. Routers decide by it."""

    slots: Sequence[int]  # [rows], request slots
    prefix_lens: Sequence[int]  # [rows], committed positions
    draftable: Sequence[bool] | None = None  # [rows], or None if all rows are draftable
    states: Sequence[RowState] | None = None  # [rows], or None if spans are not tracked

    def may_draft(self) -> list[int]:
        """Row numbers of the draftable rows, ascending."""
        if self.draftable is None:
            return list(range(len(self.slots)))
        return [row for row, may in enumerate(self.draftable) if may]


class Rows(NamedTuple):
    """One decode batch, one row per request: tensors for the forwards, and the host's view."""

    slots: torch.Tensor  # [rows] int64, request slots
    anchors: torch.Tensor  # [rows] int64, bonus tokens of the last round
    prefix_lens: torch.Tensor  # [rows] int64, committed positions
    kv_slots: (
        torch.Tensor
    )  # [rows, 1 + max_width] int64, KV slots of positions prefix_len - 1 .. prefix_len + max_width - 1
    host: HostRows

    def pick(self, rows: Sequence[int], index: torch.Tensor) -> Rows:
        """Select the row numbers `rows` [n], in that order. `index` [n] int64: the same on the device."""
        slots, prefix_lens, draftable, states = self.host
        host = HostRows(
            [slots[row] for row in rows],
            [prefix_lens[row] for row in rows],
            None if draftable is None else [draftable[row] for row in rows],
            None if states is None else [states[row] for row in rows],
        )
        return Rows(self.slots[index], self.anchors[index], self.prefix_lens[index], self.kv_slots[index], host)

    def after(self, tokens: torch.Tensor) -> Rows:
        """The rows after their anchors were committed. `tokens` [rows] int64: the new anchors."""
        host = self.host._replace(prefix_lens=[length + 1 for length in self.host.prefix_lens])
        return Rows(self.slots, tokens, self.prefix_lens + 1, self.kv_slots[:, 1:], host)


class Proposal(NamedTuple):
    """The verify windows. Columns beyond 1 + num_drafts are padding, which is never accepted."""

    tokens: torch.Tensor  # [rows, width] int64; column 0 is the anchor
    num_drafts: torch.Tensor  # [rows] int64, 0 .. width - 1


class Verified(NamedTuple):
    """The target's outputs for a proposal."""

    predictions: torch.Tensor  # [rows, width] int64; column j is the target's token after window column j
    logits: torch.Tensor  # [rows, width, vocab]
    features: torch.Tensor  # [rows, width, captures * hidden]
    hidden: torch.Tensor  # [rows, width, hidden] final hidden states; [rows, width, 0] if no router reads them


class Accepted(NamedTuple):
    """The tokens that a round commits."""

    tokens: torch.Tensor  # [rows, width] int64; columns 0 .. num_committed - 1 are the new tokens, the rest is padding
    num_committed: torch.Tensor  # [rows] int64, acceptance length, 1 .. width; the last one is the bonus token


class Prefill(NamedTuple):
    """Prompt positions that the target has just computed, flat over requests."""

    features: torch.Tensor  # [n, captures * hidden]
    hidden: torch.Tensor  # [n, hidden] final hidden states; [n, 0] if no router reads them
    next_tokens: torch.Tensor  # [n] int64, the token at position + 1
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64
    last: torch.Tensor  # [requests] int64, index into n of each request's last position
    sampled: torch.Tensor  # [requests] int64, the target's choice after it
    slots: Sequence[int]  # [requests], request slots
    lens: Sequence[int]  # [requests], positions that each request now has


class Entries(NamedTuple):
    """Positions that a drafter ingests, flat over requests."""

    features: torch.Tensor  # [n, captures * hidden], the target's
    next_tokens: torch.Tensor  # [n] int64, the token at position + 1
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64


class Drafts(NamedTuple):
    """The drafts of one drafter."""

    tokens: torch.Tensor  # [rows, num_drafts] int64
    finite: torch.Tensor  # [rows] bool; False if a row's hidden states or logits hold NaN or infinity


class CatchUp(NamedTuple):
    """One catch-up pass of a drafter."""

    slots: Sequence[int]  # request slots
    lens: Sequence[int]  # positions ingested for each
    missed: Sequence[int]  # the part committed before the last round
    seconds: float  # wall time


class Probe(NamedTuple):
    """A draft for one row that is not verified. The target's next tokens show how much would have been accepted."""

    drafter: str
    row: int
    drafts: Sequence[int] = ()  # once they are on the host


class RoundResult(NamedTuple):
    """The result of a round, on the host."""

    plan: Plan
    num_drafts: Sequence[int]  # [rows]
    window: torch.Tensor  # [rows, width] int64, the verify window: anchor, drafts, padding
    tokens: torch.Tensor  # [rows, width] int64, as `Accepted.tokens`
    committed: Sequence[Sequence[int]]  # [rows], the new tokens of each row; their number is the acceptance length
    finite: Mapping[str, Sequence[bool]]  # `Drafts.finite` of its rows, by drafter that drafted
    catch_ups: Mapping[str, CatchUp]  # by drafter
    probe: Probe | None = None
    steps: int = 1  # of the target; more only without drafts

    def rounds(self, row: int) -> Sequence[Sequence[int]]:
        """The row's tokens by round, for figures: several steps without drafts count as a round each."""
        committed = self.committed[row]
        return [committed] if self.steps == 1 else [[token] for token in committed]
