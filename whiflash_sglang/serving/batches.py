"""SGLang's batches as our records, and a round's result as SGLang's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.utils import GenerationBatchResult

from whiflash_sglang.bridge.algorithm import draft_input
from whiflash_sglang.bridge.builders import prompt_token
from whiflash_sglang.core.transfer import columns, to_device
from whiflash_sglang.core.types import HostRows, Prefill, RoundResult, Rows
from whiflash_sglang.serving.verifier import draftable

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from whiflash_sglang.bridge.algorithm import WhiFlashDraftInput


def decode_rows(batch: ScheduleBatch, req_to_token: torch.Tensor, max_width: int) -> Rows:
    """Convert a decode batch to rows. SGLang has already reserved KV slots for the whole window."""
    slots = batch.req_pool_indices.to(torch.int64)
    prefix_lens = batch.seq_lens.to(torch.int64)
    # One gather from the flat table, from each row's last committed position on. Indexing by two tensors is slower.
    first = slots * req_to_token.shape[1] + prefix_lens - 1
    kv_slots = req_to_token.take(first[:, None] + columns(1 + max_width, slots.device)).to(torch.int64)
    known = HostRows(request_slots(batch), batch.seq_lens_cpu.tolist(), draftable(batch))
    state: WhiFlashDraftInput = batch.spec_info
    return Rows(slots, state.bonus_tokens, prefix_lens, kv_slots, known)


def request_slots(batch: ScheduleBatch) -> list[int]:
    """The rows' request slots, from the host."""
    return [int(request.req_pool_idx) for request in batch.reqs]


def prefill_positions(
    batch: ScheduleBatch, features: torch.Tensor, hidden: torch.Tensor, next_token_ids: torch.Tensor
) -> Prefill:
    """All positions of a prefill batch, flat over requests, for the drafters to ingest.

    `features` [tokens, captures * hidden], `hidden` [tokens, hidden], `next_token_ids` [requests]. The token after a
    request's last position is the sampled one or, in a chunked prefill, the prompt's next token.
    """
    device = features.device
    spans = [range(start, start + count) for start, count in zip(batch.prefix_lens, batch.extend_lens, strict=True)]
    last = [end - 1 for end in accumulate(map(len, spans))]  # flat, of each request
    index = to_device(last, device)
    sampled = next_token_ids.to(torch.int64)
    next_tokens = batch.input_ids.roll(-1).to(torch.int64)
    next_tokens[index] = sampled
    for request, span, place in zip(batch.reqs, spans, last, strict=True):
        following = prompt_token(request, span.stop)
        if following is not None:
            next_tokens[place] = following
    return Prefill(
        features=features,
        hidden=hidden,
        next_tokens=next_tokens,
        positions=to_device(torch.cat([torch.arange(span.start, span.stop) for span in spans]), device),
        kv_slots=batch.out_cache_loc.to(torch.int64),
        last=index,
        sampled=sampled,
        slots=request_slots(batch),
        lens=[span.stop for span in spans],
    )


def batch_result(
    rows: Rows, result: RoundResult, kept: Sequence[int], logprobs: LogitsProcessorOutput | None
) -> GenerationBatchResult:
    """Convert a round's result to SGLang's format: one stride for all rows, `accept_lens` including the bonus token.

    `kept` [rows]: committed tokens up to each request's end.
    """
    bonus = [tokens[count - 1] for tokens, count in zip(result.committed, kept, strict=True)]
    new_lens = [length + count for length, count in zip(rows.host.prefix_lens, kept, strict=True)]
    state = to_device((bonus, new_lens), rows.slots.device)  # one copy to the device
    # Host tensors where the scheduler reads on the host; it would copy device tensors.
    return GenerationBatchResult(
        logits_output=logprobs,
        next_token_ids=result.tokens.view(-1),
        accept_lens=torch.tensor(kept, dtype=torch.int32),
        next_draft_input=draft_input(bonus_tokens=state[0], new_seq_lens=state[1]),
        speculative_num_draft_tokens=result.tokens.shape[1],
        new_seq_lens=state[1],
    )
