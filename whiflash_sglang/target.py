"""The target behind one door: rows and a proposal in, the target's choices and features out.

The only code that fills SGLang's batch for a verify forward, and the only one that samples.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput

from whiflash_sglang.types import Proposal, Rows, Verified


class SGLangTarget:
    """Verifies on an SGLang target worker. `bind` names the batch that the next call is about.

    `feature_size` is captures * hidden: what a forward returns behind these columns are the final hidden states.
    """

    def __init__(self, worker: Any, feature_size: int):
        self.worker = worker
        self.feature_size = feature_size
        self.batch: Any = None

    def bind(self, batch: Any) -> None:
        self.batch = batch

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        num_rows, width = proposal.tokens.shape
        logits_output = self.forward(rows, proposal.tokens)
        logits = logits_output.next_token_logits.view(num_rows, width, -1)
        positions = rows.prefix_lens[:, None] + torch.arange(width, device=rows.slots.device)
        features, hidden = self.split(logits_output.hidden_states.view(num_rows, width, -1))
        return Verified(self.predict(logits, positions), logits, features, hidden)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Captured features and final hidden states of what a forward returned, [..., captures * hidden + hidden]."""
        return states[..., : self.feature_size], states[..., self.feature_size :]

    def forward(self, rows: Rows, tokens: torch.Tensor) -> LogitsProcessorOutput:
        """One causal forward over the windows `tokens` [rows, width]; logits and features of every position."""
        batch, width = self.batch, tokens.shape[1]
        positions = rows.prefix_lens[:, None] + torch.arange(width, device=tokens.device)
        batch.out_cache_loc = rows.kv_slots[:, 1 : 1 + width].reshape(-1)
        # Host mirrors of the lengths count the window too, as attention backends plan with them.
        committed = batch.seq_lens_cpu
        batch.seq_lens_cpu = committed + width
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        info = DFlashVerifyInput(
            tokens.reshape(-1), positions.reshape(-1), width, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        forward_batch, _ = info.prepare_for_verify(batch, self.worker)
        forward_batch.mark_forward_metadata_ready()
        batch.seq_lens_cpu, batch.seq_lens_sum = committed, int(committed.sum())
        return self.worker.forward_batch_generation(None, forward_batch=forward_batch, is_verify=True).logits_output

    def predict(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The target's choice at every position of the window, as SGLang would make it there; [rows, width] int64.

        `logits` [rows, width, vocab], `positions` [rows, width] of the tokens that the logits follow. Adjustments that
        depend on the text so far (penalties, grammar, custom processors) hold for the first column only: rows that have
        any are not drafted for (see `draftable`), so that nothing else of them is used.
        """
        sampling = self.batch.sampling_info
        logits = self.adjust(logits, sampling)
        if sampling.is_all_greedy:
            return logits.argmax(dim=-1)
        num_rows, width = positions.shape
        sampler = self.worker.model_runner.sampler
        flat = LogitsProcessorOutput(next_token_logits=logits.reshape(num_rows * width, -1).clone())
        tokens = sampler(flat, repeat_sampling(sampling, width), False, [], [], positions.reshape(-1))
        return tokens.view(num_rows, width).to(torch.int64)

    def adjust(self, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
        """Logits with the request's own adjustments; the target's are left as they are, for the router's entropy."""
        if sampling.logit_bias is None and not changes_with_text(self.batch):
            return logits
        logits = logits.clone()
        if self.batch.has_grammar:
            sampling.grammars = [request.grammar for request in self.batch.reqs]
            sampling.update_regex_vocab_mask()
        first = logits[:, 0].clone()
        sampling.apply_logits_bias(first)
        if sampling.has_custom_logit_processor:
            apply_custom_logit_processor(first, sampling)
        if sampling.logit_bias is not None:
            logits += sampling.logit_bias[:, None]
        logits[:, 0] = first
        return logits


def draftable(batch: Any) -> torch.Tensor | None:
    """Rows [rows] bool whose logits need no adjustment that changes within a verify window; None: all of them."""
    if not changes_with_text(batch):
        return None
    flags = [not _request_changes_with_text(request) for request in batch.reqs]
    return torch.tensor(flags, device=batch.seq_lens.device)


def changes_with_text(batch: Any) -> bool:
    """Whether any request has logit adjustments that depend on its text so far."""
    sampling = batch.sampling_info
    has_penalties = sampling.acc_additive_penalties is not None or sampling.acc_scaling_penalties is not None
    return has_penalties or batch.has_grammar or sampling.has_custom_logit_processor


def _request_changes_with_text(request: Any) -> bool:
    params = request.sampling_params
    return (
        request.grammar is not None
        or request.custom_logit_processor is not None
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )


def repeat_sampling(sampling: Any, width: int) -> Any:
    """SGLang's sampling parameters with each row repeated for every column of its window."""
    repeated = copy.copy(sampling)
    for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(repeated, name, value.repeat_interleave(width, dim=0))
    repeated.has_custom_logit_processor = False  # rows with one are not drafted for; see `predict`
    repeated.grammars = None
    return repeated
