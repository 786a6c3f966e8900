"""A minimal model of SGLang around a round: KV slots, request table, radix tree, queue, and request ends.

Every step follows SGLang 0.5.17, in its order, plus what `worker.py` adds. The corresponding code in SGLang:
`mem_cache/radix_cache.py` (keys, insertion, what is freed), `mem_cache/common.py` (release),
`managers/schedule_policy.py` (prefill batches), `managers/scheduler_components/batch_result_processor.py` (ends).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, feature, next_token
from whiflash_sglang.core.round import DecodeRound, Router
from whiflash_sglang.core.types import Prefill, Proposal, Rows, Verified

MAX_LEN = 72  # positions per request, including its verify window
NUM_DRAFTS = {"df": 7, "e3": 4}


@cache
def feature_of(text: tuple[int, ...]) -> float:
    return feature(text)


@dataclass(eq=False)
class Node:
    """One shared position. SGLang merges runs of them into one node, and splits it where texts diverge."""

    key: tuple[int, ...]  # the position's token and, with bigram keys, the next one
    slot: int
    parent: Node | None
    owner: int  # number of the request that brought the slot
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    locks: int = 0  # requests in the batch that read this position
    used: int = 0  # when


class RadixTree:
    def __init__(self, key_size: int):
        self.key_size = key_size  # 2: a position is shared only together with the next token
        self.root = Node((), -1, None, -1)
        self.clock = 0

    def keys(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """For `the cat sat`: (the, cat), (cat, sat); the last position has no key."""
        return list(zip(*(tokens[i:] for i in range(self.key_size)), strict=False))

    def match(self, tokens: Sequence[int]) -> list[Node]:
        """The longest shared prefix."""
        self.clock += 1
        path, node = [], self.root
        for key in self.keys(tokens):
            if key not in node.children:
                break
            node = node.children[key]
            node.used = self.clock
            path.append(node)
        return path

    def insert(self, tokens: Sequence[int], slots: Sequence[int], owner: int) -> tuple[list[Node], int]:
        """The path of `tokens`, and the length that was already shared, for which the tree keeps its own slots."""
        path = self.match(tokens)
        known = len(path)
        node = path[-1] if path else self.root
        for key, slot in list(zip(self.keys(tokens), slots, strict=False))[known:]:
            node.children[key] = Node(key, slot, node, owner, used=self.clock)
            node = node.children[key]
            path.append(node)
        return path, known

    def lock(self, path: Sequence[Node], by: int) -> None:
        for node in path:
            node.locks += by
            assert node.locks >= 0

    def nodes(self) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """Every shared position, and the text up to and including it."""
        stack = [(node, node.key[:1]) for node in self.root.children.values()]
        while stack:
            node, text = stack.pop()
            yield node, text
            stack += [(child, text + child.key[:1]) for child in node.children.values()]

    def evict(self, count: int) -> list[int]:
        """Evict the least recently used leaves. Returns the freed slots."""
        slots: list[int] = []
        while len(slots) < count:
            leaves = [node for node, _ in self.nodes() if not node.children and not node.locks]
            if not leaves:
                break
            oldest = min(leaves, key=lambda node: node.used)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.key]
            slots.append(oldest.slot)
        return slots


@dataclass(eq=False)
class Request:
    """SGLang's `Req`."""

    number: int
    prompt: list[int]
    max_tokens: int
    stop: int | None
    draftable: bool
    output: list[int] = field(default_factory=list)
    aborted: bool = False
    ended: bool = False
    row: int = -1  # in the request table, that is, the request slot
    path: list[Node] = field(default_factory=list)  # what it shares, locked; the length is SGLang's cache_protected_len
    committed: int = 0  # positions with KV
    allocated: int = 0  # positions with a KV slot

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output

    def answer_length(self) -> int | None:
        """Where the answer ends, if it has; checked in SGLang's order (`Req.update_finish_state`)."""
        if self.aborted:
            return len(self.output)
        if len(self.output) >= self.max_tokens:
            return self.max_tokens
        return self.output.index(self.stop) + 1 if self.stop in self.output else None


def mood(features: torch.Tensor) -> torch.Tensor:
    """The target's certainty after a text, which varies so that entropy routing switches drafters."""
    return torch.where(features % 2 == 0, 2.0, 0.1)


class MoodyTarget(FakeTarget):
    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = super().verify(rows, proposal)
        return verified._replace(logits=verified.logits * mood(verified.features))


class RadixWorld(World):
    """The server. `texts` and `table`, which target and drafters read, are those of the batch's requests."""

    def __init__(
        self,
        names: Sequence[str],
        router: Router,
        *,
        num_rows: int = 4,
        pool_size: int = 256,
        capacity: int = 64,
        skill: float = 0.8,
        key_size: int | None = None,
    ):
        super().__init__(num_rows, MAX_LEN)
        self.table = torch.full((num_rows, MAX_LEN), -1, dtype=torch.int32)
        self.drafters = {
            name: FakeDrafter(name, NUM_DRAFTS[name], self, skill, sees_next=name == "e3") for name in names
        }
        self.capacity, self.pool_size = capacity, pool_size
        self.decode = DecodeRound(router, self.drafters, MoodyTarget(self), self.backlog(names, capacity))
        self.tree = RadixTree(key_size or (2 if "e3" in names else 1))  # see scheduler_hooks._bigram_keys
        self.free, self.free_rows = list(range(pool_size)), list(range(num_rows))
        self.requests: list[Request] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None  # the request with a partially prefilled prompt
        self.seen: Counter[str] = Counter()  # events that happened, for tests to check

    def submit(
        self, prompt: Sequence[int], max_tokens: int, stop: int | None = None, draftable: bool = True
    ) -> Request:
        request = Request(len(self.requests), list(prompt), max_tokens, stop, draftable)
        self.requests.append(request)
        self.waiting.append(request)
        return request

    @property
    def batch(self) -> list[Request]:
        """The requests with a row and KV slots."""
        return [*self.running, *([self.chunked] if self.chunked else [])]

    # KV slots

    def room(self) -> int:
        return len(self.free) + sum(not node.locks for node, _ in self.tree.nodes())

    def allocate(self, request: Request, end: int) -> None:
        """Allocate KV slots for the request's positions up to `end`."""
        count = end - request.allocated
        if count <= 0:
            return
        if count > len(self.free):
            self.seen["evicted for room"] += 1
            self.evict(count - len(self.free))
        slots = [self.free.pop() for _ in range(count)]
        self.table[request.row, request.allocated : end] = torch.tensor(slots, dtype=torch.int32)
        request.allocated = end

    def release_slots(self, slots: Sequence[int]) -> None:
        """Free slots and clear the drafters' entries there, so that the next owner must write them."""
        assert not set(slots) & set(self.free) and len(set(slots)) == len(slots), "a slot is freed twice"
        self.free += slots
        for drafter in self.drafters.values():
            for slot in slots:
                drafter.entries.pop(slot, None)

    def evict(self, count: int) -> None:
        self.release_slots(self.tree.evict(count))

    # Prefill

    def prefill(self, max_requests: int, budget: int) -> None:
        """One prefill batch of at most `budget` tokens. A prompt that does not fit continues in the next batch."""
        self.stash()
        batch: list[tuple[Request, int]] = []  # with the start position of each
        for request in ([self.chunked] if self.chunked else []) + self.waiting[:max_requests]:
            start = self.admit(request, budget) if budget else None
            if start is None:
                break
            batch.append((request, start))
            budget -= request.allocated - start
        for request, _ in batch:
            self.chunked = request if request.allocated < len(request.text) else None
            if request in self.waiting:
                self.waiting.remove(request)
        if batch:
            self.seen["prefilled in chunks"] += self.chunked is not None
            self.compute_prompts(batch)

    def admit(self, request: Request, budget: int) -> int | None:
        """Make room for a prompt or its next chunk. Returns its start position, or None if there is no room."""
        begins = request is not self.chunked
        if begins and not self.free_rows:
            return None
        path = self.tree.match(request.text[:-1]) if begins else request.path  # the last token is always computed
        start = len(path) if begins else request.allocated
        end = min(len(request.text), start + budget)
        if end - start > self.room() - sum(not node.locks for node in path):
            return None
        if begins:
            request.row, request.path, request.allocated = self.free_rows.pop(), path, start
            self.tree.lock(path, +1)
            self.write_path(request)
            self.seen[f"hit of {start}"] += 1
            self.seen["hit on a hit"] += len({node.owner for node in path}) > 1
            self.seen["hit after retraction"] += start > 0 and bool(request.output)
        self.allocate(request, end)
        return start

    def compute_prompts(self, batch: Sequence[tuple[Request, int]]) -> None:
        positions = self.prefill_positions(batch)
        logits = torch.zeros(len(batch), VOCAB)
        logits[:, 0] = 5.0
        self.decode.prefill(positions, logits * mood(positions.features[positions.last]))
        for request, _ in batch:
            request.committed = request.allocated
            if request is self.chunked:
                continue
            request.output.append(next_token(request.text))
            if request.answer_length() is not None:  # the worker is not called: only the prompt is shared
                self.end(request)
            else:
                self.share_prompt(request)
                self.texts[request.row] = request.text
                self.running.append(request)

    def prefill_positions(self, batch: Sequence[tuple[Request, int]]) -> Prefill:
        """Like `worker.prefill_positions`."""
        positions = [(request, place) for request, start in batch for place in range(start, request.allocated)]
        texts = {request: [*request.text, next_token(request.text)] for request, _ in batch}
        features = [[feature_of(tuple(texts[request][: place + 1]))] for request, place in positions]
        lens = torch.tensor([request.allocated for request, _ in batch])
        return Prefill(
            features=torch.tensor(features, dtype=torch.float64),
            hidden=torch.zeros(len(features), 0),
            next_tokens=torch.tensor([texts[request][place + 1] for request, place in positions]),
            positions=torch.tensor([place for _, place in positions]),
            kv_slots=torch.tensor([int(self.table[request.row, place]) for request, place in positions]),
            last=(lens - torch.tensor([start for _, start in batch])).cumsum(0) - 1,
            sampled=torch.tensor([next_token(request.text) for request, _ in batch]),
            slots=[request.row for request, _ in batch],
            lens=[request.allocated for request, _ in batch],
        )

    def stash(self) -> None:
        """Share the prefilled part of a prompt, as SGLang does when it builds the next batch."""
        if self.chunked is not None:
            self.share_prompt(self.chunked)

    def share_prompt(self, request: Request) -> None:
        """SGLang's `cache_unfinished_req`: the request switches to the tree's slots where the tree has them."""
        slots = self.table[request.row, : request.committed].tolist()
        path, known = self.tree.insert(request.text[: request.committed], slots, request.number)
        protected = len(request.path)
        self.seen["duplicates freed"] += known > protected
        self.release_slots(slots[protected:known])
        self.tree.lock(request.path, -1)
        self.tree.lock(path, +1)
        request.path = path
        self.write_path(request)

    def write_path(self, request: Request) -> None:
        """Point the request's table to the tree's slots of its shared prefix."""
        slots = [node.slot for node in request.path]
        self.table[request.row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)

    # Decode

    def run(self, requests: Sequence[Request]) -> None:
        """One decode round of these requests, as far as the pool has room."""
        self.stash()
        requests = list(requests)
        width = self.decode.max_width
        while sum(max(0, r.committed + width - r.allocated) for r in requests) > self.room():
            self.retract(self.running[-1])
            requests = [request for request in requests if request in self.running]
        if not requests:
            return
        for request in requests:
            self.allocate(request, request.committed + width)
        draftable = [request.draftable for request in requests]
        rows = self.rows([request.row for request in requests], width)
        known = rows.host._replace(draftable=None if all(draftable) else draftable)
        result = self.decode.run(rows._replace(host=known))
        self.seen["caught up on missed rounds"] += any(max(done.missed) > 0 for done in result.catch_ups.values())
        for request, tokens in zip(requests, result.committed, strict=True):
            request.output += tokens
            request.committed += len(tokens)
            self.texts[request.row] = request.text
            if request.answer_length() is not None:
                self.prepare_release(request)
                self.running.remove(request)
                self.end(request)

    # Request ends

    def prepare_release(self, request: Request) -> None:
        """Like `worker.prepare_for_kv_cache_release`."""
        length = len(request.prompt) + (request.answer_length() or 0)
        self.seen["accepted behind the end"] += request.committed > length
        request.committed = min(request.committed, length)
        caught_up = self.decode.finish([request.row], [request.committed])
        self.seen["ended with a backlog"] += any(max(done.missed) > 0 for done in caught_up.values())

    def end(self, request: Request) -> None:
        self.release(request, insert=True)
        request.output = request.output[: request.answer_length()]
        request.ended = True
        self.seen["aborted in the middle"] += request.aborted

    def abort(self, request: Request) -> None:
        """A request in the batch ends after its next round, one in prefill immediately."""
        request.aborted = True
        if request in self.running:
            return
        request.ended = True
        if request is self.chunked:
            self.seen["chunk aborted"] += 1
            self.chunked = None
            self.release(request, insert=False)
        else:
            self.waiting.remove(request)

    def retract(self, request: Request) -> None:
        """Take a request out of the batch. It is prefilled again, including its output so far."""
        self.seen["retracted"] += 1
        if request is self.chunked:
            self.chunked = None
        else:
            self.running.remove(request)
        self.release(request, insert=False)
        self.waiting.append(request)

    def release(self, request: Request, insert: bool) -> None:
        """SGLang's `release_kv_cache`: share the committed positions if `insert`, and free all others."""
        slots = self.table[request.row, : request.allocated].tolist()
        protected = len(request.path)
        mine = slots[protected:]
        if insert:
            path, known = self.tree.insert(request.text[: request.committed], slots, request.number)
            mine = slots[protected:known] + slots[len(path) :]
            self.seen["duplicates freed"] += known > protected
        self.release_slots(mine)
        self.tree.lock(request.path, -1)
        self.table[request.row] = -1
        self.texts.pop(request.row, None)
        self.free_rows.append(request.row)
        request.row, request.path, request.committed, request.allocated = -1, [], 0, 0
