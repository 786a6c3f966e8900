"""Verify widths: what SGLang's target needs to verify windows of each width that rounds have.

SGLang verifies windows of one width, which its attention backends may have fixed when they were made (FlashAttention
does) and its CUDA graphs have in any case. Rounds have several: of a DFlash block, of an EAGLE-3 chain, and of the
anchor alone where nobody drafts. So each gets an attention backend and a family of graphs of its own at start, made as
SGLang's adaptive EAGLE makes them, and is put in place while a window of that width is verified. Nothing is captured
while requests are served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from sglang.srt.runtime_context import get_context, get_spec


class VerifyWidth(NamedTuple):
    """What windows of one width are verified with."""

    attention: Any  # AttentionBackend
    graphs: Any  # DecodeCudaGraphRunner; None where SGLang captures none

    @contextmanager
    def in_place(self, target_runner: Any) -> Iterator[None]:
        """While this lasts, the target's forwards are those of this width."""
        others = target_runner.attn_backend, target_runner.decode_cuda_graph_runner
        target_runner.attn_backend, target_runner.decode_cuda_graph_runner = self
        try:
            yield
        finally:
            target_runner.attn_backend, target_runner.decode_cuda_graph_runner = others


def verify_widths(target_runner: Any, widths: Iterable[int]) -> Mapping[int, VerifyWidth]:
    """By width. Of the one that the server was started with, what SGLang has made already."""
    own = VerifyWidth(target_runner.attn_backend, target_runner.decode_cuda_graph_runner)
    made = {get_spec().speculative_num_draft_tokens: own}
    for width in sorted({*widths} - {*made}, reverse=True):  # smaller ones find room in the larger ones' memory
        made[width] = _make(target_runner, width)
    return made


def graph_sizes(target_runner: Any) -> tuple[int, ...]:
    """Batch sizes that SGLang has captured the target's windows at; drafts are captured at the same."""
    graphs = target_runner.decode_cuda_graph_runner
    return () if graphs is None else tuple(graphs.capture_bs)


@contextmanager
def made_for(width: int) -> Iterator[None]:
    """What SGLang makes while this lasts, it makes for forwards of `width` queries a request."""
    with get_context().preserve_config():
        get_context().override("whiflash.width", speculative_num_draft_tokens=width)
        yield


def _make(target_runner: Any, width: int) -> VerifyWidth:
    with made_for(width):
        attention = target_runner._get_attention_backend(init_new_workspace=True)
        graphs = None
        if target_runner.decode_cuda_graph_runner is not None:
            # Here, as it imports what a server without graphs never needs.
            from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

            graphs = DecodeCudaGraphRunner(target_runner, attn_backend=attention, speculative_num_draft_tokens=width)
    return VerifyWidth(attention, graphs)
