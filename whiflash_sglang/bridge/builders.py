"""Build what the worker needs from SGLang: draft runners, captured features, measurement batches, request fields."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from whiflash_sglang.bridge.algorithm import ALGORITHM, draft_input
from whiflash_sglang.core.errors import HintError
from whiflash_sglang.core.hints import Asked, parse
from whiflash_sglang.drafters.runner import DraftRunner
from whiflash_sglang.startup.checkpoints import DrafterSpec, load_drafter_spec, load_target_spec
from whiflash_sglang.startup.config import WhiFlashConfig

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
    from sglang.srt.models.qwen3 import Qwen3ForCausalLM
    from sglang.srt.server_args import ServerArgs


def drafter_specs(config: WhiFlashConfig, server_args: ServerArgs) -> dict[str, DrafterSpec]:
    """Drafter name -> spec, checked against the target. Raises CheckpointError."""
    target = load_target_spec(server_args.model_path)
    return {name: load_drafter_spec(path, name, target) for name, path in config.draft_paths.items()}


def captured_layers(specs: Iterable[DrafterSpec]) -> tuple[int, ...]:
    """Ids of the target layers to capture: the sorted union over all drafters."""
    return tuple(sorted({layer for spec in specs for layer in spec.layer_ids}))


def build_draft_runner(
    spec: DrafterSpec,
    server_args: ServerArgs,
    gpu_id: int,
    ps: ParallelState,
    nccl_port: int,
    target_worker: TpModelWorker,
) -> DraftRunner:
    """Load one drafter with SGLang's own model class and loader."""
    from sglang.srt.speculative.draft_worker_common import build_draft_tp_worker

    target_runner = target_worker.model_runner
    args = copy.deepcopy(server_args)
    # With `--dtype auto` SGLang uses the checkpoint's dtype. A drafter needs the target's, as it reads the target's
    # features and embeddings without conversion.
    dtype = str(target_runner.dtype).removeprefix("torch.")
    args.override("whiflash.drafter", speculative_draft_model_path=spec.path, dtype=dtype)
    bundle = build_draft_tp_worker(
        server_args=args,
        gpu_id=gpu_id,
        ps=replace(ps, pp_rank=0),
        nccl_port=nccl_port,
        target_model_config=target_runner.model_config,
        algo_label=ALGORITHM,
        # By default SGLang restricts drafters to GPU backends.
        attention_backend_override=None if torch.cuda.is_available() else server_args.attention_backend,
    )
    if spec.kind == "e3":
        _share_embedding(bundle.draft_model, target_runner.model)
    return DraftRunner(spec, bundle.draft_worker, target_runner.spec_algorithm, target_runner.model)


def _share_embedding(draft_model: LlamaForCausalLMEagle3, target_model: Qwen3ForCausalLM) -> None:
    """EAGLE-3 shares the target's embedding, and its head if the checkpoint has none."""
    embedding, head = target_model.get_embed_and_head()
    if draft_model.load_lm_head_from_target:
        draft_model.set_embed_and_head(embedding, head)
    else:
        draft_model.set_embed(embedding)


def capture_final_hidden_states(target_model: Qwen3ForCausalLM) -> None:
    """Make the target append its final hidden states to the captured features, in the same tensor.

    SGLang returns one or the other. Passed to its logits processor as one more captured layer, they go through
    pruning, CUDA graphs and the forward's result with the rest.
    """

    def append(processor: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        input_ids, hidden, head, metadata, captured, *rest = args
        if captured is None:
            return None
        packed = isinstance(captured, torch.Tensor)
        captured = torch.cat([captured, hidden], dim=-1) if packed else [*captured, hidden]
        return (input_ids, hidden, head, metadata, captured, *rest), kwargs

    target_model.logits_processor.register_forward_pre_hook(append, with_kwargs=True)


def dummy_batch(
    target_worker: TpModelWorker, kv_table: torch.Tensor, num_rows: int, context: int, width: int
) -> ScheduleBatch:
    """A dummy decode batch for timing rounds: `num_rows` requests with `context` committed tokens each.

    Call it only while no request holds a KV slot. Rows use disjoint slots as long as the pool suffices, because shared
    slots would hit the processor's cache and run faster.
    """
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner = target_worker.model_runner
    device = kv_table.device
    windows = num_rows * width
    places = torch.arange(num_rows * context, dtype=kv_table.dtype, device=device)
    behind = places % (runner.max_total_num_tokens - windows - 1) + windows + 1  # slot 0 is reserved
    window = torch.arange(1, windows + 1, dtype=kv_table.dtype, device=device)
    kv_table[:num_rows, :context] = behind.view(num_rows, context)
    kv_table[:num_rows, context : context + width] = window.view(num_rows, width)
    requests = [Req(f"dummy-{row}", "", [0], SamplingParams(temperature=0)) for row in range(num_rows)]
    for row, request in enumerate(requests):
        request.req_pool_idx = row
    batch = ScheduleBatch(reqs=requests, model_config=runner.model_config, device=device)
    batch.spec_algorithm = runner.spec_algorithm
    batch.forward_mode = ForwardMode.DECODE
    batch.req_pool_indices = torch.arange(num_rows, device=device)
    batch.seq_lens_cpu = torch.full((num_rows,), context, dtype=torch.int64)
    batch.seq_lens = batch.seq_lens_cpu.to(device)
    batch.seq_lens_sum = num_rows * context
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, runner.model_config.vocab_size)
    batch.spec_info = draft_input(torch.zeros(num_rows, dtype=torch.int64, device=device), batch.seq_lens)
    return batch


def prompt_token(request: Req, position: int) -> int | None:
    """The token of a request's text at `position`, or None if it is still being sampled."""
    prompt = request.origin_input_ids
    if position < len(prompt):
        return int(prompt[position])
    position -= len(prompt)
    return int(request.output_ids[position]) if position < len(request.output_ids) else None


def asked(request: Req, config: WhiFlashConfig) -> Asked:
    """A request's hints and context; empty if its hints are invalid and it is about to be rejected."""
    try:
        return parse(request.sampling_params.custom_params, config.drafter_names)
    except HintError:
        return Asked()


def metric_labels(server_args: ServerArgs) -> dict[str, str]:
    """Prometheus labels that identify this server, named as SGLang names them."""
    return {"model_name": server_args.served_model_name, "engine_type": "unified"}
