"""SGLang's Triton attention, driven as our code drives it, against our attention for a CPU on the same pools.

On a GPU drafters and target run on SGLang's own backends, with batches that we fill: windows of any width behind
prefixes of any length, a block without causality, single steps. What the backend reads of such a batch, and what it
ignores, shows here in Triton's interpreter; CUDA graphs do not, but how their metadata is made and refilled does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention import triton_backend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput

from tests.kernels import DEVICE
from whiflash_sglang.core.types import HostRows, Rows
from whiflash_sglang.cpu.attention import CpuAttentionBackend
from whiflash_sglang.drafters.runner import DraftBlock, DraftRunner

HEAD_DIM, Q_HEADS, KV_HEADS, LAYERS = 16, 2, 1, 2
HIDDEN = Q_HEADS * HEAD_DIM
KV_SIZE = KV_HEADS * HEAD_DIM
CONTEXT = 256  # positions of a request
NUM_REQUESTS = 6
MAX_TOKENS = 256  # of a batch
FULL_WIDTH = 8  # the server's verify window; others are narrower
PREFIX_LENS = (1, 150, 64)  # within a block of the kernel, over several, and exactly one
TOLERANCE = 1e-5

Output = torch.Tensor
"""Of every layer, [layers, tokens, q_heads * head_dim]."""


class Setup:
    """Pools with random entries, a slot table in no order, and what a backend reads of a model runner."""

    def __init__(self, seed: int = 0, page_size: int = 1, deterministic: bool = False):
        generator = torch.Generator().manual_seed(seed)
        num_slots = NUM_REQUESTS * CONTEXT
        # A page holds consecutive positions of one request. Page 0 is where padding is written to.
        pages = 1 + torch.randperm(num_slots // page_size, generator=generator)
        slots = pages[:, None] * page_size + torch.arange(page_size)
        self.req_to_token = slots.view(NUM_REQUESTS, CONTEXT).to(DEVICE, torch.int32)
        self.pool = MHATokenToKVPool(num_slots, page_size, torch.float32, KV_HEADS, HEAD_DIM, LAYERS, DEVICE, False)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        config = SimpleNamespace(
            attention_arch=AttentionArch.MHA,
            context_len=CONTEXT,
            hf_config=SimpleNamespace(architectures=["Qwen3ForCausalLM"]),
            is_encoder_decoder=False,
            v_head_dim=HEAD_DIM,
            swa_v_head_dim=HEAD_DIM,
            get_max_num_attention_heads=lambda: Q_HEADS,
            get_num_kv_heads=lambda tp_size: KV_HEADS,
            linear_attn_registry_resolved=True,
        )
        server_args = SimpleNamespace(
            chunked_prefill_size=-1,
            enable_deterministic_inference=deterministic,
            triton_attention_num_kv_splits=8,
            triton_attention_split_tile_size=None,
        )
        self.runner = SimpleNamespace(
            device=DEVICE,
            gpu_id=0,
            is_draft_worker=False,
            model_config=config,
            page_size=page_size,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token, size=NUM_REQUESTS),
            server_args=server_args,
            sliding_window_size=None,
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=SimpleNamespace(),
            use_mla_backend=False,
        )

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        return self.req_to_token[row, start:end].to(torch.int64)


class Layers:
    """A model of attention layers alone: queries, keys and values are random, and outputs are those of every layer."""

    def __init__(self, attn_type: AttentionType, seed: int = 1):
        scale = HEAD_DIM**-0.5
        self.layers = [
            RadixAttention(Q_HEADS, HEAD_DIM, scale, KV_HEADS, layer, attn_type=attn_type) for layer in range(LAYERS)
        ]
        self.seed = seed

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, input_embeds: Any = None
    ) -> Output:
        generator = torch.Generator().manual_seed(self.seed)

        def random(width: int) -> torch.Tensor:
            every = torch.randn(MAX_TOKENS, width, generator=generator)  # so that padding changes nothing before it
            return every[: len(positions)].to(DEVICE)

        return torch.stack([layer(random(HIDDEN), random(KV_SIZE), random(KV_SIZE), batch) for layer in self.layers])


def mock_server(patch: pytest.MonkeyPatch) -> None:
    """What the backend asks of the running server."""
    spec = SimpleNamespace(speculative_num_draft_tokens=FULL_WIDTH, speculative_num_steps=1, speculative_eagle_topk=1)
    patch.setattr(triton_backend, "get_spec", lambda: spec)
    for name in ("hybrid_gdn_config", "kimi_linear_config", "linear_attn_model_spec"):
        patch.setattr(triton_backend, name, lambda config: None)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mock_server(monkeypatch)
    with get_parallel().override(attn_tp_size=1, attn_dcp_size=1, attn_dcp_rank=0), torch.inference_mode():
        yield


Case = Callable[[Setup, Any], Output]
"""Run something on a set-up's pools with a backend of its own."""


def outcome(backend_class: type, case: Case, **options: Any) -> list[torch.Tensor]:
    """The outputs, and what stands in the pools after."""
    setup = Setup(**options)
    output = case(setup, backend_class(setup.runner))
    return [output, *setup.pool.k_buffer, *setup.pool.v_buffer]


def check(case: Case, **options: Any) -> None:
    assert_same(outcome(TritonAttnBackend, case, **options), outcome(CpuAttentionBackend, case, **options))


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def tensor(numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def window_slots(setup: Setup, rows: list[int], lens: list[int], width: int) -> torch.Tensor:
    slots = [setup.slots(row, length, length + width) for row, length in zip(rows, lens, strict=True)]
    return torch.cat(slots)


# ----------------------------------------------------------------------------------------------- the target's forwards


def verify_batch(setup: Setup, rows: list[int], lens: list[int], width: int) -> ForwardBatch:
    """As `SGLangTarget.forward` has SGLang make it: lengths on the device without the window, on the host with it."""
    positions = (tensor(lens)[:, None] + torch.arange(width, device=DEVICE)).reshape(-1)
    host_lens = [length + width for length in lens]
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=len(rows),
        input_ids=torch.zeros_like(positions),
        req_pool_indices=tensor(rows),
        seq_lens=tensor(lens),
        out_cache_loc=window_slots(setup, rows, lens, width),
        seq_lens_sum=sum(host_lens),
        seq_lens_cpu=torch.tensor(host_lens),
        positions=positions,
        spec_info=DFlashVerifyInput(torch.zeros_like(positions), positions, width),
    )


def prefill_batch(setup: Setup, rows: list[int], prefix_lens: list[int], new_lens: list[int]) -> ForwardBatch:
    spans = list(zip(rows, prefix_lens, new_lens, strict=True))
    positions = torch.cat([torch.arange(prefix, prefix + new) for _, prefix, new in spans]).to(DEVICE)
    lens = [prefix + new for _, prefix, new in spans]
    starts = tensor(new_lens).cumsum(0) - tensor(new_lens)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(rows),
        input_ids=torch.zeros_like(positions),
        req_pool_indices=tensor(rows),
        seq_lens=tensor(lens),
        out_cache_loc=torch.cat([setup.slots(row, prefix, prefix + new) for row, prefix, new in spans]),
        seq_lens_sum=sum(lens),
        seq_lens_cpu=torch.tensor(lens),
        positions=positions,
        extend_seq_lens=tensor(new_lens).int(),
        extend_prefix_lens=tensor(prefix_lens).int(),
        extend_start_loc=starts.int(),
        extend_seq_lens_cpu=new_lens,
        extend_prefix_lens_cpu=prefix_lens,
    )


def decode_batch(setup: Setup, rows: list[int], lens: list[int]) -> ForwardBatch:
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(rows),
        input_ids=tensor([0] * len(rows)),
        req_pool_indices=tensor(rows),
        seq_lens=tensor(lens) + 1,
        out_cache_loc=window_slots(setup, rows, lens, 1),
        seq_lens_sum=sum(lens) + len(lens),
        seq_lens_cpu=torch.tensor(lens) + 1,
        positions=tensor(lens),
    )


def forward(backend: Any, batch: Any, attn_type: AttentionType = AttentionType.DECODER) -> Output:
    """A forward whose metadata is ready."""
    with forward_context(ForwardContext(attn_backend=backend)):
        return Layers(attn_type)(batch.input_ids, batch.positions, batch)


def planned_forward(backend: Any, batch: ForwardBatch, attn_type: AttentionType = AttentionType.DECODER) -> Output:
    backend.init_forward_metadata(batch)
    return forward(backend, batch, attn_type)


ROWS = [4, 0, 3]
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "paged": {"page_size": 16}, "fixed": {"deterministic": True}}


@pytest.mark.parametrize("width, kind", [(1, "plain"), (4, "plain"), (FULL_WIDTH, "plain"), (4, "paged"), (4, "fixed")])
def test_verify(width, kind):
    """Windows of the full width and of others: the width comes with the batch, not from the server's arguments."""
    check(lambda setup, backend: planned_forward(backend, verify_batch(setup, ROWS, PREFIX_LENS, width)), **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_behind_a_cached_prefix(kind):
    lens = [0, 130, 64], [70, 3, 1]
    check(lambda setup, backend: planned_forward(backend, prefill_batch(setup, ROWS, *lens)), **KINDS[kind])


def test_decode():
    check(lambda setup, backend: planned_forward(backend, decode_batch(setup, ROWS, PREFIX_LENS)))


# ----------------------------------------------------------------------------------------------- the drafters' forwards


def draft_runner(setup: Setup, backend: Any, attn_type: AttentionType) -> DraftRunner:
    """Ours, over layers of attention."""
    setup.runner.model, setup.runner.attn_backend = Layers(attn_type), backend
    setup.runner.is_draft_worker = True
    return DraftRunner(None, SimpleNamespace(model_runner=setup.runner), None, None)


def rows_of(setup: Setup, rows: list[int], lens: list[int]) -> Rows:
    kv_slots = torch.stack([setup.slots(row, n - 1, n + FULL_WIDTH) for row, n in zip(rows, lens, strict=True)])
    return Rows(tensor(rows), tensor([0] * len(rows)), tensor(lens), kv_slots, HostRows(rows, lens))


def draft_block(setup: Setup, backend: Any, attn_type: AttentionType = AttentionType.ENCODER_ONLY) -> Output:
    """As `DFlashDrafter.draft`."""
    rows = rows_of(setup, ROWS, list(PREFIX_LENS))
    positions = (rows.prefix_lens[:, None] + torch.arange(FULL_WIDTH, device=DEVICE)).reshape(-1)
    block = DraftBlock(
        size=FULL_WIDTH,
        slots=rows.slots,
        input_ids=torch.zeros_like(positions),
        positions=positions,
        kv_slots=rows.kv_slots[:, 1 : 1 + FULL_WIDTH].reshape(-1),
        prefix_lens=rows.prefix_lens,
        ahead=0,
    )
    runner = draft_runner(setup, backend, attn_type)
    return runner.forward(block, runner.eager_plan(rows.host.prefix_lens))


def chain(setup: Setup, backend: Any, lag: int = 1) -> Output:
    """As `Eagle3Drafter.draft`: its first step has one entry less than there are committed positions."""
    rows = rows_of(setup, ROWS, list(PREFIX_LENS))
    runner = draft_runner(setup, backend, AttentionType.DECODER)
    outputs = []
    for step in range(4):
        entry = rows.prefix_lens - lag + step
        block = DraftBlock(
            size=1,
            slots=rows.slots,
            input_ids=torch.zeros_like(entry),
            positions=entry,
            kv_slots=rows.kv_slots[:, step].contiguous(),
            prefix_lens=entry,
            ahead=step - lag,
        )
        outputs.append(runner.forward(block, runner.eager_plan(rows.host.prefix_lens)))
    return torch.stack(outputs)


DRAFTS = {"df": draft_block, "e3": chain}


@pytest.mark.parametrize("drafter", DRAFTS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts(drafter, kind):
    check(DRAFTS[drafter], **KINDS[kind])


@pytest.mark.parametrize("drafter, change", [("df", {"attn_type": AttentionType.DECODER}), ("e3", {"lag": 0})])
def test_another_mask_or_prefix_would_be_found(drafter, change):
    """A block with causality, and steps that see one entry too many, are other outputs: the comparison can fail."""
    found, expected = (
        outcome(TritonAttnBackend, DRAFTS[drafter]),
        outcome(CpuAttentionBackend, partial(DRAFTS[drafter], **change)),
    )
    assert (found[0] - expected[0]).abs().max() > 0.1


# -------------------------------------------------------------------------------------------------------- CUDA graphs


PADDED_ROWS = 4


class Graph:
    """Metadata as SGLang's runner of CUDA graphs has it made: once in static buffers, which are refilled later.

    A replay reads the addresses that were captured, so that a forward here takes the metadata object of the capture.
    """

    def __init__(self, setup: Setup, backend: TritonAttnBackend, width: int, attn_type: AttentionType):
        self.backend, self.width, self.attn_type = backend, width, attn_type
        fill = backend.get_cuda_graph_seq_len_fill_value()
        zeros = tensor([0] * PADDED_ROWS * width)
        self.buffers = SimpleNamespace(
            batch_size=PADDED_ROWS,
            forward_mode=ForwardMode.TARGET_VERIFY,
            input_ids=zeros,
            positions=zeros.clone(),
            req_pool_indices=zeros[:PADDED_ROWS].clone(),
            seq_lens=zeros[:PADDED_ROWS] + fill,
            seq_lens_sum=PADDED_ROWS * fill,
            seq_lens_cpu=None,
            out_cache_loc=zeros.clone(),
            encoder_lens=None,
            spec_info=DFlashVerifyInput(None, None, width),
        )
        self.fill = fill
        backend.init_cuda_graph_state(PADDED_ROWS, PADDED_ROWS * width)
        backend.init_forward_metadata_out_graph(self.buffers, in_capture=True)
        self.captured = backend.forward_metadata
        forward(backend, self.buffers, attn_type)

    def replay(self, batch: ForwardBatch) -> Output:
        """The batch's rows of a replay with rows that only fill up."""
        buffers, rows, tokens = self.buffers, batch.batch_size, len(batch.positions)
        for name, count, padding in (
            ("req_pool_indices", rows, 0),
            ("seq_lens", rows, self.fill),
            ("out_cache_loc", tokens, 0),
            ("positions", tokens, 0),
        ):
            getattr(buffers, name).fill_(padding)[:count] = getattr(batch, name)
        buffers.seq_lens_sum = batch.seq_lens_sum + (PADDED_ROWS - rows) * self.fill
        buffers.spec_info = batch.spec_info
        self.backend.init_forward_metadata_out_graph(buffers)
        self.backend.forward_metadata = self.captured
        return forward(self.backend, buffers, self.attn_type)[:, :tokens]


@pytest.mark.parametrize("attn_type", [AttentionType.DECODER, AttentionType.ENCODER_ONLY], ids=["verify", "block"])
@pytest.mark.parametrize("width", [1, FULL_WIDTH])
def test_a_replayed_graph_is_the_eager_forward(width, attn_type):
    """Of other rows than were captured, twice, with an eager forward of another width between."""
    batches = [(ROWS, list(PREFIX_LENS)), ([5, 0], [40, 9])]

    def eager(setup: Setup, backend: CpuAttentionBackend) -> Output:
        made = [verify_batch(setup, *batch, width) for batch in batches]
        return torch.cat([planned_forward(backend, batch, attn_type) for batch in made], dim=1)

    def replayed(setup: Setup, backend: TritonAttnBackend) -> Output:
        graph = Graph(setup, backend, width, attn_type)
        first = graph.replay(verify_batch(setup, *batches[0], width))
        backend.init_forward_metadata(verify_batch(setup, [2], [7], 3))
        return torch.cat([first, graph.replay(verify_batch(setup, *batches[1], width))], dim=1)

    found, expected = outcome(TritonAttnBackend, replayed), outcome(CpuAttentionBackend, eager)
    for pool in (*found[1:], *expected[1:]):
        pool[0] = 0  # where padding is written to
    assert_same(found, expected)


def test_graphs_of_two_widths_need_backends_of_their_own():
    """A second runner of graphs gives the backend new buffers, and the graphs of the first one keep reading the old.

    SGLang's runners take a backend for that (`attn_backend`). Whoever captures rounds at several widths has to give
    each width one.
    """
    wide, narrow = ([4, 0], [100, 9], FULL_WIDTH), ([3], [30], 1)

    def replayed(setup: Setup, backend: TritonAttnBackend, own: bool) -> Output:
        graphs = {}
        for width in (FULL_WIDTH, 1):
            graphs[width] = Graph(setup, backend, width, AttentionType.DECODER)
            backend = TritonAttnBackend(setup.runner) if own else backend
        return torch.cat([graphs[batch[-1]].replay(verify_batch(setup, *batch)) for batch in (narrow, wide)], dim=1)

    def eager(setup: Setup, backend: CpuAttentionBackend) -> Output:
        return torch.cat([planned_forward(backend, verify_batch(setup, *batch)) for batch in (narrow, wide)], dim=1)

    expected = outcome(CpuAttentionBackend, eager)[:1]
    assert_same(outcome(TritonAttnBackend, partial(replayed, own=True))[:1], expected)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(outcome(TritonAttnBackend, partial(replayed, own=False))[:1], expected)
