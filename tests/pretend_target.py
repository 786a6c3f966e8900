"""SGLang's target worker for a tiny model in this process, with simulated CUDA graphs, and checks of both.

    TRITON_INTERPRET=1 python -m tests.pretend_target FOLDER

Initialized like in the scheduler: launcher flags, plugins, configuration, pools, attention, graphs. This modifies
SGLang for the whole process, so tests run it in a separate one (`unit/test_pretend_cuda_graphs.py`).
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.pretend_cuda_graphs import pretend_cuda_graphs
from tests.pretend_graph import CaptureError

CONTEXT = 128
FLAGS = ("--dtype=float32", f"--context-length={CONTEXT}", "--max-total-tokens=512", "--max-running-requests=3")
BATCH_SIZES = (1, 3)


def target_worker(folder: Path) -> Any:
    """The target worker, without graphs."""
    from tests import interpreted_gpu

    interpreted_gpu.install()

    from tests.tiny_models import build
    from whiflash_sglang.launch_server import build_argv

    models = build(folder)
    drafters = ("--speculative-draft-model-path", str(models.dflash), "--whiflash-eagle-draft", str(models.eagle3))
    config, argv = build_argv(["--model-path", str(models.target), *drafters, *FLAGS])
    config.to_environ(os.environ)

    from sglang.srt.plugins import load_plugins

    load_plugins()

    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(list(argv))
    publish(server_args, role="scheduler")
    one = ("tp", "pp", "dp", "attn_tp", "attn_cp", "attn_dp", "moe_ep", "moe_dp")
    sizes = {f"{name}_size": 1 for name in one} | {f"{name}_rank": 0 for name in one} | {"dcp_size": 1}
    ps = ParallelState(**sizes, gpu_id=0)
    worker = TpModelWorker(server_args=server_args, gpu_id=0, ps=ps, nccl_port=PortArgs.init_new(server_args).nccl_port)
    worker.alloc_memory_pool()
    worker.init_attention_backends()
    return worker


class Requests:
    """A batch of rows with random KV entries, and the outcome of a forward on their next tokens."""

    def __init__(self, runner: Any, prefix_lens: list[int], width: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.runner, self.width, self.prefix_lens = runner, width, torch.tensor(prefix_lens)
        table = runner.req_to_token_pool.req_to_token
        rows = len(prefix_lens)
        slots = 1 + torch.randperm(rows * CONTEXT, generator=generator).view(rows, CONTEXT)
        self.rows = 1 + torch.randperm(len(table) - 1, generator=generator)[:rows]
        table[self.rows, :CONTEXT] = slots.to(table.dtype)
        for buffer in self.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        self.tokens = torch.randint(8, 500, (rows, width), generator=generator)
        self.positions = self.prefix_lens[:, None] + torch.arange(width)
        self.slots = slots.gather(1, self.positions).reshape(-1)

    def buffers(self) -> list[torch.Tensor]:
        pool = self.runner.token_to_kv_pool
        return [*pool.k_buffer, *pool.v_buffer]

    def batch(self) -> Any:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
        from sglang.srt.speculative.dflash_info import DFlashVerifyInput

        tokens, positions = self.tokens.reshape(-1), self.positions.reshape(-1)
        info = DFlashVerifyInput(tokens, positions, self.width, capture_hidden_mode=CaptureHiddenMode.FULL)
        lens = self.prefix_lens + self.width
        return ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(self.rows),
            input_ids=tokens,
            req_pool_indices=self.rows,
            seq_lens=self.prefix_lens,
            out_cache_loc=self.slots,
            seq_lens_sum=int(lens.sum()),
            seq_lens_cpu=lens,
            positions=positions,
            spec_algorithm=self.runner.spec_algorithm,
            spec_info=info,
            capture_hidden_mode=CaptureHiddenMode.FULL,
        )

    def outcome(self) -> dict[str, torch.Tensor]:
        """Results of one forward and its KV entries; the pools are restored afterwards."""
        before = [buffer.clone() for buffer in self.buffers()]
        output = self.runner.forward(self.batch()).logits_output
        found = {"logits": output.next_token_logits.clone(), "hidden": output.hidden_states.clone()}
        found["entries"] = torch.stack([buffer[self.slots] for buffer in self.buffers()])
        for buffer, was in zip(self.buffers(), before, strict=True):
            buffer.copy_(was)
        return found


def eagerly(requests: Requests) -> dict[str, torch.Tensor]:
    runner = requests.runner
    graphs, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, None
    try:
        return requests.outcome()
    finally:
        runner.decode_cuda_graph_runner = graphs


def check(runner: Any, backend: Any, width: int) -> None:
    """Replays equal eager forwards, for captured batch sizes and for a padded batch; a narrower window is not
    replayed."""
    for seed, (prefix_lens, replayed) in enumerate([([5], 1), ([70], 1), ([3, 40], 3), ([64, 1, 90], 3)]):
        requests = Requests(runner, prefix_lens, width, seed)
        expected = eagerly(requests)
        del backend.replays[:]
        found = requests.outcome()
        assert [key.size for key in backend.replays] == [replayed], backend.replays
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
            )
        print(f"rows {len(prefix_lens)}: replayed as {replayed}", flush=True)
    del backend.replays[:]
    Requests(runner, [9], width - 1, seed=0).outcome()
    assert backend.replays == []


def check_stale_inputs(runner: Any, width: int) -> None:
    """The comparison detects a graph that reads the previous batch's inputs."""
    Requests(runner, [5], width, seed=1).outcome()
    requests = Requests(runner, [20], width, seed=2)
    expected = eagerly(requests)
    registry = runner.decode_cuda_graph_runner.buffer_registry
    with mock.patch.object(type(registry), "fill_from", lambda *args, **kwargs: None):
        found = requests.outcome()
    assert not torch.allclose(found["logits"], expected["logits"], rtol=1e-2, atol=1e-2)


def check_second_width(runner: Any, width: int) -> None:
    """A second runner on the same attention backend replaces its buffers. The first runner's graphs then read stale or
    freed buffers."""
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runners

    first = runner.decode_cuda_graph_runner
    second = runners.DecodeCudaGraphRunner(runner, speculative_num_draft_tokens=width)
    assert second.captured_req_width == width
    gc.collect()
    requests = Requests(runner, [50], first.captured_req_width, seed=3)
    expected = eagerly(requests)["logits"]
    try:
        is_right = torch.allclose(requests.outcome()["logits"], expected, rtol=1e-2, atol=1e-2)
    except CaptureError as error:
        print(f"first width after the second: {error}", flush=True)
    else:
        print(f"first width after the second: {'right' if is_right else 'wrong'}", flush=True)
        assert not is_right


def main(folder: Path) -> None:
    worker = target_worker(folder)
    runner = worker.model_runner
    with torch.inference_mode(), pretend_cuda_graphs(BATCH_SIZES) as backends:
        worker.init_cuda_graphs()
        (backend,) = backends
        assert sorted(key.size for key in backend.graphs) == [*BATCH_SIZES]
        width = runner.decode_cuda_graph_runner.captured_req_width
        check(runner, backend, width)
        check_stale_inputs(runner, width)
        check_second_width(runner, width - 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
