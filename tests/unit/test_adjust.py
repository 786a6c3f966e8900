"""Logits at every column of a window, against SGLang's own penalizers and grammars one step at a time."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

import xgrammar
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_utils import GrammarTree

from whiflash_sglang.bridge.logit_adjustments import Said, adjust, penalize_next
from whiflash_sglang.cpu import fallbacks

VOCAB, WIDTH = 24, 6
STRENGTHS: list[dict[str, Any]] = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.1},
    {"repetition_penalty": 1.7},
    {"min_new_tokens": 5, "stop_token_ids": [3, 9]},
    {"frequency_penalty": 0.3, "presence_penalty": 0.4, "repetition_penalty": 0.6, "min_new_tokens": 3},
]


class Batch:
    """As much of a batch as adjusting looks at."""

    def __init__(self, requests: list[Any], logit_bias: torch.Tensor | None = None, vocab: int = VOCAB):
        self.reqs = requests
        self.device = "cpu"
        self.has_grammar = any(request.grammar is not None for request in requests)
        self.sampling_info = SimpleNamespace(
            logit_bias=logit_bias,
            vocab_size=vocab,
            temperatures=torch.ones(len(requests), 1),
            acc_additive_penalties=None,
            acc_scaling_penalties=None,
            grammar_mask=None,
        )


def request(output: list[int], grammar: Any = None, **params: Any) -> Any:
    tokenizer = SimpleNamespace(additional_stop_token_ids={11}, eos_token_id=2)
    sampling = SamplingParams(**params)
    return SimpleNamespace(sampling_params=sampling, output_ids=output, tokenizer=tokenizer, grammar=grammar)


def of_sglang(logits: torch.Tensor, asked: Any, text: list[int]) -> torch.Tensor:
    """The logits [vocab] after `text`, as SGLang's penalizers leave them when they have counted it token by token."""
    batch = Batch([asked])
    kinds = ("Frequency", "MinNewTokens", "Presence", "Repetition")
    penalizers = {getattr(penaltylib, f"Batched{kind}Penalizer") for kind in kinds}
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCAB, batch, penalizers)
    for token in text:
        orchestrator.cumulate_output_tokens(torch.tensor([token]))
    adjusted = logits.clone()[None]
    additive = torch.zeros_like(adjusted)
    orchestrator.accumulate_additive_penalties(additive)
    scaling = orchestrator.accumulate_scaling_penalties()
    adjusted += additive
    if scaling is not None:
        adjusted = torch.where(adjusted < 0, adjusted * scaling, adjusted / scaling)
    return adjusted[0]


@pytest.mark.parametrize("params", STRENGTHS, ids=lambda params: "+".join(params))
def test_each_column_is_adjusted_as_a_step_after_its_text(params):
    """Between rows that ask for nothing, whose logits stay what they were."""
    torch.manual_seed(0)
    said = [4, 4, 7, 1]
    window = torch.tensor([[5] * WIDTH, [1, 4, 8, 8, 3, 8], [0, 1, 2, 3, 4, 5]])
    logits = 3 * torch.randn(3, WIDTH, VOCAB)
    before = logits.clone()
    found = adjust(logits, window, Batch([request([5]), request(said, **params), request([])]))
    assert torch.equal(logits, before)  # the target's own are kept
    assert torch.equal(found[0], logits[0]) and torch.equal(found[2], logits[2])
    for column in range(WIDTH):
        text = said + window[1, 1 : column + 1].tolist()
        expected = of_sglang(logits[1, column], request(said, **params), text)
        torch.testing.assert_close(found[1, column], expected)
    assert not torch.equal(found[1], logits[1])


def test_nothing_is_copied_where_nobody_asks():
    logits = torch.randn(2, WIDTH, VOCAB)
    assert adjust(logits, torch.zeros(2, WIDTH, dtype=torch.int64), Batch([request([1]), request([])])) is logits


def test_logit_bias_is_added_in_every_column():
    logits = torch.randn(2, WIDTH, VOCAB)
    bias = torch.zeros(2, VOCAB)
    bias[1, 6] = -5.0
    found = adjust(logits, torch.zeros(2, WIDTH, dtype=torch.int64), Batch([request([1]), request([])], bias))
    torch.testing.assert_close(found, logits + bias[:, None])


def test_a_retracted_request_goes_on_with_its_penalties():
    """SGLang samples after a prefill with penalizers that have counted nothing; what was said before counts all the
    same."""
    said = [4, 4, 7, 1]
    asked = [request([]), request(said, **STRENGTHS[-1])]
    batch = Batch(asked)
    penalize_next(batch)
    info = batch.sampling_info
    logits = torch.randn(2, VOCAB)
    adjusted = logits + info.acc_additive_penalties
    adjusted = torch.where(adjusted < 0, adjusted * info.acc_scaling_penalties, adjusted / info.acc_scaling_penalties)
    torch.testing.assert_close(adjusted[0], logits[0])
    torch.testing.assert_close(adjusted[1], of_sglang(logits[1], asked[1], said))


class Looked(list[int]):
    """An output that knows how many of its tokens were looked at."""

    tokens = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Looked.tokens += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("the whole output is gone through")


def test_what_was_said_is_counted_once():
    """Of 64 outputs of 2,000 tokens a round looks at those that came last, and its counts are those of all."""
    said, device = Said(), torch.device("cpu")
    outputs = [Looked((7 * row + place) % VOCAB for place in range(2000)) for row in range(64)]
    said.of(outputs, VOCAB, device)
    assert Looked.tokens == 64 * 2000
    for number in range(20):
        Looked.tokens = 0
        for row, output in enumerate(outputs):
            output.extend(range(1 + (row + number) % 4))
        grown = sum(1 + (row + number) % 4 for row in range(64))
        counts = said.of([*outputs], VOCAB, device)
        assert Looked.tokens == grown
    for row, output in enumerate(outputs):
        assert counts[row].tolist() == torch.bincount(torch.tensor(output[:]), minlength=VOCAB).tolist()


def test_counts_follow_requests_that_come_go_and_return():
    """In any order; another output is counted from its first token."""
    shuffle, said = random.Random(3), Said()
    outputs = {number: [number] for number in range(8)}
    for _ in range(200):
        running = shuffle.sample(sorted(outputs), shuffle.randint(1, 8))
        for number in running:
            if shuffle.random() < 0.1:
                outputs[number] = outputs[number][:2]
            outputs[number].extend(shuffle.choices(range(VOCAB), k=shuffle.randint(0, 4)))
        counts = said.of([outputs[number] for number in running], VOCAB, torch.device("cpu"))
        assert len(counts) == len(running), "none is kept of a last request that has ended"
        for row, number in enumerate(running):
            assert counts[row].tolist() == torch.bincount(torch.tensor(outputs[number]), minlength=VOCAB).tolist()


LETTERS = ("<end>", *"abcdefghijklmnopqrstuvw")


@pytest.fixture
def grammar(monkeypatch):
    """`ab(c|d)*e` over one token a letter, masked as on a CPU."""
    monkeypatch.setattr(xgrammar_backend, "_allocate_token_bitmask", fallbacks.allocate_token_bitmask)
    monkeypatch.setattr(xgrammar_backend.XGrammarGrammar, "apply_vocab_mask", fallbacks.apply_vocab_mask)
    info = xgrammar.TokenizerInfo(list(LETTERS), stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(info).compile_regex("ab(c|d)*e")
    return xgrammar_backend.XGrammarGrammar(xgrammar.GrammarMatcher(compiled), VOCAB, compiled, [0], "ab(c|d)*e")


def letters(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def allowed(logits: torch.Tensor) -> str:
    return "".join(LETTERS[token][0] for token in (logits > -torch.inf).nonzero()[:, 0].tolist())


def test_a_grammar_masks_every_column_after_its_own_text(grammar):
    """`a` has been said; the drafts go on with `bcd`, then with what the grammar never lets stand."""
    grammar.accept_token(letters("a")[0])
    window = torch.tensor([letters("abcdff"), letters("aaaaaa")])
    logits = torch.zeros(2, WIDTH, VOCAB)
    found = adjust(logits, window, Batch([request(letters("a"), grammar), request(letters("a"))]))
    assert [allowed(column) for column in found[0, :4]] == ["b", "cde", "cde", "cde"]
    assert torch.equal(found[1], logits[1])
    grammar.accept_token(letters("b")[0])  # the walk through the drafts left the grammar where it was


def test_a_window_that_was_sent_to_the_host_before_gives_the_same_mask(grammar):
    window = torch.tensor([letters("abcdff")])
    tree = GrammarTree.from_linear_chain(window)
    logits, batch = torch.zeros(1, WIDTH, VOCAB), Batch([request(letters(""), grammar)])
    grammar.accept_token(letters("a")[0])
    assert torch.equal(adjust(logits, window, batch, tree), adjust(logits, window, batch))


def test_tokens_beyond_the_vocabulary_are_nobodys():
    """As places in a flat tensor they would be another row's."""
    asked = [request([1], min_new_tokens=5, stop_token_ids=[VOCAB + 3, 7]), request([1], presence_penalty=0.5)]
    found = adjust(torch.zeros(2, 1, VOCAB), torch.ones(2, 1, dtype=torch.int64), Batch(asked))
    assert (found[0, 0] == -torch.inf).nonzero()[:, 0].tolist() == [2, 7, 11] and found[1].isfinite().all()


def test_a_grammar_that_ends_within_the_window_lets_only_the_end_follow(grammar):
    for token in letters("ab"):
        grammar.accept_token(token)
    window = torch.tensor([letters("bcedaa")])
    found = adjust(torch.zeros(1, WIDTH, VOCAB), window, Batch([request(letters("ab"), grammar)]))
    assert [allowed(column) for column in found[0, :3]] == ["cde", "cde", "<"]
