"""What the demo models have learned: tool calls that parse, and acceptance length by drafter and span.

Acceptance is measured on the target's own greedy text: recorded histories are continued turn by turn, and at the
positions of those replies both drafters are asked for drafts, on features of the same text.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from whiflash_sglang.training.drafters import DFlash, Eagle3, Verdict, judge
from whiflash_sglang.training.text import SPANS, Example, histories, parsed_arguments, span_labels


class Reply(NamedTuple):
    """A greedy reply behind a recorded history."""

    example: Example
    start: int  # first token of the reply
    recorded: str
    text: str


@torch.no_grad()
def greedy_replies(
    target: Qwen3ForCausalLM, tokenizer: Any, sessions: list[dict[str, Any]], max_new_tokens: int = 220
) -> list[Reply]:
    """The target's reply to every recorded assistant turn's history."""
    replies = []
    for session in sessions:
        for i, prompt in histories(session, tokenizer):
            prompt_ids = torch.tensor([prompt], device=target.device)
            output = target.generate(prompt_ids, max_new_tokens=max_new_tokens, do_sample=False)[0].cpu().numpy()
            recorded = tokenizer.apply_chat_template([parsed_arguments(session["messages"][i])], tokenize=False)
            text = tokenizer.decode(output[len(prompt) :])
            replies.append(Reply(Example(output, span_labels(output, tokenizer)), len(prompt), recorded, text))
    return replies


def tool_calls(text: str) -> list[dict[str, Any] | None]:
    """The tool calls in a reply; None for one that is no JSON object with a name and arguments."""
    calls: list[dict[str, Any] | None] = []
    for piece in text.split("<tool_call>")[1:]:
        try:
            call = json.loads(piece.split("</tool_call>")[0])
            calls.append(call if isinstance(call, dict) and {"name", "arguments"} <= set(call) else None)
        except json.JSONDecodeError:
            calls.append(None)
    return calls


def call_figures(replies: list[Reply]) -> dict[str, float]:
    """How many tool calls parse, and how many equal the recorded ones."""
    asked = [reply for reply in replies if "<tool_call>" in reply.recorded]
    parsed = [tool_calls(reply.text) for reply in asked]
    return {
        "calls": len(asked),
        "parse": float(np.mean([bool(calls) and None not in calls for calls in parsed])),
        "equal_to_recorded": float(
            np.mean([calls == tool_calls(reply.recorded) for calls, reply in zip(parsed, asked, strict=True)])
        ),
    }


class Acceptance(NamedTuple):
    """Per position of replies, as round starts: acceptance length of each drafter, span, entropy."""

    e3: np.ndarray
    df: np.ndarray
    spans: np.ndarray
    entropy: np.ndarray


@torch.no_grad()
def acceptance(
    target: Qwen3ForCausalLM, eagle3: Eagle3, dflash: DFlash, replies: list[Reply], steps: int
) -> Acceptance:
    """AL (bonus included) that each drafter would have with every token of the replies as anchor."""
    e3, df, spans, entropy = [], [], [], []
    for reply in replies:
        n = len(reply.example.ids)
        if n < reply.start + 2:
            continue
        verdict = judge(target, reply.example.ids[None], reply.example.spans[None], autocast=False)
        anchors = torch.arange(reply.start, n - 1)
        e3.append(eagle3_lengths(eagle3, target, verdict, anchors, steps))
        df.append(dflash_lengths(dflash, target, verdict, anchors))
        spans.append(reply.example.spans[reply.start + 1 : n])  # the span that is being drafted
        entropy.append(verdict.entropy[0, reply.start - 1 : n - 2].numpy())
    return Acceptance(*(np.concatenate(values) for values in (e3, df, spans, entropy)))


def _lengths(drafts: torch.Tensor, verdict: Verdict, anchors: torch.Tensor) -> np.ndarray:
    """`drafts` [anchors, k]: token after the anchor first. The text beyond its end accepts nothing."""
    ids = torch.cat([verdict.ids[0], torch.full((drafts.shape[1],), -1)])
    truth = ids[anchors[:, None] + 1 + torch.arange(drafts.shape[1])]
    return 1 + (drafts == truth).long().cumprod(dim=1).sum(dim=1).numpy()


def eagle3_lengths(
    model: Eagle3, target: Qwen3ForCausalLM, verdict: Verdict, anchors: torch.Tensor, steps: int
) -> np.ndarray:
    """Acceptance length of a round at each of `anchors` [n], positions in the one text of `verdict`."""
    # A chain's tokens equal the recorded ones for as long as they are accepted: teacher forcing is exact here.
    entries = (anchors - 1)[None]  # a chain starts at the entry before its anchor
    logits = torch.stack(list(model.chains(target.get_input_embeddings(), verdict, steps, entries)), dim=2)[0]
    drafts = model.draft_tokens[logits.argmax(-1)]
    return _lengths(drafts, verdict, anchors)


def dflash_lengths(model: DFlash, target: Qwen3ForCausalLM, verdict: Verdict, anchors: torch.Tensor) -> np.ndarray:
    logits = model.blocks(target.get_input_embeddings(), target.lm_head.weight, verdict, anchors[None])[0]
    return _lengths(logits.argmax(-1), verdict, anchors)


def figures(result: Acceptance, cost_ratio: float) -> dict[str, Any]:
    """Means by span, and the entropy threshold with the most tokens per unit of time.

    `cost_ratio`: time of an e3 round over that of a df round. Positions count alike here, while a real run visits fewer
    positions where drafts are long; for choosing a threshold that is close enough.
    """
    by_span = {
        SPANS[span]: {
            "positions": int((result.spans == span).sum()),
            "e3": round(float(result.e3[result.spans == span].mean()), 2),
            "df": round(float(result.df[result.spans == span].mean()), 2),
            "entropy": round(float(result.entropy[result.spans == span].mean()), 3),
        }
        for span in (1, 2, 3)
        if (result.spans == span).any()
    }
    table = {}
    for threshold in (0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 9.0):
        to_e3 = result.entropy > threshold
        # Time for a text is the sum over its tokens of (cost of a round / tokens of that round).
        time = np.where(to_e3, cost_ratio / result.e3, 1.0 / result.df).mean()
        table[threshold] = round(float(1 / time), 3)
    return {
        "acceptance_length": {"e3": round(float(result.e3.mean()), 3), "df": round(float(result.df.mean()), 3)},
        "by_span": by_span,
        "tokens_per_df_round_time_by_threshold": table,
        "best_threshold": max(table, key=lambda threshold: table[threshold]),
    }
