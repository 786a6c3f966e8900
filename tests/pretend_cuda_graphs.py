"""SGLang's own CUDA graph runner on a CPU, with simulated graphs (`pretend_graph.py`).

    with pretend_cuda_graphs(batch_sizes=(1, 2)) as backends:
        model_runner.init_cuda_graphs()     # SGLang captures; backends[0] has the target's graphs
        model_runner.forward(batch)         # and replays them whenever it would on a GPU

    TRITON_INTERPRET=1 python -m tests.pretend_cuda_graphs --demo ...

SGLang's code and ours (`drafters/graphs.py`) run unchanged: captured batch sizes and padding, static buffers, attention
metadata inside and outside of graphs, and the choice of forwards to replay. Only calls that need CUDA are replaced. The
attention backend must support capture: SGLang's `triton`, in Triton's interpreter.

For every replay, a server appends a line with the graph's owner and the number of rows to the file in REPLAYS_FILE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.pretend_graph import PretendGraphs

BATCH_SIZES = (1, 3)
REPLAYS_FILE = "PRETENDED_REPLAYS"  # environment variable
LASTING = ExitStack()  # replacements of `install`


class ToldGraphs(PretendGraphs):
    """Graphs of a server that log their replays."""

    def __init__(self, owner: Any):
        super().__init__(owner)
        # SGLang's runner of the target's graphs, or our owner object for drafts.
        width = getattr(owner, "captured_req_width", None)
        self.name = f"drafts {type(owner.model_runner.model).__name__}" if width is None else f"width {width}"

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        if os.environ.get(REPLAYS_FILE):
            with open(os.environ[REPLAYS_FILE], "a") as file:
                print(self.name, "rows", shape_key.size, file=file)
        return super().replay(shape_key, static_forward_batch, **kwargs)


@contextmanager
def pretend_cuda_graphs(batch_sizes: Sequence[int] = BATCH_SIZES) -> Iterator[list[PretendGraphs]]:
    """Context that yields the backends of the runners created inside, in order."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_executor import model_runner as model_runners
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runners
    from sglang.srt.model_executor.runner_backend import full_cuda_graph_backend

    backends: list[PretendGraphs] = []

    def backend(runner: Any, **options: Any) -> PretendGraphs:
        backends.append(ToldGraphs(runner))
        return backends[-1]

    def graph_capture(stream: Any = None) -> Any:
        return nullcontext(SimpleNamespace(stream=stream))

    def capture(*, model_runner: Any) -> Any:
        """SGLang uses another kind of runner, or none, on a CPU."""
        runner = runners.DecodeCudaGraphRunner(model_runner)
        return cuda_graph_setup.GraphCapture(runner=runner, memory_phase="decode", memory_usage_gb=0, capture_time=0)

    def sizes(model_runner: Any, width: int = 1) -> tuple[list[int], list[int]]:
        """SGLang's default sizes would take too long, and it drops those of `--cuda-graph-bs` on a CPU."""
        return [size for size in batch_sizes if size <= model_runner.req_to_token_pool.size], []

    replaced = [
        (runners, "resolve_decode_backend", backend),
        (runners, "graph_capture", graph_capture),
        (parallel_state, "graph_capture", graph_capture),
        (full_cuda_graph_backend, "FullCudaGraphBackend", backend),
        (runners, "get_batch_sizes_to_capture", sizes),
        (cuda_graph_setup, "capture_decode_graph", capture),
        (model_runners, "capture_decode_graph", capture),
        # On a CPU, SGLang replays graphs only for plain decode steps.
        (ForwardMode, "is_cpu_graph", ForwardMode.is_cuda_graph),
    ]
    with ExitStack() as stack:
        for owner, name, new in replaced:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield backends


def install() -> None:
    """Install for a whole server: this process and its forked children."""
    from tests import interpreted_gpu

    interpreted_gpu.install()
    LASTING.enter_context(pretend_cuda_graphs())


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    from whiflash_sglang import launch_server

    launch_server.main()
