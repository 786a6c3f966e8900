"""Tensor-parallel ranks (`--tp-size`): rank 0 decides, the others follow.

Every rank holds a shard of each layer and runs the same rounds. If ranks disagreed on a drafter or a committed token,
their forwards would differ in shape and deadlock. Collective results (layer outputs, logits) are bitwise equal on all
ranks, but local results may differ: round times, random choices, the last bit of a product. Rank 0's result is
therefore broadcast at three points of a round:

    SharedRouter     the plan; only rank 0's router routes and learns
    SharedDrafter    drafts, and whether they are finite
    SharedTarget     the target's choice at every position, greedy or sampled

    ranks.share(decode_round)                   wraps router, drafters and target; a no-op with one rank
    ranks.first(run)                            returns rank 0's measurements on every rank
    ranks.same(tokens)                          returns rank 0's tensor on every rank

`digests` verifies this: each rank hashes its rounds (requests, drafters, committed tokens), and the hashes are
compared. `corrected` counts tokens on which a rank disagreed with rank 0; it should stay 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from whiflash_sglang.core.round import DecodeRound, Drafter, Router, Target
from whiflash_sglang.core.types import Drafts, Entries, HostRows, Plan, Probe, Proposal, RoundResult, Rows, Verified
from whiflash_sglang.serving.trace import Explains


class Ranks:
    """The ranks of one model, as seen by this rank.

    `device_group` and `host_group` are torch.distributed groups for device and host tensors. Without groups: one rank.
    """

    def __init__(self, device_group: Any = None, host_group: Any = None):
        self.device_group = device_group
        self.host_group = host_group
        self.size = 1 if host_group is None else dist.get_world_size(host_group)
        self.rank = 0 if host_group is None else dist.get_rank(host_group)
        self.corrected: int | torch.Tensor = 0  # tokens on which this rank disagreed with rank 0
        self.digest = 0  # hash of the rounds so far

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, decode_round: DecodeRound) -> None:
        """Wrap a new round's router, drafters and target so that rank 0 decides."""
        if self.size == 1:
            return
        names = tuple(decode_round.drafters)
        decode_round.router = SharedRouter(decode_round.router, self, names)
        decode_round.drafters = {name: SharedDrafter(one, self) for name, one in decode_round.drafters.items()}
        decode_round.target = SharedTarget(decode_round.target, self)

    def same(self, tokens: torch.Tensor) -> torch.Tensor:
        """Broadcast rank 0's `tokens`; the shape must be the same on every rank."""
        if self.size == 1:
            return tokens
        shared = tokens.contiguous().clone()
        dist.broadcast(shared, group=self.device_group, group_src=0)
        self.corrected = self.corrected + (shared != tokens).sum()  # stays on the device until `snapshot`
        return shared

    def first(self, run: Callable[..., tuple[float, ...]]) -> Callable[..., tuple[float, ...]]:
        """Wrap `run` so that it runs on every rank and returns rank 0's numbers."""
        if self.size == 1:
            return run

        def shared(*args: Any) -> tuple[float, ...]:
            numbers = torch.tensor(run(*args), dtype=torch.float64)
            dist.broadcast(numbers, group=self.host_group, group_src=0)
            return tuple(numbers.tolist())

        return shared

    def count(self, rows: HostRows, result: RoundResult) -> None:
        """Add a round to the digest."""
        done = (rows.slots, rows.prefix_lens, list(result.plan), result.committed)
        self.digest = zlib.crc32(repr(done).encode(), self.digest)

    def snapshot(self) -> dict[str, Any]:
        """Digests and corrections of all ranks, as plain data. A collective: all ranks must call it together."""
        if self.size == 1:
            return {"size": 1}
        own = torch.tensor([self.digest, int(self.corrected)], dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.host_group)
        digests, corrected = zip(*(numbers.tolist() for numbers in everyone), strict=True)
        return {"size": self.size, "digests": [f"{digest:08x}" for digest in digests], "corrected": list(corrected)}


class SharedRouter(Router):
    """Broadcasts the plan of rank 0's router. `names`: the drafters, in the same order on every rank."""

    def __init__(self, inner: Router, ranks: Ranks, names: tuple[str, ...]):
        self.inner = inner
        self.ranks = ranks
        self.names = names
        self.shared_probe: Probe | None = None  # for the last plan
        self.steps = 1  # likewise

    def route(self, rows: HostRows) -> Plan:
        """Rank 0's plan, broadcast with its probe and steps."""
        # [rows + 3]: each row's index into names, or -1 without drafts; the probe's drafter and row, or -1; the steps.
        choice = torch.full((len(rows.slots) + 3,), -1, dtype=torch.int64)
        if self.ranks.is_first:
            plan = self.inner.route(rows)
            for row, name in enumerate(plan):
                if name is not None:
                    choice[row] = self.names.index(name)
            if (probe := self.inner.probe(rows, plan)) is not None:
                choice[-3], choice[-2] = self.names.index(probe.drafter), probe.row
            choice[-1] = self.inner.ahead(rows)
        dist.broadcast(choice, group=self.ranks.host_group, group_src=0)
        *chosen, drafter, row, self.steps = choice.tolist()
        self.shared_probe = Probe(self.names[drafter], row) if drafter >= 0 else None
        return [None if index < 0 else self.names[index] for index in chosen]

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        """Rank 0's probe for the last plan."""
        return self.shared_probe

    def ahead(self, rows: HostRows) -> int:
        """Rank 0's steps for the last plan."""
        return self.steps

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        """Signals on rank 0, None on the others."""
        return self.inner.observe(logits, hidden, at) if self.ranks.is_first else None

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.inner.keep(slots, signals)  # only called on rank 0; the others observe nothing

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        """Count the round for the digest; learn on rank 0."""
        self.ranks.count(rows, result)
        if self.ranks.is_first:
            self.inner.learn(rows, result, ms)

    def signals(self, slots: Sequence[int]) -> Mapping[str, Sequence[float]]:
        """The router's inputs on rank 0; empty on the others, whose figures are not reported."""
        return self.inner.signals(slots) if self.ranks.is_first and isinstance(self.inner, Explains) else {}


class SharedDrafter(Drafter):
    """Broadcasts rank 0's drafts."""

    def __init__(self, inner: Drafter, ranks: Ranks):
        self.inner = inner
        self.ranks = ranks
        self.name, self.num_drafts = inner.name, inner.num_drafts

    def ingest(self, entries: Entries) -> None:
        self.inner.ingest(entries)

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        tokens, finite = self.inner.draft(rows, last)
        # One message: each row's tokens and whether they are finite.
        packed = self.ranks.same(torch.cat([tokens.to(torch.int64), finite[:, None].to(torch.int64)], dim=1))
        return Drafts(packed[:, :-1], packed[:, -1] != 0)


class SharedTarget(Target):
    """Broadcasts rank 0's choices."""

    def __init__(self, inner: Target, ranks: Ranks):
        self.inner = inner
        self.ranks = ranks

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = self.inner.verify(rows, proposal)
        return verified._replace(predictions=self.ranks.same(verified.predictions))

    def max_steps(self) -> int:
        return self.inner.max_steps()  # depends on the batch only, which is the same on every rank


def tp_ranks() -> Ranks:
    """The ranks of SGLang's tensor-parallel group."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return Ranks(group.device_group, group.cpu_group) if group.world_size > 1 else Ranks()
