"""One decode round: route -> catch up -> draft -> verify -> accept -> commit. Knows no drafter or model by name.

What each part promises is written in its protocol here; `tests/conformance` holds every router to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from whiflash_sglang.accept import accept
from whiflash_sglang.asked import grant
from whiflash_sglang.backlog import Backlog
from whiflash_sglang.types import (
    Accepted,
    CatchUp,
    Drafts,
    Entries,
    Plan,
    Prefill,
    Proposal,
    RoundResult,
    Rows,
    Verified,
)


class Router(Protocol):
    """Chooses a drafter for each row, anew every round. A policy that looks at nothing need only `route`."""

    def route(self, rows: Rows) -> Plan:
        """Disjoint row indices by drafter. Rows that are not `draftable` stand in none."""
        ...

    def observe(self, slots: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> None:
        """What each request's newest token, the next anchor, was chosen from: `at` [rows] of what a forward gave.

        `logits` [..., vocab] and `hidden` [..., hidden], final hidden states, of n positions that `at` counts through.
        Where no router reads hidden states they are of size 0.
        """
        return None

    def learn(self, rows: Rows, result: RoundResult, ms: float) -> None:
        """What a round of `rows` yielded, and its wall time."""
        return None


class Drafter(Protocol):
    """Proposes a chain of tokens after each row's anchor, from a KV cache of its own over the target's KV slots."""

    name: str
    num_drafts: int

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [n, captures * hidden] as this drafter keeps them, [n, hidden]."""
        ...

    def ingest(self, entries: Entries) -> None:
        """Write this drafter's KV for the given positions (KV-only)."""
        ...

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        """Chains of `num_drafts` tokens. Every committed position of the rows has been ingested.

        `last` [rows, hidden]: the fused features of each row's last committed position.
        """
        ...


class Target(Protocol):
    """The model whose text is served."""

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        """One causal forward over each row's window, KV written at positions prefix_len .. prefix_len + width - 1."""
        ...


Timed = Callable[[str], AbstractContextManager[None]]


class DecodeRound:
    """Runs rounds. What it keeps from one to the next is the backlog, and which drafters have been switched off.

    With `lazy`, only drafters that a round needs are brought up to date; else all of them are, in every round.
    `timed` is given the name of each step, to measure it.
    """

    def __init__(
        self,
        router: Router,
        drafters: Mapping[str, Drafter],
        target: Target,
        backlog: Backlog,
        *,
        lazy: bool = True,
        timed: Timed = lambda step: nullcontext(),
    ):
        self.router = router
        self.drafters = dict(drafters)
        self.target = target
        self.backlog = backlog
        self.lazy = lazy
        self.timed = timed
        self.starts: dict[tuple[int, int], torch.Tensor] = {}
        self.max_width = 1 + max(drafter.num_drafts for drafter in drafters.values())

    def prefill(self, prefill: Prefill, logits: torch.Tensor) -> None:
        """Bring every drafter up to date with prompt positions, so that their KV slots may be shared.

        `logits` [requests, vocab]: those that each request's newest token was chosen from.
        """
        with self.timed("prefill_drafters"):
            for name, drafter in self.drafters.items():
                features = drafter.fuse(prefill.features)
                drafter.ingest(Entries(features, prefill.next_tokens, prefill.positions, prefill.kv_slots))
                self.backlog.begin(name, prefill.slots, prefill.lens, features[prefill.last])
        at = torch.arange(len(prefill.slots), device=logits.device)
        self.router.observe(prefill.slots, logits, prefill.hidden.index_select(0, prefill.last), at)

    def run(self, rows: Rows) -> RoundResult:
        with self.timed("route"):
            plan = self.reroute(grant(rows, self.router.route(rows)))
        with self.timed("catch_up"):
            catch_ups = self.catch_up(rows, plan)
        with self.timed("draft"):
            proposal, finite = self.propose(rows, plan)
        with self.timed("verify"):
            verified = self.target.verify(rows, proposal)
        accepted = accept(proposal, verified.predictions)
        self.commit(rows, plan, verified, accepted)
        new_prefix_lens = rows.prefix_lens + accepted.num_committed
        return RoundResult(plan, proposal.num_drafts, accepted, new_prefix_lens, catch_ups, finite, proposal.tokens)

    def reroute(self, plan: Plan) -> Plan:
        """Rows of a drafter that has been switched off go to one that is left, or are not drafted for."""
        if all(name in self.drafters for name in plan):
            return plan
        left = next(iter(self.drafters), None)
        return {} if left is None else {left: torch.cat(list(plan.values())).sort().values}

    def catch_up(self, rows: Rows, plan: Plan) -> dict[str, CatchUp]:
        """Let each drafter ingest what it lacks of its rows, and of those whose backlog is as long as it may be."""
        slots, committed = rows.slots.tolist(), rows.prefix_lens.tolist()
        done = {}
        for name in self.drafters:
            due = {
                row
                for row in range(len(slots))
                if self.backlog.overdue(name, slots[row], committed[row], self.max_width)
            }
            if name in plan:
                due.update(plan[name].tolist())
            caught_up = self.ingest(name, [slots[row] for row in due], [committed[row] for row in due])
            if caught_up is not None:
                done[name] = caught_up
        self.backlog.begin_round(slots, committed)
        return done

    def ingest(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> CatchUp | None:
        """Bring a drafter up to date with the requests in `slots`, of `committed` positions each."""
        began = time.perf_counter()
        lens = [self.backlog.length(name, slot, end) for slot, end in zip(slots, committed, strict=True)]
        missed = [self.backlog.missed(name, slot) for slot in slots]
        entries = self.backlog.take(name, slots, committed)
        if entries is None:
            return None
        self.drafters[name].ingest(entries)
        return CatchUp(slots, lens, missed, time.perf_counter() - began)

    def propose(self, rows: Rows, plan: Plan) -> tuple[Proposal, dict[str, torch.Tensor]]:
        """Let each drafter draft for its rows; one verify width for the batch, the widest that is needed."""
        width = 1 + max((self.drafters[name].num_drafts for name in plan), default=0)
        tokens = rows.anchors[:, None].repeat(1, width)  # [rows, width]; column 0 is the anchor
        num_drafts = torch.zeros_like(rows.anchors)
        finite = {}
        for name, index in plan.items():
            picked = rows if len(index) == len(rows.slots) else rows.pick(index)
            last = self.backlog.last(name, picked.slots, picked.prefix_lens)
            drafts, finite[name] = self.drafters[name].draft(picked, last)
            tokens[index, 1 : 1 + drafts.shape[1]] = drafts
            num_drafts[index] = drafts.shape[1]
        return Proposal(tokens, num_drafts), finite

    def commit(self, rows: Rows, plan: Plan, verified: Verified, accepted: Accepted) -> None:
        """Keep every drafter's features of the window, and tell the router what the next anchor was chosen from.

        The whole window is kept, not only what was accepted: shapes stay fixed, and what lies behind the accepted
        tokens is overwritten before it counts as committed.
        """
        num_rows, width = accepted.tokens.shape
        with self.timed("commit"):
            window = verified.features.reshape(num_rows * width, -1)
            # Position prefix_len + j holds window token j; its successor is the target's choice after column j: an
            # accepted draft or, at column num_committed - 1, the bonus token.
            places = self.backlog.push(rows.slots, rows.prefix_lens, accepted.tokens)
        for name, drafter in self.drafters.items():
            with self.timed("commit" if name in plan else "commit_idle"):
                features = drafter.fuse(window)
                self.backlog.store(name, places, features)
                if not self.lazy:
                    self.ingest_window(drafter, rows, accepted, features)
        with self.timed("route"):
            # Window column num_committed - 1 is the last committed position; the bonus token was chosen there.
            last = self.window_starts(num_rows, width, rows.slots.device) + accepted.num_committed
            self.router.observe(rows.slots, verified.logits, verified.hidden, last)

    def window_starts(self, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
        """One before each row's window [rows], in windows that stand one after the other."""
        starts = self.starts.get((num_rows, width))
        if starts is None:
            starts = torch.arange(-1, num_rows * width - 1, width, device=device)
            self.starts[num_rows, width] = starts
        return starts

    def ingest_window(self, drafter: Drafter, rows: Rows, accepted: Accepted, features: torch.Tensor) -> None:
        """Bring a drafter up to date at once, whether it will be chosen or not.

        Entries behind the accepted ones are written too: their slots are reserved for this request, and they are
        written anew before they can be read or shared.
        """
        width = accepted.tokens.shape[1]
        window = torch.arange(width, device=rows.slots.device)
        positions = rows.prefix_lens[:, None] + window
        kv_slots = rows.kv_slots[:, 1 : 1 + width]
        drafter.ingest(Entries(features, accepted.tokens.reshape(-1), positions.reshape(-1), kv_slots.reshape(-1)))
        self.backlog.settle(drafter.name, rows.slots.tolist(), (rows.prefix_lens + accepted.num_committed).tolist())

    def finish(self, slot: int, committed: int) -> dict[str, CatchUp]:
        """Bring every drafter up to date with a request whose first `committed` positions are about to be shared."""
        passes = {name: self.ingest(name, [slot], [committed]) for name in self.drafters}
        return {name: done for name, done in passes.items() if done is not None}

    def switch_off(self, name: str) -> None:
        """Never ask this drafter again."""
        del self.drafters[name]
