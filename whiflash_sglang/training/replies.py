"""The target's greedy replies to recorded histories, and both drafters' acceptance at every position of them.

This is the data for training, calibrating and evaluating routers. Served texts are the target's own choices, so
recorded histories are continued greedily. At every position of these replies, as a round start, both drafters draft on
the features of a single forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from whiflash_sglang.training.drafters import DFlash, Eagle3, Verdict, judge
from whiflash_sglang.training.text import Example, span_labels
from whiflash_workloads.demo.prompts import histories
from whiflash_workloads.tokens import ask

CONTEXT_KINDS = ("user", "tool_output")


class Prompt(NamedTuple):
    """A recorded history that ends where a reply begins."""

    session: str
    message: int  # index of the recorded reply
    ids: list[int]
    context_kind: str  # of the last message
    tool: str | None  # whose output that is


class Reply(NamedTuple):
    """A greedy reply to a recorded history."""

    prompt: Prompt
    example: Example  # history and reply

    @property
    def start(self) -> int:
        """Index of the reply's first token."""
        return len(self.prompt.ids)


class Positions(NamedTuple):
    """The round starts of one reply: position i has token `start + i` as its anchor; the last token has none."""

    hidden: np.ndarray  # [n, hidden] float16, final hidden state from which the anchor was chosen
    entropy: np.ndarray  # [n] float32, nats, of the distribution from which the anchor was chosen
    span: np.ndarray  # [n] uint8, index into text.SPANS, of the drafted tokens
    df: np.ndarray  # [n] uint8, acceptance length of DFlash, including the bonus token
    e3: np.ndarray  # [n] uint8, same for EAGLE-3


def prompts_of(session: dict[str, Any], tokenizer: Any) -> Iterator[Prompt]:
    """The prompts of a session's recorded replies, in order."""
    names = {
        call["id"]: call["function"]["name"]
        for message in session["messages"]
        for call in message.get("tool_calls") or ()
    }
    for index, ids in histories(session, tokenizer):
        last = session["messages"][index - 1] if index else {"role": "user"}
        is_tool = last["role"] == "tool"
        tool = names.get(last.get("tool_call_id")) if is_tool else None
        yield Prompt(session["session_id"], index, ids, CONTEXT_KINDS[is_tool], tool)


@torch.no_grad()
def greedy_replies(
    target: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 220, batch: int = 16
) -> list[Reply]:
    """The target's reply to each prompt, in order. Prompts of similar length are batched."""
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        longest = max(len(prompts[i].ids) for i in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, longest - len(prompts[i].ids) :] = torch.tensor(prompts[i].ids)
            mask[row, longest - len(prompts[i].ids) :] = 1
        output = target.generate(
            ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(group, output[:, longest:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            replies[i] = reply_of(prompts[i], row[:end], tokenizer)
    return [replies[i] for i in range(len(prompts))]


def served_replies(
    base_url: str, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 220, in_flight: int = 8
) -> list[Reply]:
    """Like `greedy_replies`, from a server with the same target, which is much faster."""
    answers = ask(base_url, [prompt.ids for prompt in prompts], max_new_tokens, in_flight)
    return [reply_of(*pair, tokenizer) for pair in zip(prompts, answers.texts, strict=True)]


def reply_of(prompt: Prompt, tokens: list[int], tokenizer: Any) -> Reply:
    """A reply from its token ids."""
    text = np.array(prompt.ids + tokens, dtype=np.int64)
    return Reply(prompt, Example(text, span_labels(text, tokenizer)))


@torch.no_grad()
def positions(target: PreTrainedModel, eagle3: Eagle3, dflash: DFlash, reply: Reply, steps: int) -> Positions | None:
    """Router inputs and both drafters' acceptance at every position of a reply; None if it is shorter than two tokens.
    `steps`: EAGLE-3's chain length."""
    n, start = len(reply.example.ids), reply.start
    if n < start + 2:
        return None
    verdict = judge(target, reply.example.ids[None], reply.example.spans[None], autocast=False)
    anchors = torch.arange(start, n - 1, device=verdict.ids.device)
    before = slice(start - 1, n - 2)  # positions at which the anchors were chosen
    return Positions(
        hidden=verdict.hidden[0, before].half().cpu().numpy(),
        entropy=verdict.entropy[0, before].cpu().numpy(),
        span=reply.example.spans[start + 1 : n],
        df=dflash_lengths(dflash, target, verdict, anchors).astype(np.uint8),
        e3=eagle3_lengths(eagle3, target, verdict, anchors, steps).astype(np.uint8),
    )


def eagle3_lengths(
    model: Eagle3, target: PreTrainedModel, verdict: Verdict, anchors: torch.Tensor, steps: int
) -> np.ndarray:
    """Acceptance length [n] of EAGLE-3 rounds at positions `anchors` [n] in the text of `verdict`."""
    # Accepted tokens equal the recorded ones, so teacher forcing is exact here.
    entries = (anchors - 1)[None]  # a chain starts at the entry before its anchor
    logits = torch.stack(list(model.chains(target.get_input_embeddings(), verdict, steps, entries)), dim=2)[0]
    drafts = model.draft_tokens[logits.argmax(-1)]
    return _lengths(drafts, verdict, anchors)


def dflash_lengths(model: DFlash, target: PreTrainedModel, verdict: Verdict, anchors: torch.Tensor) -> np.ndarray:
    """Like `eagle3_lengths`, for DFlash."""
    logits = model.blocks(target.get_input_embeddings(), target.lm_head.weight, verdict, anchors[None])[0]
    return _lengths(logits.argmax(-1), verdict, anchors)


def _lengths(drafts: torch.Tensor, verdict: Verdict, anchors: torch.Tensor) -> np.ndarray:
    """Acceptance lengths [anchors] of `drafts` [anchors, k]. Nothing is accepted beyond the end of the text."""
    ids = torch.cat([verdict.ids[0], torch.full((drafts.shape[1],), -1, device=verdict.ids.device)])
    truth = ids[anchors[:, None] + 1 + torch.arange(drafts.shape[1], device=anchors.device)]
    return 1 + (drafts == truth).long().cumprod(dim=1).sum(dim=1).cpu().numpy()
