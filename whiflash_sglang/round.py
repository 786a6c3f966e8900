"""One decode round: route -> draft -> verify -> accept -> commit. Knows no drafter, device or model by name.

What each part promises is written in its protocol here; `tests/conformance` holds every router to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from whiflash_sglang.accept import accept
from whiflash_sglang.types import Accepted, Context, Plan, Proposal, RoundResult, Rows, Verified


class Router(Protocol):
    """Chooses a drafter for each row, anew every round."""

    def route(self, rows: Rows) -> Plan:
        """Disjoint row indices by drafter. Rows that are not `draftable` stand in none."""
        ...

    def observe(self, slots: torch.Tensor, logits: torch.Tensor) -> None:
        """`logits` [rows, vocab]: those that each request's newest token, the next anchor, was chosen from."""
        ...


class Drafter(Protocol):
    """Proposes a chain of tokens after each row's anchor, from a KV cache of its own over the target's KV slots."""

    name: str
    num_drafts: int

    def ingest(self, context: Context) -> None:
        """Write this drafter's KV for the given positions, from the target's features (KV-only).

        Entries past a request's last committed position may be given too: they are written like the others and, being
        reserved for this request, are overwritten with true ones before anything reads them.
        """
        ...

    def draft(self, rows: Rows) -> torch.Tensor:
        """Drafts [rows, num_drafts] int64. Every committed position of the rows has been ingested."""
        ...


class Target(Protocol):
    """The model whose text is served."""

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        """One causal forward over each row's window, KV written at positions prefix_len .. prefix_len + width - 1."""
        ...


class DecodeRound:
    """Runs rounds. Stateless but for its parts."""

    def __init__(self, router: Router, drafters: Mapping[str, Drafter], target: Target):
        self.router = router
        self.drafters = drafters
        self.target = target

    def run(self, rows: Rows) -> RoundResult:
        plan = self.router.route(rows)
        proposal = self.propose(rows, plan)
        verified = self.target.verify(rows, proposal)
        accepted = accept(proposal, verified.predictions)
        self.commit(rows, verified, accepted)
        return RoundResult(plan, proposal.num_drafts, accepted, rows.prefix_lens + accepted.num_committed)

    def propose(self, rows: Rows, plan: Plan) -> Proposal:
        """Let each drafter draft for its rows; one verify width for the batch, the widest that is needed."""
        width = 1 + max((self.drafters[name].num_drafts for name in plan), default=0)
        tokens = rows.anchors[:, None].repeat(1, width)  # [rows, width]; column 0 is the anchor
        num_drafts = torch.zeros_like(rows.anchors)
        for name, index in plan.items():
            drafts = self.drafters[name].draft(rows if len(index) == len(rows.slots) else rows.pick(index))
            tokens[index, 1 : 1 + drafts.shape[1]] = drafts
            num_drafts[index] = drafts.shape[1]
        return Proposal(tokens, num_drafts)

    def commit(self, rows: Rows, verified: Verified, accepted: Accepted) -> None:
        """Bring every drafter up to date and tell the router what the next anchor was chosen from.

        The whole window is ingested, not only what was accepted: shapes stay fixed and nothing has to be read back from
        the device. The entries behind the accepted ones lie in slots reserved for this very request and are written
        anew before they can be read or shared.
        """
        num_rows, width = accepted.tokens.shape
        window = torch.arange(width, device=rows.slots.device)
        last = accepted.num_committed - 1  # [rows], window column of the last committed position
        context = Context(
            features=verified.features.reshape(num_rows * width, -1),
            # Position prefix_len + j holds window token j; its successor is the target's choice after column j:
            # an accepted draft or, at column num_committed - 1, the bonus token.
            next_tokens=accepted.tokens.reshape(-1),
            positions=(rows.prefix_lens[:, None] + window).reshape(-1),
            kv_slots=rows.kv_slots[:, 1 : 1 + width].reshape(-1),
            slots=rows.slots,
            last=torch.arange(num_rows, device=rows.slots.device) * width + last,
        )
        for drafter in self.drafters.values():
            drafter.ingest(context)
        self.router.observe(rows.slots, verified.logits[torch.arange(num_rows, device=last.device), last])
