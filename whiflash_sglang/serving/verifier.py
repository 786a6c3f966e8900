"""The verify forward: rows and a proposal in, the target's choices and features out.

The only code that prepares SGLang's batch for a verify forward, and the only code that samples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_utils import GrammarTree

from whiflash_sglang.bridge.logit_adjustments import Said, adjust
from whiflash_sglang.core.transfer import columns
from whiflash_sglang.core.types import Proposal, Rows, Verified
from whiflash_sglang.serving.verify_graphs import VerifyWidth

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


class SGLangTarget:
    """Verifies with an SGLang target worker. `bind` sets the batch for the next call.

    `feature_size` is captures * hidden; the columns after it are the final hidden states. `widths`: attention backend
    and CUDA graphs by verify width.
    """

    def __init__(self, worker: TpModelWorker, feature_size: int, widths: Mapping[int, VerifyWidth]):
        self.worker = worker
        self.feature_size = feature_size
        self.widths = widths
        self.batch: ScheduleBatch = None  # type: ignore[assignment]
        self.said = Said()
        self.logprobs: LogitsProcessorOutput | None = None  # of the last verify, if requested

    def bind(self, batch: ScheduleBatch) -> None:
        """Set SGLang's batch for the next `verify`."""
        self.batch = batch
        self.logprobs = None

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        """See `Target.verify`."""
        num_rows, width = proposal.tokens.shape
        # Before the forward, so that the host computes grammar masks while the target runs.
        tree = GrammarTree.from_linear_chain(proposal.tokens) if self.batch.has_grammar else None
        positions = rows.prefix_lens[:, None] + columns(width, rows.slots.device)
        logits_output = self.forward(rows, proposal.tokens, positions)
        logits = logits_output.next_token_logits.view(num_rows, width, -1)
        features, hidden = self.split(logits_output.hidden_states.view(num_rows, width, -1))
        return Verified(self.predict(logits, positions, proposal.tokens, tree), logits, features, hidden)

    def max_steps(self) -> int:
        """See `Target.max_steps`. They end with the last request that reaches its maximum length.

        To end with the first one wastes no step, but was slower with many short requests: it leaves few steps to share.
        One if a step's logits depend on the text before it, or if logprobs are requested.
        """
        batch, sampling = self.batch, self.batch.sampling_info
        penalized = sampling.penalizer_orchestrator is not None and sampling.penalizer_orchestrator.is_required
        if penalized or batch.has_grammar or batch.return_logprob or sampling.has_custom_logit_processor:
            return 1
        left = (request.sampling_params.max_new_tokens - len(request.output_ids) for request in batch.reqs)
        return max(1, *left)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split `states` [..., captures * hidden + hidden] into captured features and final hidden states."""
        return states[..., : self.feature_size], states[..., self.feature_size :]

    def forward(self, rows: Rows, tokens: torch.Tensor, positions: torch.Tensor) -> LogitsProcessorOutput:
        """One causal forward over the windows `tokens` [rows, width]; logits and features of every position."""
        batch, width = self.batch, tokens.shape[1]
        batch.out_cache_loc = rows.kv_slots[:, 1 : 1 + width].reshape(-1)
        # Attention backends plan with the host's lengths, which must include the window.
        committed, num_committed = torch.tensor(rows.host.prefix_lens), sum(rows.host.prefix_lens)
        batch.seq_lens = rows.prefix_lens
        batch.seq_lens_cpu, batch.seq_lens_sum = committed + width, num_committed + width * len(tokens)
        info = DFlashVerifyInput(
            tokens.reshape(-1), positions.reshape(-1), width, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        with self.widths[width].in_place(self.worker.model_runner):
            forward_batch, _ = info.prepare_for_verify(batch, self.worker)
            forward_batch.mark_forward_metadata_ready()
            batch.seq_lens_cpu, batch.seq_lens_sum = committed, num_committed
            return self.worker.forward_batch_generation(None, forward_batch=forward_batch, is_verify=True).logits_output

    def predict(
        self, logits: torch.Tensor, positions: torch.Tensor, window: torch.Tensor, tree: GrammarTree | None = None
    ) -> torch.Tensor:
        """The target's choice at every window position, sampled as SGLang would; [rows, width] int64.

        `logits` [rows, width, vocab]; `positions` and `window` [rows, width] of the tokens before the choices; `tree`:
        see `adjust`.
        """
        batch, sampling = self.batch, self.batch.sampling_info
        logits = adjust(logits, window, batch, tree, self.said)
        if sampling.has_custom_logit_processor:
            logits = process_first(logits, sampling)
        num_rows, width = positions.shape
        if sampling.is_all_greedy:
            tokens = logits.argmax(dim=-1)
        else:
            sampler = self.worker.model_runner.sampler
            flat = LogitsProcessorOutput(next_token_logits=logits.reshape(num_rows * width, -1).clone())
            tokens = sampler(flat, repeat_sampling(sampling, width), False, [], [], positions.reshape(-1))
            tokens = tokens.view(num_rows, width).to(torch.int64)
        if batch.return_logprob:
            self.logprobs = log_probabilities(batch, logits, tokens)
        return tokens


def process_first(logits: torch.Tensor, sampling: SamplingBatchInfo) -> torch.Tensor:
    """A copy of `logits` [rows, width, vocab] with custom logit processors applied to the first column.

    Processors are arbitrary code, so their rows are not drafted for (see `draftable`) and use no other columns.
    """
    logits = logits.clone()
    first = logits[:, 0].clone()
    apply_custom_logit_processor(first, sampling)
    logits[:, 0] = first
    return logits


def log_probabilities(batch: ScheduleBatch, logits: torch.Tensor, tokens: torch.Tensor) -> LogitsProcessorOutput:
    """Logprobs of `tokens` [rows, width] from `logits` [rows, width, vocab], at every window column. SGLang uses the
    accepted ones."""
    num_rows, width = tokens.shape
    output = LogitsProcessorOutput(next_token_logits=logits.reshape(num_rows * width, -1))
    every_column = torch.arange(num_rows * width, device=tokens.device).view(num_rows, width)
    compute_spec_v2_logprobs(batch, output, tokens.reshape(-1), every_column, width - 1)
    output.next_token_logits = None  # large, and unused on the host
    all_as_tensors(output)
    return output


def all_as_tensors(output: LogitsProcessorOutput) -> None:
    """Convert token-id logprobs to tensors. SGLang leaves empty lists for requests without them, then crashes when it
    reads them as tensors."""
    values = output.next_token_token_ids_logprobs_val
    if values is not None:
        output.next_token_token_ids_logprobs_val = [torch.as_tensor(value) for value in values]


def draftable(batch: ScheduleBatch) -> list[bool] | None:
    """Per row [rows], whether it can be drafted for (no custom logit processor). None if all can."""
    if not batch.sampling_info.has_custom_logit_processor:
        return None
    return [request.custom_logit_processor is None for request in batch.reqs]


def repeat_sampling(sampling: SamplingBatchInfo, width: int) -> SamplingBatchInfo:
    """SGLang's sampling parameters with each row repeated `width` times."""
    repeated = copy.copy(sampling)
    for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(repeated, name, value.repeat_interleave(width, dim=0))
    repeated.has_custom_logit_processor = False  # rows with one are not drafted for; see `predict`
    repeated.grammars = None
    return repeated
