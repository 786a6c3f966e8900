"""Prompts made up from lengths: as long as asked, and sharing text exactly where the hash ids do."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stub_server import StubServer
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.replay import replay
from whiflash_workloads.schema import Lengths
from whiflash_workloads.synthetic import SAMPLE_WORDS, sample, synthetic_prompt


def words(tokens: int, *hash_ids: int, name: str = "a", tokens_per_word: float = 1.0) -> list[str]:
    lengths = Lengths(input_tokens=tokens, hash_ids=list(hash_ids))
    return synthetic_prompt(lengths, name, tokens_per_word).split(" ")


def shared(one: list[str], other: list[str]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(pairs))


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 5000])
@pytest.mark.parametrize("tokens_per_word", [1.0, 1.3, 2.0])
def test_a_prompt_is_as_long_as_asked(tokens: int, tokens_per_word: float) -> None:
    assert len(words(tokens, tokens_per_word=tokens_per_word)) == max(1, round(tokens / tokens_per_word))
    hashed = words(tokens, *range(-(-tokens // 512)), tokens_per_word=tokens_per_word)
    assert len(hashed) == max(1, round(tokens / tokens_per_word))


@pytest.mark.parametrize("tokens_per_word", [1.0, 1.3])
def test_prompts_share_text_where_their_hash_ids_do(tokens_per_word: float) -> None:
    """By chance two rows of words go on alike for a word or two."""
    first = words(2000, 7, 8, 9, 10, tokens_per_word=tokens_per_word)
    second = words(1800, 7, 8, 11, 12, name="b", tokens_per_word=tokens_per_word)
    assert 0 <= shared(first, second) - round(1024 / tokens_per_word) <= 3
    assert shared(words(600, 7, 8), words(600, 9, 8)) <= 3


def test_a_last_block_is_the_beginning_of_the_whole_one() -> None:
    assert shared(words(700, 7, 8), words(1024, 7, 8, name="b")) == 700


def test_what_lies_behind_the_hashed_blocks_is_not_shared() -> None:
    first, second = words(1024, 7), words(1024, 7, name="b")
    assert 512 <= shared(first, second) <= 515
    assert shared(words(300), words(300, name="b")) <= 3


def test_a_prompt_is_the_same_in_every_process() -> None:
    program = """
from whiflash_workloads.schema import Lengths
from whiflash_workloads.synthetic import synthetic_prompt
print(synthetic_prompt(Lengths(input_tokens=600, hash_ids=[1, 2]), "a"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == words(600, 1, 2)


def test_a_sample_for_counting_tokens() -> None:
    assert len(sample().split()) == SAMPLE_WORDS


def test_a_trace_of_lengths_can_be_replayed(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 600, "hash_ids": [1, 2]},
        {"timestamp": 5, "input_length": 700, "hash_ids": [1, 3]},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_traces([tmp_path / "m.jsonl"]).sessions
    assert all(session.length_only for session in loaded)
    with StubServer() as server:
        assert [turn.error for turn in replay(loaded, server.base_url).turns] == [None, None]
    prompts = [body["messages"][0]["content"].split() for body in server.requests]
    assert [list(body["messages"][0]) for body in server.requests] == [["role", "content"]] * 2
    assert [len(prompt) for prompt in prompts] == [600, 700]
    assert 512 <= shared(*prompts) <= 515
