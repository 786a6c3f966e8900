"""One decode round: route -> catch up -> draft -> verify -> accept -> commit -> read. Independent of the models.

The plan is made on the host, from what the host knows (`HostRows`) and the results of the last round. The round
launches all its kernels without reading from the device, then reads all results in a single copy.

Routers, drafters and targets implement the protocols below. `tests/conformance` checks every router against its own.
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
    """Picks a drafter for each row in every round. Only `route` is required.

    plan = router.route(rows)                       on the host
    probe = router.probe(rows, plan)                on the host, right after it
    steps = router.ahead(rows)                      on the host, if nothing is drafted
    signals = router.observe(logits, hidden, at)    on the device, after a verify or a prefill
    router.keep(slots, signals)                     the same numbers, once they are on the host
    router.learn(rows, result, ms)                  after the round
    """

    def route(self, rows: HostRows) -> Plan:
        """The drafter of each row [rows]. Must be None for rows that are not `draftable`."""
        ...

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """A draft to make without verifying it, for a row that `plan` does not give to that drafter."""
        return None

    def ahead(self, rows: HostRows) -> int:
        """For a plan without drafts: the number of the target's steps after which to plan again."""
        return 1

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        """Compute the signals [rows, k] of the next round, in any floating dtype; None if the router has none.

        `logits` [..., vocab] and `hidden` [..., hidden] are the target's, over n flattened positions. `hidden` has size
        0 if no router reads final hidden states. `at` [rows] int64: the position that each row's next anchor was chosen
        at. Must not read from the device: the signals reach the host with the round's copy.
        """
        return None

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        """Store what `observe` returned, [rows][k], for the requests in `slots` [rows], until the next call."""
        return None

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        """Learn from the result of a round of `rows` and its wall time in milliseconds."""
        return None


class Drafter(Protocol):
    """Proposes tokens after each row's anchor. Has its own KV cache, indexed by the target's KV slots."""

    name: str
    num_drafts: int

    def ingest(self, entries: Entries) -> None:
        """Write this drafter's K and V for the given positions (KV-only)."""
        ...

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        """Draft `num_drafts` tokens for each row. Every committed position of the rows has been ingested.

        `last` [rows, captures * hidden]: the target's feature of each row's last committed position.
        """
        ...


class Target(Protocol):
    """The model that verifies drafts. Its text is the output."""

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        """One causal forward over all windows. Writes KV at positions prefix_len .. prefix_len + width - 1."""
        ...

    def max_steps(self) -> int:
        """The number of steps of one token that may follow each other in a round without drafts."""
        return 1


Groups = Mapping[str, tuple[int, ...]]
"""Row numbers by drafter, ascending."""
Timed = Callable[[str], AbstractContextManager[None]]


class DecodeRound:
    """Runs rounds. Its state between rounds is the backlog and the drafters' health.

    `timed(step)` is a context manager around each step, to measure it.
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
        """Let every drafter ingest the prompt positions. Their KV slots can be shared afterwards.

        `logits` [requests, vocab]: the ones that `prefill.sampled` was chosen from. Returns `prefill.sampled` as a list
        on the host.
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
        """Run one round of all rows. Reads from the device once, at the end."""
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
        steps = 1 if groups or probe else min(self.router.ahead(rows.host), self.target.max_steps(), self.max_width)
        with self.timed("verify"):
            verified = self.verify(rows, proposal, steps)
        accepted = accept(proposal, verified.predictions)
        with self.timed("commit"):
            # Position prefix_len + j holds window token j. Its successor is the target's choice after column j: an
            # accepted draft or, at column num_committed - 1, the bonus token. The whole window is stored, so
            # shapes stay fixed. Rejected positions are overwritten before they count as committed.
            self.backlog.push(rows.slots, rows.prefix_lens, accepted.tokens, verified.features)
        with self.timed("route"):
            signals = self.observe(verified.logits, verified.hidden, self.newest(verified.logits, accepted))
        with self.timed("read"):
            read = to_host(
                proposal.tokens, accepted.tokens, accepted.num_committed, *finite.values(), *probed, *signals
            )
        window, tokens, num_committed, *others = read  # everything from here on is on the host
        told = [figures.tolist() for figures in others]
        if probe is not None:
            probe = probe._replace(drafts=told[len(finite)])
        self.keep(rows.host.slots, told[len(finite) + len(probed) :])
        committed = [row[:count] for row, count in zip(tokens.tolist(), num_committed.tolist(), strict=True)]
        is_finite = dict(zip(finite, told, strict=False))
        return RoundResult(plan, num_drafts, window, tokens, committed, is_finite, catch_ups, probe, steps)

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """The router's probe; None if the drafter is not allowed for the row or already drafts for it."""
        probe = self.router.probe(rows, plan)
        if probe is None or plan[probe.row] == probe.drafter:
            return None
        return probe if self.health.allows(probe.drafter, rows.slots[probe.row]) else None

    def catch_up(self, rows: HostRows, groups: Groups, probe: Probe | None = None) -> dict[str, CatchUp]:
        """Let each drafter ingest the backlog of its rows in the plan, and of rows whose backlog is overdue."""
        slots, committed = rows.slots, rows.prefix_lens
        done = {}
        for name in self.drafters:
            due = {*self.backlog.overdue(name, slots, committed, self.max_width), *groups.get(name, ())}
            if probe is not None and probe.drafter == name:
                due.add(probe.row)
            if due:
                caught_up = self.ingest(name, [slots[row] for row in due], [committed[row] for row in due])
                if caught_up is not None:
                    done[name] = caught_up
        self.backlog.begin_round(slots, committed)
        return done

    def ingest(self, name: str, slots: Sequence[int], committed: Sequence[int]) -> CatchUp | None:
        """Let a drafter ingest its backlog of the requests in `slots`; None if there is none."""
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
        """Draft for all rows. The verify width of the batch is that of its widest drafter.

        Returns the proposal, and `Drafts.finite` by drafter.
        """
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
        """A drafter's drafts for the row numbers `chosen`."""
        picked = rows if len(chosen) == len(rows.host.slots) else rows.pick(chosen, self.indices.of(chosen))
        return self.drafters[name].draft(picked, self.backlog.last(picked.slots, picked.prefix_lens))

    def verify(self, rows: Rows, proposal: Proposal, steps: int) -> Verified:
        """Verify the proposal. Windows of one token may be followed by more steps, each from the choice of the last.

        A round without drafts costs the host about as much as one with drafts, but yields one token. Several steps
        share that cost. Of `logits` and `hidden`, only the last step's are returned.
        """
        verified = self.target.verify(rows, proposal)
        if steps == 1:
            return verified
        predictions, features = [verified.predictions], [verified.features.clone()]
        for _ in range(1, steps):
            rows = rows.after(predictions[-1][:, 0])
            verified = self.target.verify(rows, proposal._replace(tokens=rows.anchors[:, None]))
            predictions.append(verified.predictions)
            features.append(verified.features.clone())  # the next step overwrites what a CUDA graph returned
        return verified._replace(predictions=torch.cat(predictions, dim=1), features=torch.cat(features, dim=1))

    def newest(self, logits: torch.Tensor, accepted: Accepted) -> torch.Tensor:
        """Index of each row's last committed position in the flattened `logits` [rows, width, vocab]; [rows] int64.

        It is window column num_committed - 1, at which the bonus token was chosen.
        """
        num_rows, width = logits.shape[:2]
        if width == 1:
            return self.indices.of(tuple(range(num_rows)))
        return self.indices.of(tuple(range(-1, num_rows * width - 1, width))) + accepted.num_committed

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> list[torch.Tensor]:
        """The router's signals on the device (`Router.observe`), as a list of zero or one tensors."""
        signals = self.router.observe(logits, hidden, at)
        return [] if signals is None else [signals]

    def keep(self, slots: Sequence[int], told: Sequence[Sequence[Sequence[float]]]) -> None:
        """Pass the results of `observe` to the router, once they are on the host."""
        for signals in told:
            self.router.keep(slots, signals)

    def lags(self, slot: int, committed: int) -> bool:
        """Whether a drafter has not ingested all `committed` positions of a request."""
        return any(self.backlog.length(name, slot, committed) > 0 for name in self.drafters)

    def finish(self, slots: Sequence[int], committed: Sequence[int]) -> dict[str, CatchUp]:
        """Let every drafter ingest its backlog of these requests, before their KV slots are shared."""
        passes = {name: self.ingest(name, slots, committed) for name in self.drafters}
        return {name: done for name, done in passes.items() if done is not None}
