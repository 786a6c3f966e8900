"""Drafting as CUDA graphs, one for each batch size: where SGLang captures the target's forwards, and eagerly elsewhere.

A graph repeats operations on the memory that they were recorded on. So what is captured (`Propose`) is a function of
tensors alone, which stay where they are, reads nothing on the host and has one result a row: rows that only fill up a
batch are cut off behind it.

Attention has to be told of lengths and slots before each forward: it is planned. A backend that plans on the device
(triton, fa3) does it inside the graph, and a whole chain of forwards is one graph. A backend that plans on the host
(flashinfer) does it before each replay, and a graph holds one forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from whiflash_sglang.drafters.runner import DraftBlock, DraftRunner, Plan, tell_lens


class Begin(NamedTuple):
    """Where drafting begins in each row: with a token, behind cached entries."""

    slots: torch.Tensor  # [rows] int64, request slots
    tokens: torch.Tensor  # [rows] int64, the first query's
    cached: torch.Tensor  # [rows] int64, the drafter's entries before it
    kv_slots: torch.Tensor  # [rows, n] int64, of the n entries that follow
    hidden: torch.Tensor | None = None  # [rows, hidden], the first query's features, for drafters that read them


Propose = Callable[[Begin, Plan], tuple[torch.Tensor, ...]]
"""Results of [rows, ...] each, from tensors of the device only; plans attention before each forward."""

Run = Callable[[Begin, Sequence[int]], tuple[torch.Tensor, ...]]
"""The same, with `Begin.cached` as the host knows it. Results hold until the next call."""


def is_one_graph(runner: DraftRunner) -> bool:
    """Whether several forwards of a drafter may be captured as one graph, or are run one by one in any case."""
    return not runner.graph_sizes or not runner.attention.needs_cpu_seq_lens


def runs(runner: DraftRunner, propose: Propose, num_queries: int, num_entries: int, hidden_size: int = 0) -> Run:
    """How `propose` is run: chosen once. Its forwards have `num_queries` a row and fill `num_entries` in all."""
    eager = partial(_eagerly, runner, propose)
    if not runner.graph_sizes:
        return eager
    return CapturedDraft(runner, propose, eager, num_queries, num_entries, hidden_size)


def _eagerly(runner: DraftRunner, propose: Propose, begin: Begin, lens: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return propose(begin, runner.eager_plan(lens))


class CapturedDraft:
    """Graphs of `propose`, and the memory that their inputs are in."""

    def __init__(
        self, runner: DraftRunner, propose: Propose, eager: Run, num_queries: int, num_entries: int, hidden_size: int
    ):
        self.runner, self.propose, self.eager = runner, propose, eager
        self.attention = runner.attention
        self.num_queries = num_queries
        self.sizes = sorted(runner.graph_sizes)
        self.shortest: int = self.attention.get_cuda_graph_seq_len_fill_value()
        # One tensor for all whole numbers, so that one operation brings them: slot, token, cached, KV slots. KV slot 0
        # is nobody's: there go the entries of rows that only fill up.
        filler = [0, 0, self.shortest] + [0] * num_entries
        self.filler = torch.tensor(filler, dtype=torch.int64, device=runner.device)
        most = self.sizes[-1]
        self.numbers = self.filler.repeat(most, 1)  # [most, 3 + entries]
        self.hidden = None
        if hidden_size:
            dtype = runner.worker.model_runner.dtype
            self.hidden = torch.zeros(most, hidden_size, dtype=dtype, device=runner.device)
        self.attention.init_cuda_graph_state(most, most * num_queries)
        with torch.inference_mode(), capturing(runner.worker.model_runner) as self.graphs:
            for size in reversed(self.sizes):  # smaller graphs find room in the memory of the larger ones
                self.prepare(size, [self.shortest] * size, in_capture=True)
                warmed_up = self.attention.on_after_cuda_graph_warmup
                self.graphs.capture_one(ShapeKey(size), partial(self.inside, size), post_warmup_hook=warmed_up)

    def __call__(self, begin: Begin, lens: Sequence[int]) -> tuple[torch.Tensor, ...]:
        num_rows = len(lens)
        if num_rows > self.sizes[-1]:
            return self.eager(begin, lens)
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        heads = (column[:, None] for column in (begin.slots, begin.tokens, begin.cached))
        torch.cat((*heads, begin.kv_slots), dim=1, out=self.numbers[:num_rows])
        if num_rows < size:
            self.numbers[num_rows:size] = self.filler
        if self.hidden is not None:
            self.hidden[:num_rows].copy_(begin.hidden)
        if not is_one_graph(self.runner):
            self.prepare(size, [*lens, *[self.shortest] * (size - num_rows)])
        results = self.graphs.replay(ShapeKey(size), None)
        return tuple(result[:num_rows] for result in results)

    def inside(self, size: int) -> tuple[torch.Tensor, ...]:
        """What is captured."""
        return self.propose(self.begin(size), self.plan)

    def begin(self, size: int) -> Begin:
        """The inputs of a batch of `size`."""
        numbers = self.numbers[:size]
        slots, tokens, cached = (numbers[:, column].contiguous() for column in range(3))
        return Begin(slots, tokens, cached, numbers[:, 3:], None if self.hidden is None else self.hidden[:size])

    def plan(self, batch: ForwardBatch, ahead: int) -> None:
        if is_one_graph(self.runner):
            self.attention.init_forward_metadata_out_graph(batch)
        self.attention.init_forward_metadata_in_graph(batch)

    def prepare(self, size: int, lens: Sequence[int], in_capture: bool = False) -> None:
        """Plan for a batch of `size` as the host can; before a capture, so that what it binds is there."""
        begin = self.begin(size)
        kv_slots = begin.kv_slots[:, : self.num_queries].reshape(-1)  # of the first forward
        block = DraftBlock(
            size=self.num_queries,
            slots=begin.slots,
            input_ids=kv_slots,  # of these two planning looks at the number only
            positions=kv_slots,
            kv_slots=kv_slots,
            prefix_lens=begin.cached,
            ahead=0,
        )
        batch = self.runner.batch(block)
        tell_lens(batch, lens)
        self.attention.init_forward_metadata_out_graph(batch, in_capture=in_capture)


@contextmanager
def capturing(model_runner: Any) -> Iterator[Any]:
    """SGLang's own way of capturing: its pool of memory, its streams and, among ranks, its collectives."""
    from sglang.srt.distributed.parallel_state import graph_capture
    from sglang.srt.model_executor.runner.base_cuda_graph_runner import freeze_gc
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    args = model_runner.server_args
    owner = SimpleNamespace(model_runner=model_runner, device_module=torch.get_device_module(model_runner.device))
    graphs = FullCudaGraphBackend(owner, enable_memory_saver=args.enable_memory_saver)
    with (
        model_capture_mode(),
        freeze_gc(args.enable_cudagraph_gc),
        graph_capture() as context,
        graphs.capture_session(context.stream),
    ):
        yield graphs
