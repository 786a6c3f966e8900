"""What our names for SGLang's objects stand for: the part of the contract that cannot be read from the code.

One word stands for one idea, so that most names hold in every file. Where one does not:

    "batch"                                    everywhere
    "drafters/dflash.py:self.runner.model"     in one file
    "bridge/http_hooks.py:_keep_finished.batch"             in one function
    "DraftRunner.worker"                       an attribute of one of our own classes

"-" is nothing of SGLang's, "[...]" many of something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NOTHING = "-"


@dataclass(frozen=True)
class Words:
    names: Mapping[str, str] = field(default_factory=dict)  # what our names stand for
    values: Mapping[str, str] = field(default_factory=dict)  # attributes that neither SGLang nor we annotate
    results: Mapping[str, str] = field(default_factory=dict)  # what calls give, where SGLang does not annotate it
    foreign: frozenset[str] = frozenset()  # attributes that base classes of other packages bring
    by_name: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # our file: what it reaches by strings
    mentions: tuple[tuple[str, str, str], ...] = ()  # our file, SGLang's module, a word that both hold
    assembled: Mapping[str, str] = field(default_factory=dict)  # classes put together at run time: of what
    flag_files: tuple[str, ...] = ()  # our files that name SGLang's command line flags
    flag_module: str = ""  # where SGLang defines them
    own_flags: str = ""  # those that are not SGLang's, as a pattern


SRT = "sglang.srt"
SCHEDULE = f"{SRT}.managers.schedule_batch"
SAMPLING = f"{SRT}.sampling"
IO = f"{SRT}.managers.io_struct"
SERVER_ARGS = f"{SRT}.server_args.ServerArgs"
WORKER = f"{SRT}.managers.tp_worker.TpModelWorker"
RUNNER = f"{SRT}.model_executor.model_runner.ModelRunner"
TARGET = f"{SRT}.models.qwen3.Qwen3ForCausalLM"  # stands for all targets
DECODE_GRAPHS = f"{SRT}.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
DFLASH = f"{SRT}.models.dflash"
EAGLE = f"{SRT}.models.llama_eagle3"
ROTARY = f"{SRT}.layers.rotary_embedding.base.RotaryEmbedding"
NORM = f"{SRT}.layers.layernorm.RMSNorm"
POOL = f"{SRT}.mem_cache.memory_pool"
REASONING = f"{SRT}.parser.reasoning_parser"
DRAFT_INPUT = f"{SRT}.speculative.dflash_info_v2.DFlashDraftInputV2"
TOKENIZER_MANAGER = f"{SRT}.managers.tokenizer_manager.TokenizerManager"

CONTRACT = Words(
    names={
        "batch": f"{SCHEDULE}.ScheduleBatch",
        "request": f"{SCHEDULE}.Req",
        "sampling": f"{SAMPLING}.sampling_batch_info.SamplingBatchInfo",
        "params": f"{SAMPLING}.sampling_params.SamplingParams",
        "server_args": SERVER_ARGS,
        "worker": WORKER,
        "target_worker": WORKER,
        "target_runner": RUNNER,
        "target_model": TARGET,
        "manager": TOKENIZER_MANAGER,
        "scheduler": f"{SRT}.managers.scheduler.Scheduler",
        "serving": f"{SRT}.entrypoints.openai.serving_chat.OpenAIServingChat",
        "ps": f"{SRT}.distributed.parallel_state_wrapper.ParallelState",
        "req_to_token_pool": f"{POOL}.ReqToTokenPool",
        # Passed on as they are.
        **dict.fromkeys(("memory_pool_config", "token_to_kv_pool_allocator"), NOTHING),
        **dict.fromkeys(("on_publish", "grammar_barrier", "original"), NOTHING),
        # Of other packages, or our own.
        **dict.fromkeys(("tokenizer", "finished", "value"), NOTHING),
        "core/spans.py:_called_tool.output": NOTHING,
        **dict.fromkeys(("receive", "send"), NOTHING),  # of ASGI
        "bridge/http_hooks.py:_each_its_own.logprobs": NOTHING,
        "bridge/http_hooks.py:_is_ending.http_server": NOTHING,  # a module, which http_hooks.py imports itself
        # Groups of torch.distributed.
        **dict.fromkeys(("device_group", "host_group"), NOTHING),
        "recv_req": f"{IO}.UpdateWeightFromDiskReqInput",
        "serving/batches.py:batch_result.logprobs": f"{SRT}.layers.logits_processor.LogitsProcessorOutput",
        # Hooks: the result of what is hooked, and what it is called with.
        "bridge/scheduler_hooks.py:_add_figures.worker": NOTHING,  # our own
        "bridge/scheduler_hooks.py:_add_figures.result": f"{IO}.GetInternalStateReqOutput",
        "bridge/scheduler_hooks.py:_judge_custom_params.result": NOTHING,
        "bridge/scheduler_hooks.py:_bigram_keys.context": f"{SRT}.mem_cache.registry.TreeCacheBuildContext",
        "bridge/scheduler_hooks.py:_capture_union.model_config": f"{SRT}.configs.model_config.ModelConfig",
        "bridge/scheduler_hooks.py:_capture_union.spec_algorithm": NOTHING,
        "bridge/scheduler_hooks.py:_keep_raw_logits.logits_output": (
            f"{SRT}.layers.logits_processor.LogitsProcessorOutput"
        ),
        "bridge/scheduler_hooks.py:_keep_raw_logits.forward_batch": NOTHING,  # not looked at
        "bridge/scheduler_hooks.py:_tried_attention.model_config": NOTHING,  # passed on as it is
        **dict.fromkeys(
            ("bridge/memory_checks.py:check_memory.requests", "bridge/memory_checks.py:memory_needs.requests"),
            f"{POOL}.ReqToTokenPool",
        ),
        "bridge/http_hooks.py:_keep_finished.batch": f"{IO}.BatchStrOutput",
        "bridge/http_hooks.py:_tell_context.request": f"{SRT}.entrypoints.openai.protocol.ChatCompletionRequest",
        "bridge/http_hooks.py:_judge_samples.asked": f"{IO}.GenerateReqInput",
        "bridge/http_hooks.py:_judge_names.asked": f"{IO}.GenerateReqInput",
        "bridge/http_hooks.py:_hand_on_custom_params.asked": f"{IO}.GenerateReqInput",
        "bridge/http_hooks.py:_keep_custom_params.asked": NOTHING,  # passed on as it is
        "raw_request": NOTHING,  # of Starlette
        "bridge/http_hooks.py:_judge_request.sent": NOTHING,  # one of several kinds, told apart there
        "bridge/http_hooks.py:_judge_request.request": f"{IO}.TokenizedGenerateReqInput",
        "bridge/http_hooks.py:_tell_context.params": NOTHING,  # a dict
        "bridge/http_hooks.py:_tell_context.adapted": f"{IO}.GenerateReqInput",
        # The drafters' models as SGLang loads them.
        "bridge/builders.py:_share_embedding.draft_model": f"{EAGLE}.LlamaForCausalLMEagle3",
        "model_runner": RUNNER,
        "drafters/fused.py:lacking.pool": f"{POOL}.MHATokenToKVPool",
        "drafters/fused.py:lacking.rotary": ROTARY,
        "drafters/runner.py:self.model": f"{DFLASH}.DFlashDraftModel",
        "drafters/dflash.py:runner.model": f"{DFLASH}.DFlashDraftModel",
        **dict.fromkeys(
            ("drafters/eagle3.py:runner.model", "drafters/eagle3.py:self.runner.model"),
            f"{EAGLE}.LlamaForCausalLMEagle3",
        ),
    },
    values={
        "KVProjection.layers": f"[{DFLASH}.DFlashAttention]",  # or of EAGLE-3, in the same words
        "KVProjection.norms": f"[{NORM}]",
        "DraftRunner.worker": WORKER,
        "VerifyWidth.attention": f"{SRT}.layers.attention.base_attn_backend.AttentionBackend",
        "VerifyWidth.graphs": DECODE_GRAPHS,
        f"{RUNNER}.decode_cuda_graph_runner": DECODE_GRAPHS,
        "DraftRunner.algorithm": NOTHING,
        "DraftRunner.target_model": TARGET,
        f"{TARGET}.lm_head": f"{SRT}.layers.vocab_parallel_embedding.ParallelLMHead",
        f"{WORKER}.model_config": f"{SRT}.configs.model_config.ModelConfig",
        f"{WORKER}.tokenizer": NOTHING,
        f"{RUNNER}.token_to_kv_pool": f"{POOL}.MHATokenToKVPool",
        f"{RUNNER}.attn_backend": f"{SRT}.layers.attention.base_attn_backend.AttentionBackend",
        f"{RUNNER}.kv_cache_dtype": NOTHING,  # torch's
        f"{RUNNER}.sampler": f"{SRT}.layers.sampler.Sampler",
        f"{POOL}.ReqToTokenPool.req_to_token": NOTHING,
        f"{SCHEDULE}.ScheduleBatch.spec_info": DRAFT_INPUT,
        f"{SRT}.managers.scheduler.Scheduler.draft_worker": NOTHING,  # our worker
        f"{SRT}.entrypoints.http_server.app": NOTHING,
        f"{SRT}.entrypoints.http_server._GlobalState.tokenizer_manager": TOKENIZER_MANAGER,
        f"{SRT}.function_call.function_call_parser.FunctionCallParser.detector": NOTHING,  # see mentions
        f"{REASONING}.ReasoningParser.detector": f"{REASONING}.BaseReasoningFormatDetector",
        f"{SCHEDULE}.Req.output_ids": NOTHING,
        f"{SCHEDULE}.Req.tokenizer": NOTHING,
        f"{SCHEDULE}.Req.kv_committed_len": NOTHING,
        f"{RUNNER}.dtype": NOTHING,  # torch's
        f"{TOKENIZER_MANAGER}.model_config": f"{SRT}.configs.model_config.ModelConfig",
        f"{SRT}.layers.vocab_parallel_embedding.ParallelLMHead.shard_indices": (
            f"{SRT}.layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices"
        ),
        f"{NORM}.weight": NOTHING,
        f"{SRT}.layers.vocab_parallel_embedding.ParallelLMHead.weight": NOTHING,
        f"{DFLASH}.DFlashAttention.rotary_emb": ROTARY,
        f"{SRT}.models.llama.LlamaAttention.rotary_emb": ROTARY,
        f"{DFLASH}.DFlashDraftModel.fc": NOTHING,
        f"{DFLASH}.DFlashDraftModel.layers": f"[{DFLASH}.DFlashDecoderLayer]",
        f"{EAGLE}.LlamaForCausalLMEagle3.hot_token_id": NOTHING,
        f"{EAGLE}.LlamaModel.fc": NOTHING,
        f"{EAGLE}.LlamaModel.layers": f"[{EAGLE}.LlamaDecoderLayer]",
        f"{DFLASH}.DFlashDecoderLayer.self_attn": f"{DFLASH}.DFlashAttention",
    },
    # A namespace of values of the same names, filled at run time.
    results={f"{SRT}.runtime_context.get_spec": SERVER_ARGS},
    foreign=frozenset({"value", "__dict__", "register_forward_pre_hook"}),
    by_name={
        "serving/verifier.py": tuple(
            f"{SAMPLING}.sampling_batch_info.SamplingBatchInfo.{name}"
            for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")
        ),
        "bridge/algorithm.py": (f"{SRT}.environ.Envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",),
        "bridge/builders.py": (
            f"{SERVER_ARGS}.speculative_draft_model_path",
            # Its arguments are taken by position; the name is part of register_forward_pre_hook's.
            f"{SRT}.layers.logits_processor.LogitsProcessor.forward",
        ),
        "bridge/http_hooks.py": (
            *(
                f"{IO}.BatchTokenIDOutput.{name}"
                for name in ("rids", "finished_reasons", "prompt_tokens", "completion_tokens", "cached_tokens")
            ),
            f"{IO}.BatchTokenIDOutput.retraction_counts",
            f"{IO}.BatchTokenIDOutput.customized_info",
        ),
        "drafters/runner.py": (f"{EAGLE}.LlamaForCausalLMEagle3.forward",),
        "cpu/platform.py": tuple(
            f"{SRT}.environ.Envs.{name}"
            for name in ("SGLANG_ENABLE_TORCH_INFERENCE_MODE", "SGLANG_EAGER_INPUT_NO_COPY")
        ),
    },
    mentions=(
        # What SGLang calls on our objects without a base class that says so.
        ("bridge/algorithm.py", f"{SRT}.managers.overlap_utils", "need_topk"),
        ("bridge/algorithm.py", f"{SRT}.managers.scheduler", "carries_draft_hidden_states"),
        ("bridge/algorithm.py", f"{SRT}.managers.scheduler", "create_future_map"),
        ("serving/worker.py", f"{SRT}.managers.scheduler", "forward_batch_generation"),
        (
            "serving/worker.py",
            f"{SRT}.managers.scheduler_components.batch_result_processor",
            "prepare_for_kv_cache_release",
        ),
        ("bridge/http_hooks.py", f"{SRT}.managers.tokenizer_control_mixin", "get_internal_state_communicator"),
        # The entry points in pyproject.toml.
        ("plugin.py", f"{SRT}.plugins", "sglang.srt.plugins"),
        ("cpu/__init__.py", f"{SRT}.plugins", "sglang.srt.platforms"),
        # The names that detectors of tool calls give to their markers.
        *(
            ("bridge/markers.py", f"{SRT}.function_call.{module}", word)
            for module, word in (
                ("hermes_detector", "bot_token"),
                ("hermes_detector", "eot_token"),
                ("minimax_m2", "tool_call_start_token"),
                ("minimax_m2", "tool_call_end_token"),
            )
        ),
    ),
    # Since 0.5.20 the fields are declared there.
    assembled={SERVER_ARGS: f"{SRT}.arg_groups.fields"},
    flag_files=(
        "launch_server.py",
        *(f"startup/{name}.py" for name in ("config", "checkpoints", "demo", "model_checks")),
    ),
    flag_module=f"{SRT}.server_args",
    own_flags=r"--whiflash.*|--demo|--help|--spec",
)
