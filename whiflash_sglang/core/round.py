"""One decode round: route -> catch up -> draft -> verify -> accept -> commit -> read. Knows no model by name.

Who drafts is decided on the host, by what the host knows (`HostRows`) and what the last round's read brought. From the
plan to the last kernel nothing of the device is read: the round is given to it as a whole, and then read by one copy.

What each part promises is written in its protocol here; `tests/conformance` holds every router to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from whiflash_sglang.core.accept import accept
from whiflash_sglang.core.backlog import Backlog
from whiflash_sglang.core.health import Health
from whiflash_sglang.core.plan import granted, grouped
from whiflash_sglang.core.transfer import Indices, to_host
from whiflash_sglang.core.types import (
    Accepted,
    CatchUp,
    Drafts,
    Entries,
    HostRows,
    Plan,
    Prefill,
    Probe,
    Proposal,
    RoundResult,
    Rows,
    Verified,
)


class Router(Protocol):
    """Chooses a drafter for each row, anew every round. A policy that looks at nothing need only `route`.

    plan = router.route(rows)                       on the host
    probe = router.probe(rows, plan)                on the host, right after it
    signals = router.observe(logits, hidden, at)    on the device, behind a verify or a prefill
    router.keep(slots, signals)                     the same numbers, when the host has got them
    """

    def route(self, rows: HostRows) -> Plan:
        """The drafter of each row [rows]; None for rows that are not `draftable`."""
        ...

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """A draft that is to be made but not verified, of a row that `plan` does not give to that drafter."""
        return None

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        """The numbers [rows, k] that each request's next choice is made by, of any floating dtype; None: it needs none.

        Its newest token, the next anchor, was chosen at position `at` [rows] int64 of the n that a forward gave:
        `logits` [..., vocab] and `hidden` [..., hidden], final hidden states, of size 0 where no router reads them.
        Nothing may be read here: the numbers reach the host with the round's own copy.
        """
        return None

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        """What `observe` returned, [rows][k], for the requests in `slots` [rows]; kept until it comes anew."""
        return None

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        """What a round of `rows` yielded, and its wall time."""
        return None


class Drafter(Protocol):
    """Proposes a chain of tokens after each row's anchor, from a KV cache of its own over the target's KV slots."""

    name: str
    num_drafts: int

    def ingest(self, entries: Entries) -> None:
        """Write this drafter's KV for the given positions (KV-only)."""
        ...

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        """Chains of `num_drafts` tokens. Every committed position of the rows has been ingested.

        `last` [rows, captures * hidden]: the target's features of each row's last committed position.
        """
        ...


class Target(Protocol):
    """The model whose text is served."""

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        """One causal forward over each row's window, KV written at positions prefix_len .. prefix_len + width - 1."""
        ...


Groups = Mapping[str, tuple[int, ...]]
"""Row numbers by drafter, ascending."""
Timed = Callable[[str], AbstractContextManager[None]]


class DecodeRound:
    """Runs rounds. What it keeps from one to the next is the backlog, and which drafters have failed whom.

    `timed` is given the name of each step, to measure it.
    """

    def __init__(
        self,
        router: Router,
        drafters: Mapping[str, Drafter],
        target: Target,
        backlog: Backlog,
        *,
        timed: Timed = lambda step: nullcontext(),
    ):
        self.router = router
        self.drafters = dict(drafters)
        self.target = target
        self.backlog = backlog
        self.timed = timed
        self.indices = Indices(backlog.device)
        self.health = Health()
        self.max_width = 1 + max(drafter.num_drafts for drafter in drafters.values())

    def prefill(self, prefill: Prefill, logits: torch.Tensor) -> list[int]:
        """Bring every drafter up to date with prompt positions, so that their KV slots may be shared.

        `logits` [requests, vocab]: those that each request's newest token was chosen from. Returns these tokens,
        `prefill.sampled`, as the host has got them.
        """
        self.health.begin(prefill.slots)
        with self.timed("prefill_drafters"):
            entries = Entries(prefill.features, prefill.next_tokens, prefill.positions, prefill.kv_slots)
            for drafter in self.drafters.values():
                drafter.ingest(entries)
            self.backlog.begin(prefill.slots, prefill.lens, prefill.features.index_select(0, prefill.last))
        every = self.indices.of(tuple(range(len(prefill.slots))))
        signals = self.observe(logits, prefill.hidden.index_select(0, prefill.last), every)
        with self.timed("read"):
            sampled, *told = [figures.tolist() for figures in to_host(prefill.sampled, *signals)]
        self.keep(prefill.slots, told)
        return list(sampled)

    def run(self, rows: Rows) -> RoundResult:
        """One round of all rows. Of the device nothing is read before the end, and then all at once."""
        with self.timed("route"):
            plan = granted(rows.host, self.router.route(rows.host))
            plan = self.health.reroute(plan, rows.host.slots, self.drafters)
            probe = self.probe(rows.host, plan)
            groups = grouped(plan)
        with self.timed("catch_up"):
            catch_ups = self.catch_up(rows.host, groups, probe)
        with self.timed("draft"):
            num_drafts = [0 if name is None else self.drafters[name].num_drafts for name in plan]
            proposal, finite = self.propose(rows, groups, num_drafts)
            probed = [] if probe is None else [self.draft(rows, probe.drafter, (probe.row,)).tokens[0]]
        with self.timed("verify"):
            verified = self.target.verify(rows, proposal)
        accepted = accept(proposal, verified.predictions)
        with self.timed("commit"):
            # Position prefix_len + j holds window token j. Its successor is the target's choice after column j: an
            # accepted draft or, at column num_committed - 1, the bonus token. The whole window is kept, not only what
            # was accepted: shapes stay fixed, and the rest is overwritten before it counts as committed.
            self.backlog.push(rows.slots, rows.prefix_lens, accepted.tokens, verified.features)
        with self.timed("route"):
            signals = self.observe(verified.logits, verified.hidden, self.newest(accepted))
        with self.timed("read"):
            read = to_host(
                proposal.tokens, accepted.tokens, accepted.num_committed, *finite.values(), *probed, *signals
            )
        window, tokens, num_committed, *others = read  # from here on all is on the host
        told = [figures.tolist() for figures in others]
        if probe is not None:
            probe = probe._replace(drafts=told[len(finite)])
        self.keep(rows.host.slots, told[len(finite) + len(probed) :])
        committed = [row[:count] for row, count in zip(tokens.tolist(), num_committed.tolist(), strict=True)]
        is_finite = dict(zip(finite, told, strict=False))
        return RoundResult(plan, num_drafts, window, tokens, committed, is_finite, catch_ups, probe)

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """The router's probe, unless that drafter may not draft for the row, or does so anyway."""
        probe = self.router.probe(rows, plan)
        if probe is None or plan[probe.row] == probe.drafter:
            return None
        return probe if self.health.allows(probe.drafter, rows.slots[probe.row]) else None

    def catch_up(self, rows: HostRows, groups: Groups, probe: Probe | None = None) -> dict[str, CatchUp]:
        """Let each drafter ingest what it lacks of its rows, and of those whose backlog is as long as it may be."""
        slots, committed = rows.slots, rows.prefix_lens
        done = {}
        for name in self.drafters:
            due = {
                row
                for row in range(len(slots))
                if self.backlog.overdue(name, slots[row], committed[row], self.max_width)
            }
            due.update(groups.get(name, ()))
            if probe is not None and probe.drafter == name:
                due.add(probe.row)
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

    def propose(
        self, rows: Rows, groups: Groups, num_drafts: Sequence[int]
    ) -> tuple[Proposal, dict[str, torch.Tensor]]:
        """Let each drafter draft for its rows; one verify width for the batch, the widest that is needed."""
        anchors = rows.anchors[:, None]
        if not groups:
            return Proposal(anchors, self.indices.of(tuple(num_drafts))), {}
        tokens = anchors.repeat(1, 1 + max(num_drafts))  # [rows, width]; column 0 is the anchor
        finite = {}
        for name, chosen in groups.items():
            drafts, finite[name] = self.draft(rows, name, chosen)
            tokens[self.indices.of(chosen), 1 : 1 + drafts.shape[1]] = drafts
        return Proposal(tokens, self.indices.of(tuple(num_drafts))), finite

    def draft(self, rows: Rows, name: str, chosen: tuple[int, ...]) -> Drafts:
        """A drafter's drafts for the rows of these numbers."""
        picked = rows if len(chosen) == len(rows.host.slots) else rows.pick(chosen, self.indices.of(chosen))
        return self.drafters[name].draft(picked, self.backlog.last(picked.slots, picked.prefix_lens))

    def newest(self, accepted: Accepted) -> torch.Tensor:
        """The index [rows] of each row's last committed position in the windows, flattened.

        It is window column num_committed - 1; the bonus token was chosen there.
        """
        num_rows, width = accepted.tokens.shape
        if width == 1:
            return self.indices.of(tuple(range(num_rows)))
        return self.indices.of(tuple(range(-1, num_rows * width - 1, width))) + accepted.num_committed

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> list[torch.Tensor]:
        """The router's signals on the device, as `Router.observe`; an empty list where it has none."""
        signals = self.router.observe(logits, hidden, at)
        return [] if signals is None else [signals]

    def keep(self, slots: Sequence[int], told: Sequence[Sequence[Sequence[float]]]) -> None:
        """Give the router what became of `observe` on the host."""
        for signals in told:
            self.router.keep(slots, signals)

    def lags(self, slot: int, committed: int) -> bool:
        """Whether a drafter has not ingested all `committed` positions of a request."""
        return any(self.backlog.length(name, slot, committed) > 0 for name in self.drafters)

    def finish(self, slots: Sequence[int], committed: Sequence[int]) -> dict[str, CatchUp]:
        """Bring every drafter up to date with requests whose first `committed` positions are about to be shared."""
        passes = {name: self.ingest(name, slots, committed) for name in self.drafters}
        return {name: done for name, done in passes.items() if done is not None}
