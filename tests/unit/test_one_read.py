"""A round reads the device once: a pretended device tells every other time that the host would have waited for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("sglang")

from tests.conformance.test_routers import BY_BATCH, BY_ROW, WITH_PRIORS, create
from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, plain_greedy
from tests.learned import HIDDEN
from tests.pretend_device import OnDevice, PretendDevice, callers
from whiflash_sglang.core.backlog import Backlog
from whiflash_sglang.core.hints import Asked, Hints
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.stop_conditions import tokens_to_end
from whiflash_sglang.core.transfer import to_device, to_host
from whiflash_sglang.core.types import Drafts, Entries, Proposal, Rows, Verified
from whiflash_sglang.drafters.dflash import DFlashDrafter
from whiflash_sglang.drafters.eagle3 import Eagle3Drafter
from whiflash_sglang.drafters.graphs import runs
from whiflash_sglang.drafters.runner import DraftRunner
from whiflash_sglang.routing.exploration import TRY_EVERY
from whiflash_sglang.serving.batches import batch_result, decode_rows, prefill_positions
from whiflash_sglang.serving.record import Record
from whiflash_sglang.serving.totals import Totals
from whiflash_sglang.serving.trace import Trace
from whiflash_sglang.serving.verifier import SGLangTarget

SLOTS, MAX_LEN, WIDTH = 8, 600, 8


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with torch.inference_mode(), PretendDevice() as pretended:
        yield pretended


# ---- the pretended device


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool((x > 1).any()),
        lambda x: int(x[0]),
        lambda x: float(x.sum()),
        lambda x: x[1].item(),
        lambda x: [0, 1, 2][x[0]],
        lambda x: "more" if x.sum() > 1 else "less",
        lambda x: x[x > 1],
        lambda x: x.masked_fill_(x > 1, 0)[x == 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.equal(x, x),
        lambda x: x[torch.tensor([0])],
        lambda x: x[[0, 2]],
        lambda x: x.index_put_((x == 1,), x[0]),
        lambda x: torch.where(x > 1),
        lambda x: torch.bincount(x),
        lambda x: torch.zeros(5)[: x[1]],
    ],
)
def test_what_waits_for_the_device_is_told(device: PretendDevice, read: Callable[[torch.Tensor], Any]) -> None:
    x = device.give(torch.arange(3))
    read(x)
    assert device.waits and not device.copies


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.numpy, lambda x: x + torch.arange(3)])
def test_what_a_device_does_not_do_is_refused(device: PretendDevice, read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        read(device.give(torch.arange(3)))


def test_copies_either_way_are_told_and_work_on_the_device_is_not(device: PretendDevice) -> None:
    x = device.give(torch.arange(6)).view(2, 3)
    x[:, 0] = 7
    x[torch.arange(1, device=x.device), 1:] = x[:1, 1:] * 2
    y = torch.cat([x, torch.ones_like(x)]).index_select(0, torch.zeros(1, dtype=torch.int64, device=x.device))
    assert isinstance(y, OnDevice) and not device.copies and not device.waits
    assert y.cpu().tolist() == [[7, 2, 4]] and len(device.copies) == 1
    assert to_device([1, 2], x.device).to("cpu").tolist() == [1, 2]
    assert [*map(len, (device.copies, device.waits))] == [2, 0]


# ---- copies


def test_one_copy_keeps_every_value_and_shape(device: PretendDevice) -> None:
    values = (
        torch.tensor([[2**62 + 1, -5]]),
        torch.tensor(True),
        torch.tensor([[0.1], [float("nan")]]),
        torch.tensor([1 / 3, -torch.inf], dtype=torch.float64),
        torch.zeros(0, 3),
        torch.tensor([[7, 8], [9, 10]]).t(),
        torch.tensor([1.5], dtype=torch.bfloat16),
    )
    found = to_host(*device.give(values))
    assert len(device.copies) == 1 and not device.waits
    for value, one in zip(values, found, strict=True):
        assert one.shape == value.shape and not isinstance(one, OnDevice)
        assert torch.equal(one, value.to(one.dtype)) or torch.allclose(one, value.double(), equal_nan=True)
    assert found[0].tolist() == [[2**62 + 1, -5]] and found[3].tolist() == [1 / 3, float("-inf")]


# ---- the round


class DeviceTarget(FakeTarget):
    """The fake target's work is the device's own."""

    def __init__(self, world: World, device: PretendDevice):
        super().__init__(world)
        self.device = device

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = super().verify(self.device.take(rows), self.device.take(proposal))
        hidden = torch.randn(*verified.predictions.shape, HIDDEN)
        return self.device.give(verified._replace(logits=verified.logits * torch.rand(()), hidden=hidden))


class DeviceDrafter(FakeDrafter):
    def __init__(self, name: str, num_drafts: int, world: World, device: PretendDevice):
        super().__init__(name, num_drafts, world, 0.7)
        self.device = device

    def ingest(self, entries: Entries) -> None:
        super().ingest(self.device.take(entries))

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        return self.device.give(super().draft(self.device.take(rows), self.device.take(last)))


class Server:
    """What SGLang and the worker around a round do, with requests 0, 1, ... that stand in those slots."""

    def __init__(self, router: str, num_requests: int, device: PretendDevice):
        self.device = device
        self.world = World(SLOTS, MAX_LEN)
        self.table = device.give(self.world.table)
        self.totals = Totals(("df", "e3"))
        drafters = {name: DeviceDrafter(name, drafts, self.world, device) for name, drafts in (("df", 7), ("e3", 4))}
        backlog = Backlog(drafters, 1, torch.float64, self.table, 24)
        target = DeviceTarget(self.world, device)
        policy = create(router)
        # A network's weights go to the device with the first forward, once.
        policy.observe(*device.give((torch.zeros(1, VOCAB), torch.zeros(1, HIDDEN), torch.zeros(1, dtype=torch.int64))))
        self.round = DecodeRound(policy, drafters, target, backlog, timed=self.totals.timed)
        params = SimpleNamespace(max_new_tokens=500, ignore_eos=True, stop_strs=[], stop_regex_strs=[])
        self.requests = []
        for slot in range(num_requests):
            prompt = [slot, 5, 7]
            self.world.texts[slot] = [*prompt, *plain_greedy(prompt, 1)]
            self.requests.append(
                SimpleNamespace(
                    req_pool_idx=slot,
                    # The last request's prompt goes on behind the chunk that is prefilled.
                    origin_input_ids=[*self.world.texts[slot]] if slot == 4 else prompt,
                    output_ids=[],
                    sampling_params=params,
                    custom_logit_processor=object() if slot == 3 else None,
                )
            )

    def prefill(self) -> None:
        slots = range(len(self.requests))
        given = self.world.prefill(slots)
        lens = [length - 1 for length in given.lens]  # one token of each prompt was cached
        computed = [row for row, position in enumerate(given.positions.tolist()) if position > 0]
        batch = SimpleNamespace(
            reqs=self.requests,
            prefix_lens=[1] * len(slots),
            extend_lens=lens,
            input_ids=torch.cat([torch.tensor(self.world.texts[slot][1:-1]) for slot in slots]),
            out_cache_loc=given.kv_slots[computed],
        )
        batch.input_ids, batch.out_cache_loc = self.device.give((batch.input_ids, batch.out_cache_loc))
        features, hidden, sampled = self.device.give(
            (given.features[computed], torch.randn(len(computed), HIDDEN), given.sampled)
        )
        for slot in slots:  # what the drafters know of the cached token
            first = given.positions.tolist().index(0, sum(given.lens[:slot]))
            for drafter in self.round.drafters.values():
                FakeDrafter.ingest(drafter, one(given, first))
        self.device.forget()
        prefill = prefill_positions(batch, features, hidden, sampled)
        tokens = self.round.prefill(prefill, self.device.give(torch.randn(len(slots), VOCAB)))
        assert tokens == given.sampled.tolist()
        assert self.device.take(prefill.next_tokens).tolist() == given.next_tokens[computed].tolist()
        assert self.device.take(prefill.positions).tolist() == given.positions[computed].tolist()
        for slot, route in zip(slots, ("auto", "auto", "off", "auto", "e3"), strict=False):
            trace = Trace() if slot == 1 else None
            asked = Asked(Hints(route=route, trace=slot == 1))
            self.totals.begin(slot, Record(self.totals.reader, None, asked, [], [], tokens[slot], trace))

    def decode(self) -> list[Any]:
        """A round, as `WhiFlashWorker.decode` does it."""
        lens = [len(self.world.texts[slot]) - 1 for slot in range(len(self.requests))]
        anchors = [self.world.texts[slot][-1] for slot in range(len(self.requests))]
        batch = SimpleNamespace(
            reqs=self.requests,
            seq_lens_cpu=torch.tensor(lens),
            sampling_info=SimpleNamespace(has_custom_logit_processor=len(self.requests) > 3),
            spec_info=SimpleNamespace(bonus_tokens=self.device.give(torch.tensor(anchors))),
        )
        slots = torch.arange(len(self.requests))
        batch.req_pool_indices, batch.seq_lens = self.device.give((slots, torch.tensor(lens)))
        self.device.forget()
        rows = decode_rows(batch, self.table, WIDTH)
        rows = rows._replace(host=self.totals.with_states(rows.host))
        signals = self.totals.signals(rows.host, self.round.router)
        result = self.round.run(rows)
        self.round.router.learn(rows.host, result, 12.0)
        self.totals.count(rows.host, result, signals)
        kept = [tokens_to_end(*text).num_tokens for text in zip(self.requests, result.committed, strict=True)]
        given = batch_result(rows, result, kept, None)
        # What SGLang's scheduler reads next is on the host; what its next forward reads is on the device.
        flat, counts, stride = (
            given.next_token_ids.tolist(),
            given.accept_lens.tolist(),
            given.speculative_num_draft_tokens,
        )
        for slot, count in enumerate(counts):
            self.world.texts[slot] += flat[slot * stride : slot * stride + count]
        state = self.device.take((given.next_draft_input.bonus_tokens, given.new_seq_lens))
        assert state[0].tolist() == [self.world.texts[slot][-1] for slot in range(len(counts))]
        assert state[1].tolist() == [length + count for length, count in zip(lens, counts, strict=True)]
        assert isinstance(given.new_seq_lens, OnDevice) and given.new_seq_lens.is_contiguous()
        return [result, signals]


def one(given: Any, place: int) -> Entries:
    """One position of a prefill, as a drafter keeps it."""
    part = slice(place, place + 1)
    return Entries(given.features[part], given.next_tokens[part], given.positions[part], given.kv_slots[part])


def assert_read_once(device: PretendDevice) -> None:
    assert len(device.copies) == 1 and "to_host" in device.copies[0], device.copies
    assert not device.waits
    assert all("to_device" in callers for callers in device.sent), device.sent


@pytest.mark.slow  # one trial of a prior is made in 64 rounds
@pytest.mark.parametrize("num_requests", [1, 5])
@pytest.mark.parametrize("router", [*BY_ROW, *BY_BATCH, *WITH_PRIORS])
def test_a_round_reads_the_device_once(device: PretendDevice, router: str, num_requests: int) -> None:
    """Also where drafts are caught up with, requests are traced or want no drafts, and a drafter was switched off."""
    server = Server(router, num_requests, device)
    server.prefill()
    assert_read_once(device)
    caught_up, traced = 0, 0
    for number in range(2 * TRY_EVERY // num_requests if "priors" in router else 14):
        if number == 10:
            server.round.health.switch_off("e3")
        if max(map(len, server.world.texts.values())) > MAX_LEN - 2 * WIDTH:
            break
        result, signals = server.decode()
        assert_read_once(device)
        caught_up += len(result.catch_ups)
        traced += bool(signals)
    assert caught_up
    assert traced or num_requests == 1 or router not in ("entropy", "neural", *BY_BATCH, *WITH_PRIORS)
    for slot, text in server.world.texts.items():
        assert text[3:] == plain_greedy([slot, 5, 7], len(text) - 3)
    device.forget()
    lens = [len(server.world.texts[slot]) - 1 for slot in range(num_requests)]
    server.round.finish(range(num_requests), lens)
    assert not device.copies and not device.waits, "the end of a request is no reason to wait either"


# ---- adjustments of the target's logits


class Event:
    """Of the pretended device; `waits` tells who waited for one."""

    waits: ClassVar[list[list[str]]] = []

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.waits.append([*callers()])


class EvenTokens:
    """A grammar of SGLang's kind: its mask is filled on the host and applied by the device's own kernel."""

    def __init__(self, device: PretendDevice):
        self.device = device

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: object) -> torch.Tensor:
        return torch.full((batch_size, 1), -1, dtype=torch.int32)

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, row: int) -> None:
        vocab_mask[row] = 0x55555555

    def accept_token(self, token: int) -> None:
        assert token % 2 == 0

    def rollback(self, count: int) -> None:
        pass

    def is_terminated(self) -> bool:
        return False

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        on_host, bits = self.device.take((logits, vocab_mask))
        on_host.masked_fill_((bits >> torch.arange(VOCAB)) & 1 == 0, -torch.inf)


class AdjustedTarget(DeviceTarget):
    """The fake target's logits, adjusted and chosen from by the worker's own code."""

    def __init__(self, world: World, device: PretendDevice, batch: Any):
        super().__init__(world, device)
        self.own = SGLangTarget(None, 1, widths={})
        self.own.bind(batch)

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        verified = super().verify(rows, proposal)
        predictions = self.own.predict(verified.logits, torch.zeros_like(proposal.tokens), proposal.tokens)
        return verified._replace(predictions=predictions)


NOTHING_ASKED = {
    "max_new_tokens": 500,
    "ignore_eos": True,
    "stop_strs": [],
    "stop_regex_strs": [],
    "stop_token_ids": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
ASKED: dict[str, dict[str, Any]] = {
    "penalties": {"frequency_penalty": 0.3, "presence_penalty": 0.4, "repetition_penalty": 1.3},
    "min_new_tokens": {"min_new_tokens": 40, "stop_token_ids": [3, 9]},
    "logit_bias": {},
    "grammar": {},
}


@pytest.mark.parametrize("asked", [*((name,) for name in ASKED), tuple(ASKED)], ids="+".join)
def test_adjustments_of_logits_wait_for_nothing(
    device: PretendDevice, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request that wants nothing, and one for each adjustment.

    A grammar's mask is made on the host, of drafts that it has to see: that one copy and wait is SGLang's own
    (`GrammarTree`), as is the mask's way to the device.
    """
    monkeypatch.setattr(Event, "waits", [])
    monkeypatch.setattr(torch, "get_device_module", lambda of: SimpleNamespace(Event=Event))
    server = Server("alternate", 1 + len(asked), device)
    bias = torch.zeros(1 + len(asked), VOCAB)
    for row, (name, request) in enumerate(zip((None, *asked), server.requests, strict=True)):
        request.sampling_params = SimpleNamespace(**{**NOTHING_ASKED, **ASKED.get(name or "", {})})
        vars(request).update(tokenizer=None, grammar=EvenTokens(device) if name == "grammar" else None)
        bias[row, 4] = -100.0 if name == "logit_bias" else 0.0
    sampling = SimpleNamespace(
        vocab_size=VOCAB,
        logit_bias=device.give(bias) if "logit_bias" in asked else None,
        grammar_mask=None,
        is_all_greedy=True,
        has_custom_logit_processor=False,
    )
    has_grammar = "grammar" in asked
    batch = SimpleNamespace(reqs=server.requests, has_grammar=has_grammar, sampling_info=sampling, return_logprob=False)
    server.round.target = AdjustedTarget(server.world, device, batch)
    server.prefill()
    for _ in range(5):
        server.decode()
        copies = [callers for callers in device.copies if "resolve" not in callers and "_async_d2h" not in callers]
        assert len(copies) == 1 and "to_host" in copies[0] and not device.waits, (device.copies, device.waits)
        assert len(device.copies) == 1 + has_grammar
        sent = [callers for callers in device.sent if "to_device" not in callers]
        assert len(sent) == has_grammar and all("build_grammar_vocab_mask" in callers for callers in sent), sent
        for slot, request in enumerate(server.requests):
            request.output_ids = server.world.texts[slot][len(request.origin_input_ids) :]
    assert len(Event.waits) == 5 * has_grammar and all("resolve" in callers for callers in Event.waits)
    for name, request in zip(asked, server.requests[1:], strict=True):
        said = request.output_ids[1:]  # the first may be the prefill's
        assert len(said) >= 4
        assert name != "min_new_tokens" or not {3, 9} & {*said}
        assert name != "logit_bias" or 4 not in said
        assert name != "grammar" or all(token % 2 == 0 for token in said)


# ---- drafters


class Forwards:
    """Stands for SGLang's model runner and draft model: keeps the batch of every forward."""

    def __init__(self, device: PretendDevice, hidden: int):
        self.device = device
        self.hidden = hidden
        self.batches: list[Any] = []
        self.attn_backend = self
        self.model = self

    def init_forward_metadata(self, batch: Any) -> None:
        self.batches.append(batch)

    def get_input_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tokens: self.device.give(torch.zeros(len(tokens), self.hidden))

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, input_embeds: Any) -> Any:
        shape = (len(input_ids), self.hidden)
        hidden, logits = self.device.give((torch.randn(shape), torch.randn(shape)))
        return SimpleNamespace(hidden_states=hidden, next_token_logits=logits)


def drafter(kind: type, forwards: Forwards, **parts: Any) -> Any:
    """A drafter of `kind` around what it is given, without a checkpoint."""
    made = kind.__new__(kind)
    worker = SimpleNamespace(model_runner=forwards)
    vars(made).update(runner=DraftRunner(None, worker, None, forwards), fuse=lambda features: features, **parts)
    made.fill = made.chain = runs(made.runner, made.propose, num_queries=1, num_entries=1)
    return made


@pytest.mark.parametrize("kind", [Eagle3Drafter, DFlashDrafter])
def test_a_drafter_reads_nothing_and_gives_backends_the_same_lengths_twice(device: PretendDevice, kind: type) -> None:
    """SGLang's attention backends plan by `seq_lens_cpu` where ours on a CPU read `seq_lens`: they have to agree."""
    forwards = Forwards(device, hidden=4)
    head = SimpleNamespace(best=lambda hidden: hidden.argmax(-1))
    made = drafter(
        kind,
        forwards,
        num_drafts=3,
        link=3,
        token_ids=None,
        block=device.give(torch.zeros(1, 4, dtype=torch.int64)),
        head=head,
    )
    world = World(SLOTS, MAX_LEN)
    world.texts.update({0: [1, 2, 3], 5: [1] * 9})
    drafts = made.draft(device.give(world.rows([5, 0], WIDTH)), device.give(torch.zeros(2, 4)))
    assert drafts.tokens.shape == (2, 3)
    assert not device.copies and not device.waits and not device.sent
    ends = [batch.seq_lens_cpu.tolist() for batch in forwards.batches]
    assert ends == ([[8, 2]] if kind is DFlashDrafter else [[7, 1], [8, 2], [9, 3]])
    for batch in forwards.batches:
        assert device.take(batch.seq_lens).tolist() == batch.seq_lens_cpu.tolist()
        assert batch.seq_lens_sum == sum(batch.seq_lens_cpu.tolist())
