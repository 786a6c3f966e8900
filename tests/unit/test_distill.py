"""Which rounds a drafter is trained for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from whiflash_sglang.training.distill import OPEN_NATS, anchor_weights, pick_anchors, reply_weights
from whiflash_sglang.training.drafters import Verdict
from whiflash_sglang.training.text import ANSWER, CONTEXT, DOCUMENT_CHARACTERS, REASONING, document, local_text

SPANS = torch.tensor([[CONTEXT, CONTEXT, REASONING, REASONING, REASONING, ANSWER, ANSWER, ANSWER]])
OPEN_AFTER = 3  # the target was not sure what follows this position


def verdict() -> Verdict:
    entropy = torch.zeros(SPANS.shape)
    entropy[0, OPEN_AFTER] = 2 * OPEN_NATS
    nothing = torch.empty(0)
    fields = dict.fromkeys(Verdict._fields, nothing)
    return Verdict(**{**fields, "ids": torch.ones_like(SPANS), "spans": SPANS, "entropy": entropy})


def test_anchors_weigh_by_span_and_by_how_open_they_were() -> None:
    found = verdict()
    weights = anchor_weights(found, reply_weights(found), settled=1.0, open_=0.5, reasoning=0.1)
    # An anchor counts where a token of the reply follows; the last one has none.
    expected = [0, 1.0, 0.1, 0.1, 0.05, 1.0, 1.0, 0]
    assert weights[0].tolist() == pytest.approx(expected)


def test_anchors_of_no_weight_are_not_picked() -> None:
    found = verdict()
    weights = anchor_weights(found, reply_weights(found), settled=1.0, open_=0.0, reasoning=0.0)
    torch.manual_seed(0)
    assert set(pick_anchors(weights, 200, block=2)[0].tolist()) == {1, 5}


@pytest.mark.slow  # it reads all texts of this machine that are used in training
def test_local_text_is_all_to_be_said_and_the_same_again() -> None:
    from transformers import AutoTokenizer

    from whiflash_sglang.startup.demo import DEMO_MODELS

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
    texts = list(local_text(5, seed=1))
    assert texts == list(local_text(5, seed=1)) and all(0 < len(text) <= DOCUMENT_CHARACTERS for text in texts)
    for text in texts:
        example = document(text, tokenizer)
        assert example.ids[-1] == tokenizer.eos_token_id and set(example.spans) == {ANSWER}
        assert tokenizer.decode(example.ids[:-1]) == text
