"""Drafting with CUDA graphs, one per batch size, if SGLang captures the target's forwards; eager otherwise.

A graph replays operations on fixed memory. The captured function (`Propose`) therefore depends on static tensors only,
reads nothing on the host, and returns one result per row; results of padding rows are dropped.

Attention must be planned (lengths, slots) before each forward. Backends that plan on the device (triton, fa3) do so
inside the graph, so a whole chain of forwards is one graph. Backends that plan on the host (flashinfer) do so before
each replay, so a graph holds one forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from whiflash_sglang.drafters.runner import DraftBlock, DraftRunner, Plan, tell_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend


class Begin(NamedTuple):
    """Where drafting begins in each row: a token after the drafter's cached entries."""

    slots: torch.Tensor  # [rows] int64, request slots
    tokens: torch.Tensor  # [rows] int64, the first query's token
    cached: torch.Tensor  # [rows] int64, number of cached entries before it
    kv_slots: torch.Tensor  # [rows, n] int64, KV slots of the next n entries
    hidden: torch.Tensor | None = None  # [rows, hidden], the first query's features (EAGLE-3)


Propose = Callable[[Begin, Plan], tuple[torch.Tensor, ...]]
"""Returns tensors of [rows, ...] from device tensors only; plans attention before each forward."""

Run = Callable[[Begin, Sequence[int]], tuple[torch.Tensor, ...]]
"""Like `Propose`, with the host's copy of `Begin.cached`. Results are valid until the next call."""


def is_one_graph(runner: DraftRunner) -> bool:
    """Whether one `propose` may run several forwards: they fit into one graph, or run eagerly."""
    return not runner.graph_sizes or not runner.attention.needs_cpu_seq_lens


def runs(runner: DraftRunner, propose: Propose, num_queries: int, num_entries: int, hidden_size: int = 0) -> Run:
    """Wrap `propose` to run eagerly or as a graph. Its forwards have `num_queries` per row and write `num_entries`
    entries in total."""
    eager = partial(_eagerly, runner, propose)
    if not runner.graph_sizes:
        return eager
    return CapturedDraft(runner, propose, eager, num_queries, num_entries, hidden_size)


def _eagerly(runner: DraftRunner, propose: Propose, begin: Begin, lens: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return propose(begin, runner.eager_plan(lens))


class CapturedDraft:
    """Graphs of `propose` and their static inputs. Larger batches run eagerly."""

    def __init__(
        self, runner: DraftRunner, propose: Propose, eager: Run, num_queries: int, num_entries: int, hidden_size: int
    ):
        self.runner, self.propose, self.eager = runner, propose, eager
        self.attention = runner.attention
        self.num_queries = num_queries
        self.sizes = sorted(runner.graph_sizes)
        self.shortest: int = self.attention.get_cuda_graph_seq_len_fill_value()
        # All integers are in one tensor, updated by one operation: slot, token, cached, KV slots. Padding rows write
        # to KV slot 0, which is reserved.
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
            for size in reversed(self.sizes):  # smaller graphs reuse the memory of larger ones
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
        """The captured function."""
        return self.propose(self.begin(size), self.plan)

    def begin(self, size: int) -> Begin:
        """The static inputs for a batch of `size`."""
        numbers = self.numbers[:size]
        slots, tokens, cached = (numbers[:, column].contiguous() for column in range(3))
        return Begin(slots, tokens, cached, numbers[:, 3:], None if self.hidden is None else self.hidden[:size])

    def plan(self, batch: ForwardBatch, ahead: int) -> None:
        """Plan attention inside a graph."""
        if is_one_graph(self.runner):
            self.attention.init_forward_metadata_out_graph(batch)
        self.attention.init_forward_metadata_in_graph(batch)

    def prepare(self, size: int, lens: Sequence[int], in_capture: bool = False) -> None:
        """Plan attention on the host for a batch of `size`; also needed before a capture, to bind its buffers."""
        begin = self.begin(size)
        kv_slots = begin.kv_slots[:, : self.num_queries].reshape(-1)  # of the first forward
        block = DraftBlock(
            size=self.num_queries,
            slots=begin.slots,
            input_ids=kv_slots,  # planning reads only the length of these two
            positions=kv_slots,
            kv_slots=kv_slots,
            prefix_lens=begin.cached,
            ahead=0,
        )
        batch = self.runner.batch(block)
        tell_lens(batch, lens)
        self.attention.init_forward_metadata_out_graph(batch, in_capture=in_capture)


@contextmanager
def capturing(model_runner: ModelRunner) -> Iterator[FullCudaGraphBackend]:
    """SGLang's capture context: its memory pool, streams and, with ranks, collectives."""
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
