"""Shared by both drafters: a draft model loaded by SGLang, its KV pool and its forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.dflash_info import DFlashVerifyInput

from whiflash_sglang.startup.checkpoints import DrafterSpec

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.linear import QKVParallelLinear
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.models.qwen3 import Qwen3ForCausalLM
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

Plan = Callable[[ForwardBatch, int], None]
"""Plans attention for a forward. The int is the number of entries cached since drafting began."""


class DraftRunner(NamedTuple):
    """A draft model in SGLang, and the target model that it borrows parts of."""

    spec: DrafterSpec
    worker: TpModelWorker
    algorithm: CustomSpecAlgo
    target_model: Qwen3ForCausalLM
    graph_sizes: tuple[int, ...] = ()  # batch sizes to capture drafts at; empty: run eagerly

    @property
    def model(self) -> Any:
        """The draft model."""
        return self.worker.model_runner.model

    @property
    def attention(self) -> AttentionBackend:
        """The draft model's attention backend."""
        return self.worker.model_runner.attn_backend

    @property
    def device(self) -> torch.device:
        """The draft model's device."""
        return torch.device(self.worker.model_runner.device)

    def forward(self, block: DraftBlock, plan: Plan) -> LogitsProcessorOutput:
        """Run the draft model on a block of queries per row. Returns a LogitsProcessorOutput, flat over rows.

        The queries see the row's first `block.prefix_lens` entries and the block (causal or not, depending on the
        model). Their own KV is written to `block.kv_slots`.
        """
        batch = self.batch(block)
        plan(batch, block.ahead)
        # Bypass `ModelRunner.forward`, whose overhead (hooks for experts, profilers, input buffers) would take half
        # the time of a one-layer forward.
        with forward_context(ForwardContext(attn_backend=self.attention)):
            return self.model(block.input_ids, block.positions, batch, input_embeds=block.input_embeds)

    def batch(self, block: DraftBlock) -> ForwardBatch:
        """Convert a block to SGLang's ForwardBatch, without host lengths (see `tell_lens`)."""
        # All attention backends support this mode: a few queries after a cached prefix.
        return ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(block.slots),
            input_ids=block.input_ids,
            req_pool_indices=block.slots,
            seq_lens=block.prefix_lens,
            out_cache_loc=block.kv_slots,
            seq_lens_sum=None,
            positions=block.positions,
            spec_algorithm=self.algorithm,
            spec_info=BlockInfo(block.input_ids, block.positions, block.size, hidden_states=block.hidden_states),
            capture_hidden_mode=CaptureHiddenMode.FULL,
        )

    def eager_plan(self, lens: Sequence[int]) -> Plan:
        """A plan for eager forwards; `lens` [rows]: entries cached before drafting."""

        def plan(batch: ForwardBatch, ahead: int) -> None:
            tell_lens(batch, [length + ahead for length in lens])
            self.attention.init_forward_metadata(batch)

        return plan

    def write_kv(self, attention: RadixAttention, kv_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store K and V [n, kv_heads * head_dim] of one layer at `kv_slots` [n]."""
        shape = (-1, attention.tp_k_head_num, attention.head_dim)
        pool: MHATokenToKVPool = self.worker.model_runner.token_to_kv_pool
        pool.set_kv_buffer(attention, kv_slots, k.view(shape), v.view(shape), attention.k_scale, attention.v_scale)


def tell_lens(batch: ForwardBatch, lens: Sequence[int]) -> None:
    """Set the prefix lengths [rows] on the host, for attention backends that plan there."""
    batch.seq_lens_cpu = torch.tensor(lens, dtype=torch.int64)
    batch.seq_lens_sum = sum(lens)


HEAD_ROWS = 1024  # 48 rows with blocks of 16 need 720; their logits take 0.3 GB with a vocabulary of 152k


class TargetHead:
    """The target's LM head for drafters without one: greedy tokens from hidden states.

    With tensor parallelism each rank holds the rows of consecutive tokens, starting at `first`. The highest logit over
    all ranks wins; ties go to the lowest token id, as without ranks. Raises ValueError if a rank would hold no tokens.
    """

    def __init__(self, target_model: Qwen3ForCausalLM, vocab_size: int):
        head: ParallelLMHead = target_model.lm_head
        self.group = get_tp_group()
        self.first = head.shard_indices.org_vocab_start_index
        num_rows = min(head.shard_indices.org_vocab_end_index, vocab_size) - self.first  # without padding rows
        if num_rows < 1:
            size, fix = self.group.world_size, "use a smaller --tp-size"
            raise ValueError(f"--tp-size {size}: a rank would hold none of the head's {vocab_size} tokens; {fix}")
        self.weight = head.weight[:num_rows]

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        """Token ids [...] for hidden states [..., hidden], computed in chunks of `HEAD_ROWS`."""
        if hidden[..., 0].numel() > HEAD_ROWS:
            parts = hidden.reshape(-1, hidden.shape[-1]).split(HEAD_ROWS)
            return torch.cat([self.best(part) for part in parts]).view(hidden.shape[:-1])
        logits = project(hidden.to(self.weight.dtype), self.weight)
        if self.group.world_size == 1:
            return logits.argmax(dim=-1)
        values, tokens = logits.max(dim=-1)
        values = self.group.all_gather(values[None], dim=0)  # [ranks, ...]
        tokens = self.group.all_gather((tokens + self.first)[None], dim=0)
        return tokens.gather(0, values.argmax(dim=0, keepdim=True))[0]


class DraftBlock(NamedTuple):
    """`size` queries per row, flat over rows."""

    size: int
    slots: torch.Tensor  # [rows] int64, request slots
    input_ids: torch.Tensor  # [rows * size] int64
    positions: torch.Tensor  # [rows * size] int64
    kv_slots: torch.Tensor  # [rows * size] int64
    prefix_lens: torch.Tensor  # [rows] int64, cached entries that the block attends to
    ahead: int  # of these, entries cached since drafting began
    input_embeds: torch.Tensor | None = None  # [rows * size, hidden], for models without their own embedding
    hidden_states: torch.Tensor | None = None  # [rows * size, hidden], EAGLE-3's features


@dataclass
class BlockInfo(DFlashVerifyInput):
    """SGLang's `spec_info` for a linear chain of queries, with the features that its EAGLE-3 model expects there."""

    hidden_states: torch.Tensor | None = None


def columns_of(layer_ids: tuple[int, ...], captured: tuple[int, ...], hidden_size: int) -> torch.Tensor | None:
    """Columns of the captured features [captures * hidden] for `layer_ids`, in their order; None if that is all.

    captured (1, 9, 17), hidden 2, layer_ids (1, 17) -> columns 0 1 4 5
    """
    if layer_ids == captured:
        return None
    starts = torch.tensor([captured.index(layer) * hidden_size for layer in layer_ids])
    return (starts[:, None] + torch.arange(hidden_size)).reshape(-1)


def select_columns(features: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """`features` [n, captures * hidden] restricted to a drafter's own captured layers."""
    return features if columns is None else features.index_select(-1, columns)


def kv_rows(spec: DrafterSpec, qkv: QKVParallelLinear, q_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of the K and V rows of a fused QKV projection's weight and bias. Raises ValueError if it is quantized."""
    if qkv.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the drafter {spec.path} is quantized ({qkv.weight.dtype}), so K and V cannot be projected separately: "
            "use a bfloat16 drafter, and with --quantization also --speculative-draft-model-quantization unquant"
        )
    return qkv.weight[q_size:], None if qkv.bias is None else qkv.bias[q_size:]


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias for x [..., width], weight [out, width]."""
    return F.linear(x, weight, bias)
