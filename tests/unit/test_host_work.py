"""How much work of ours a prompt, a round and the end of requests take in the scheduler: counted, not timed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.mem_cache import allocation
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, plain_greedy
from tests.pretend_device import PretendDevice
from whiflash_sglang.bridge import builders
from whiflash_sglang.bridge.algorithm import WhiFlashDraftInput
from whiflash_sglang.core.hints import parse
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.spans import Markers, Pair, SpanReader
from whiflash_sglang.routing import create_router
from whiflash_sglang.serving.totals import Totals
from whiflash_sglang.serving.worker import WhiFlashWorker
from whiflash_sglang.startup.config import WhiFlashConfig

NUM_REQUESTS, MAX_LEN, WIDTH = 16, 200, 8
CONFIG = WhiFlashConfig(dflash_draft="d", eagle_draft="e", router="fixed:e3")


class Pieces(dict[int, str]):
    """Pieces of tokens, and how many were asked for."""

    looked = 0

    def __getitem__(self, token: int) -> str:
        self.looked += 1
        return "x"


class Metrics:
    """Metrics that count how often they are written."""

    def __init__(self) -> None:
        self.written = 0

    def update(self, at_once: bool = False) -> None:
        self.written += at_once


class Drafter(FakeDrafter):
    """A drafter that counts its passes."""

    passes = 0

    def ingest(self, entries: Any) -> None:
        self.passes += 1
        super().ingest(entries)


class Request(SimpleNamespace):
    """As much of SGLang's request as the worker looks at."""

    def __init__(self, slot: int, prompt: list[int], output: list[int], **params: Any):
        super().__init__(
            rid=f"request {slot}",
            req_pool_idx=slot,
            origin_input_ids=array("q", prompt),
            output_ids=array("q", output),
            sampling_params=SamplingParams(**params),
            customized_info=None,
            tokenizer=None,
            eos_token_ids=None,
            to_finish=None,
        )
        self.sampling_params.normalize(None)

    @property
    def output_ids_through_stop(self) -> array[int]:
        return self.output_ids


def test_of_a_prompt_in_chunks_the_last_one_is_read_and_its_hints_are_parsed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tool's output of 128k tokens, in chunks of 8k; and once more after a retraction."""
    parsed: list[object] = []
    monkeypatch.setattr(builders, "parse", lambda *given: parsed.append(given) or parse(*given))
    pieces = Pieces()
    worker = object.__new__(WhiFlashWorker)
    worker.config = CONFIG
    worker.totals = Totals(("df", "e3"), SpanReader(Markers(reasoning=Pair("<think>", "</think>")), pieces))
    size, chunk = 128 * 1024, 8 * 1024
    request = Request(2, [1] * size, [], custom_params={"whiflash": {"trace": True, "span": "reasoning"}})
    for start in range(0, size, chunk):
        assert not pieces.looked, "nothing of what came before"
        worker.begin_records(SimpleNamespace(reqs=[request], prefix_lens=[start], extend_lens=[chunk]), [5])
    assert pieces.looked == size + 1
    record = worker.totals.records[2]
    assert record.state.span == "reasoning" and record.trace.first == 5
    request.req_pool_idx = 3
    request.output_ids.extend([5, 6])
    worker.begin_records(SimpleNamespace(reqs=[request], prefix_lens=[0], extend_lens=[size + 2]), [7])
    assert worker.totals.records[3].trace is record.trace
    assert len(parsed) == 1


@pytest.fixture
def worker() -> WhiFlashWorker:
    """A worker in the middle of serving, with fake models."""
    world = World(NUM_REQUESTS, MAX_LEN)
    drafters = {name: Drafter(name, drafts, world, 0.6) for name, drafts in (("df", 7), ("e3", 4))}
    target = FakeTarget(world)
    target.bind, target.logprobs = (lambda batch: None), None  # type: ignore[attr-defined]
    worker = object.__new__(WhiFlashWorker)
    worker.config, worker.world, worker.target, worker.max_width = CONFIG, world, target, WIDTH
    worker.req_to_token_pool = SimpleNamespace(req_to_token=world.table)
    worker.totals, worker.metrics = Totals(("df", "e3")), Metrics()
    backlog = world.backlog(["df", "e3"], 64)
    worker.round = DecodeRound(create_router(CONFIG, NUM_REQUESTS), drafters, target, backlog)
    return worker


def decode(worker: WhiFlashWorker, requests: list[Request]) -> None:
    """A round, and what SGLang makes of its result."""
    world: World = worker.world
    slots = [request.req_pool_idx for request in requests]
    rows = world.rows(slots, WIDTH)
    batch = SimpleNamespace(
        reqs=requests,
        req_pool_indices=rows.slots,
        seq_lens=rows.prefix_lens,
        seq_lens_cpu=rows.prefix_lens,
        sampling_info=SimpleNamespace(has_custom_logit_processor=False),
        spec_info=SimpleNamespace(bonus_tokens=rows.anchors),
    )
    given = worker.decode(batch)
    stride, flat = given.speculative_num_draft_tokens, given.next_token_ids.tolist()
    for row, (request, count) in enumerate(zip(requests, given.accept_lens.tolist(), strict=True)):
        tokens = flat[row * stride : row * stride + count]
        request.kv_committed_len = len(world.texts[request.req_pool_idx]) - 1 + count
        world.texts[request.req_pool_idx] += tokens
        request.output_ids.extend(tokens)


@pytest.mark.parametrize("why", ["length", "abort"])
def test_requests_that_end_together_are_ingested_in_one_pass(worker: WhiFlashWorker, why: str) -> None:
    """And metrics are written once; SGLang's call for each of them finds nothing left to do."""
    world, requests = worker.world, []
    for slot in range(NUM_REQUESTS):
        world.texts[slot] = [slot, 5, 7, *plain_greedy([slot, 5, 7], 1)]
        requests.append(Request(slot, world.texts[slot][:3], world.texts[slot][3:], max_new_tokens=60))
    prefill = world.prefill(range(NUM_REQUESTS))
    worker.round.prefill(prefill, torch.zeros(NUM_REQUESTS, VOCAB))
    batch = SimpleNamespace(reqs=requests, prefix_lens=[0] * NUM_REQUESTS, extend_lens=[3] * NUM_REQUESTS)
    worker.begin_records(batch, prefill.sampled.tolist())
    for _ in range(4):
        decode(worker, requests)
    for request in requests:
        if why == "length":
            request.sampling_params.max_new_tokens = len(request.output_ids) + 1
        else:
            request.to_finish = object()
    idle = worker.round.drafters["df"]
    assert worker.metrics.written == idle.passes - 1 == 0, "a prefill"
    decode(worker, requests)
    assert (worker.metrics.written, idle.passes) == (1, 2)
    assert worker.totals.snapshot()["ingested_by_drafter"]["df"] == sum(len(one.output_ids) - 1 for one in requests)
    seconds = dict(worker.totals.seconds)
    for request in requests:
        worker.prepare_for_kv_cache_release(request)
        assert request.kv_committed_len == 3 + len(request.output_ids) - 1
    assert (worker.metrics.written, idle.passes, worker.totals.seconds) == (1, 2, seconds)


def test_an_end_that_could_not_be_foreseen_is_caught_up_with(worker: WhiFlashWorker) -> None:
    """A grammar's: SGLang calls for the request before its KV is shared."""
    world = worker.world
    world.texts[3] = [1, 2, *plain_greedy([1, 2], 1)]
    request = Request(3, [1, 2], world.texts[3][2:], max_new_tokens=60)
    worker.round.prefill(world.prefill([3]), torch.zeros(1, VOCAB))
    worker.begin_records(SimpleNamespace(reqs=[request], prefix_lens=[0], extend_lens=[2]), world.texts[3][2:])
    decode(worker, [request])
    worker.prepare_for_kv_cache_release(request)
    assert not worker.round.lags(3, request.kv_committed_len)
    assert worker.round.drafters["df"].passes == 2


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with torch.inference_mode(), PretendDevice() as pretended:
        yield pretended


def test_room_for_a_round_is_made_with_one_copy_that_waits_for_nothing(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(allocation, "alloc_for_spec_decode", lambda tree, pool, **given: asked.update(given))
    spec = SimpleNamespace(speculative_num_draft_tokens=8)
    monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: spec)
    requests = [
        SimpleNamespace(kv_committed_len=committed, kv=SimpleNamespace(kv_allocated_len=allocated))
        for committed, allocated in ((10, 12), (5, 16))
    ]
    batch = SimpleNamespace(
        reqs=requests, device="meta", req_pool_indices=None, tree_cache=None, req_to_token_pool=None
    )
    WhiFlashDraftInput.prepare_for_decode(None, batch)  # type: ignore[arg-type]
    (sent,) = device.sent
    assert "to_device" in sent and not device.copies and not device.waits
    for name, lens in (("cur_kv_lens", [12, 16]), ("nxt_kv_lens", [18, 16])):
        assert device.take(asked[name]).tolist() == asked[f"{name}_cpu"].tolist() == lens
        assert asked[name].dtype == torch.int32
    assert asked["num_needed_tokens"] == 6
    assert batch.seq_lens_cpu.tolist() == [10, 5] and batch.seq_lens_sum == 15
