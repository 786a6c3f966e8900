"""Attention backends and CUDA graphs of the target, one set per verify width.

SGLang verifies a single width, which is fixed in its CUDA graphs and in some attention backends (FlashAttention). Our
rounds have several: a DFlash block, an EAGLE-3 chain, and the anchor alone without drafts. Each width gets its own
backend and graphs at startup, built as SGLang's adaptive EAGLE builds them, and they are swapped in for each verify.
Nothing is captured while serving.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from sglang.srt.runtime_context import get_context, get_spec

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner


class VerifyWidth(NamedTuple):
    """Attention backend and graphs for windows of one width."""

    attention: AttentionBackend
    graphs: DecodeCudaGraphRunner | None  # None without CUDA graphs

    @contextmanager
    def in_place(self, target_runner: ModelRunner) -> Iterator[None]:
        """Context in which the target's forwards use this width."""
        others = target_runner.attn_backend, target_runner.decode_cuda_graph_runner
        target_runner.attn_backend, target_runner.decode_cuda_graph_runner = self
        try:
            yield
        finally:
            target_runner.attn_backend, target_runner.decode_cuda_graph_runner = others


def verify_widths(target_runner: ModelRunner, widths: Iterable[int]) -> Mapping[int, VerifyWidth]:
    """Width -> backend and graphs. For the server's own width, reuses what SGLang has already created."""
    own = VerifyWidth(target_runner.attn_backend, target_runner.decode_cuda_graph_runner)
    made = {get_spec().speculative_num_draft_tokens: own}
    for width in sorted({*widths} - {*made}, reverse=True):  # smaller graphs reuse the memory of larger ones
        made[width] = _make(target_runner, width)
    return made


def graph_sizes(target_runner: ModelRunner) -> tuple[int, ...]:
    """Batch sizes of SGLang's captured graphs; empty without CUDA graphs. Drafts are captured at the same sizes."""
    graphs: DecodeCudaGraphRunner | None = target_runner.decode_cuda_graph_runner
    return () if graphs is None else tuple(graphs.capture_bs)


@contextmanager
def made_for(width: int) -> Iterator[None]:
    """Context in which SGLang creates backends and graphs for `width` queries per request."""
    with get_context().preserve_config():
        get_context().override("whiflash.width", speculative_num_draft_tokens=width)
        yield


def _make(target_runner: ModelRunner, width: int) -> VerifyWidth:
    with made_for(width):
        attention = target_runner._get_attention_backend(init_new_workspace=True)
        graphs = None
        if target_runner.decode_cuda_graph_runner is not None:
            # Lazy: not needed without CUDA graphs.
            from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

            graphs = DecodeCudaGraphRunner(target_runner, attn_backend=attention, speculative_num_draft_tokens=width)
    return VerifyWidth(attention, graphs)
