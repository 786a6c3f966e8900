"""Several processes that serve one model (`--tp-size`): what the first one decides, all of them do.

Every rank holds a part of each layer and runs the same rounds. A rank that drafted with another drafter, or committed
another token, would run a forward of another shape, and the ranks would wait for each other for ever. What ranks
compute together (a layer's output, logits) is the same on all of them to the last bit. What each finds out by itself
need not be: the time that a round took, a coin, the last bit of a product. So at three places of a round the first
rank's word counts, and what the others found is dropped:

    SharedRouter     the plan. Only the first rank's router looks at anything and learns; the others are not asked
    SharedDrafter    drafts, and whether a drafter's arithmetic has failed
    SharedTarget     the target's choice at every position, greedy or sampled

    ranks.share(decode_round)                   puts them into a round; nothing with one process
    ranks.first(run)                            measurements: everyone gets the first rank's
    ranks.same(tokens)                          a tensor: everyone gets the first rank's

`digests` shows whether it holds: each rank sums up the rounds that it has done (requests, drafters, committed tokens),
and the sums are compared. `corrected` counts tokens that a rank would have chosen otherwise; it should stay 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from whiflash_sglang.core.plans import drafter_by_row, plan_of
from whiflash_sglang.core.round import DecodeRound, Drafter, Router, Target
from whiflash_sglang.core.types import Drafts, Entries, HostRows, Plan, Probe, Proposal, RoundResult, Rows, Verified
from whiflash_sglang.serving.ledger import Explains


class Ranks:
    """The ranks of one model, seen from one of them.

    `device_group` carries tensors of the model's device, `host_group` those of the host. Without groups: one process.
    """

    def __init__(self, device_group: Any = None, host_group: Any = None):
        self.device_group = device_group
        self.host_group = host_group
        self.size = 1 if host_group is None else dist.get_world_size(host_group)
        self.rank = 0 if host_group is None else dist.get_rank(host_group)
        self.corrected: int | torch.Tensor = 0  # tokens of this rank that were not the first one's
        self.digest = 0  # of the rounds so far

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, decode_round: DecodeRound) -> None:
        """Let the first rank's word count in a round that has just been put together."""
        if self.size == 1:
            return
        names = tuple(decode_round.drafters)
        decode_round.router = SharedRouter(decode_round.router, self, names)
        decode_round.drafters = {name: SharedDrafter(one, self) for name, one in decode_round.drafters.items()}
        decode_round.target = SharedTarget(decode_round.target, self)

    def same(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first rank's `tokens`, of the same shape on every rank."""
        if self.size == 1:
            return tokens
        shared = tokens.contiguous().clone()
        dist.broadcast(shared, group=self.device_group, group_src=0)
        self.corrected = self.corrected + (shared != tokens).sum()  # read when somebody asks: no wait for a device
        return shared

    def first(self, run: Callable[..., tuple[float, ...]]) -> Callable[..., tuple[float, ...]]:
        """`run` on every rank, with the first rank's numbers as the result on all of them."""
        if self.size == 1:
            return run

        def shared(*args: Any) -> tuple[float, ...]:
            numbers = torch.tensor(run(*args), dtype=torch.float64)
            dist.broadcast(numbers, group=self.host_group, group_src=0)
            return tuple(numbers.tolist())

        return shared

    def count(self, rows: HostRows, result: RoundResult) -> None:
        """Add a round to the digest."""
        done = (rows.slots, rows.prefix_lens, sorted(drafter_by_row(result.plan).items()), result.committed)
        self.digest = zlib.crc32(repr(done).encode(), self.digest)

    def snapshot(self) -> dict[str, Any]:
        """Plain data; every rank must ask at the same time. Numbers of each rank, the first one's first."""
        if self.size == 1:
            return {"size": 1}
        own = torch.tensor([self.digest, int(self.corrected)], dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.host_group)
        digests, corrected = zip(*(numbers.tolist() for numbers in everyone), strict=True)
        return {"size": self.size, "digests": [f"{digest:08x}" for digest in digests], "corrected": list(corrected)}


class SharedRouter(Router):
    """The plan of the first rank's `inner`; `names`: the drafters, in the same order on every rank."""

    def __init__(self, inner: Router, ranks: Ranks, names: tuple[str, ...]):
        self.inner = inner
        self.ranks = ranks
        self.names = names
        self.shared_probe: Probe | None = None  # of the plan that was routed last

    def route(self, rows: HostRows) -> Plan:
        # [rows + 2]: each row's index into names, or -1 if it is not drafted for; drafter and row of the probe, or -1.
        choice = torch.full((len(rows.slots) + 2,), -1, dtype=torch.int64)
        if self.ranks.is_first:
            plan = self.inner.route(rows)
            for row, name in drafter_by_row(plan).items():
                choice[row] = self.names.index(name)
            if (probe := self.inner.probe(rows, plan)) is not None:
                choice[-2], choice[-1] = self.names.index(probe.drafter), probe.row
        dist.broadcast(choice, group=self.ranks.host_group, group_src=0)
        *chosen, drafter, row = choice.tolist()
        self.shared_probe = Probe(self.names[drafter], row) if drafter >= 0 else None
        # The first rank reads it too: drafters draft, and ranks exchange what they compute, in the order of the plan.
        return plan_of({row: self.names[index] for row, index in enumerate(chosen) if index >= 0})

    def probe(self, rows: HostRows, plan: Plan) -> Probe | None:
        return self.shared_probe

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor | None:
        return self.inner.observe(logits, hidden, at) if self.ranks.is_first else None

    def keep(self, slots: Sequence[int], signals: Sequence[Sequence[float]]) -> None:
        self.inner.keep(slots, signals)  # on the first rank: the others observe nothing

    def learn(self, rows: HostRows, result: RoundResult, ms: float) -> None:
        self.ranks.count(rows, result)
        if self.ranks.is_first:
            self.inner.learn(rows, result, ms)

    def signals(self, slots: Sequence[int]) -> Mapping[str, Sequence[float]]:
        """What the first rank decides by; the others' figures of a request are not shown to anybody."""
        return self.inner.signals(slots) if self.ranks.is_first and isinstance(self.inner, Explains) else {}


class SharedDrafter(Drafter):
    """Drafts of the first rank."""

    def __init__(self, inner: Drafter, ranks: Ranks):
        self.inner = inner
        self.ranks = ranks
        self.name, self.num_drafts = inner.name, inner.num_drafts

    def ingest(self, entries: Entries) -> None:
        self.inner.ingest(entries)

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        tokens, finite = self.inner.draft(rows, last)
        # One message: the tokens of each row, and whether they can be trusted.
        packed = self.ranks.same(torch.cat([tokens.to(torch.int64), finite[:, None].to(torch.int64)], dim=1))
        return Drafts(packed[:, :-1], packed[:, -1] != 0)


class SharedTarget(Target):
    """Choices of the first rank."""

    def __init__(self, inner: Target, ranks: Ranks):
        self.inner = inner
        self.ranks = ranks

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = self.inner.verify(rows, proposal)
        return verified._replace(predictions=self.ranks.same(verified.predictions))


def tp_ranks() -> Ranks:
    """The processes among which `--tp-size` has divided the model that this one serves a part of."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return Ranks(group.device_group, group.cpu_group) if group.world_size > 1 else Ranks()
