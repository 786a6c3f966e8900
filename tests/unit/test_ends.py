"""A round's tokens are cut where one token at a time would have ended the text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from whiflash_sglang.core.stop_conditions import tokens_to_end

EOS = 2


class Letters:
    """One token a letter: 97 is `a`."""

    eos_token_id = EOS
    additional_stop_token_ids = frozenset({3})

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token) if token > 31 else f"<{token}>" for token in tokens)


def request(said: str = "", *, longest: int = 99, ignore_eos: bool = False, **stops: Any) -> SimpleNamespace:
    strings, patterns = stops.get("strings", []), stops.get("patterns", [])
    params = SimpleNamespace(
        max_new_tokens=longest,
        ignore_eos=ignore_eos,
        stop_token_ids=stops.get("ids"),
        stop_strs=strings,
        stop_regex_strs=patterns,
        stop_str_max_len=max((len(string) for string in strings), default=0),
        stop_regex_max_len=8 if patterns else 0,
    )
    return SimpleNamespace(
        sampling_params=params, output_ids=[ord(c) for c in said], tokenizer=Letters(), eos_token_ids={4}
    )


def tokens(text: str) -> list[int]:
    return [EOS if letter == "$" else ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("asked", "accepted", "kept"),
    [
        (request(), "abcd", "abcd"),
        (request("abc", longest=5), "defg", "de"),
        (request(), "ab$cd", "ab$"),
        (request("abc", longest=7), "d$ef", "d$"),  # the end of the turn comes before the longest length
        (request(ignore_eos=True), "ab$cd", "ab$cd"),
        (request(ids=[ord("c")]), "abcd", "abc"),
        (request(strings=["bc"]), "abcd", "abc"),
        (request("a", strings=["ab"]), "bcd", "b"),  # begun before the round
        (request("xab", strings=["ab"]), "cd", "c"),  # SGLang would have stopped before: it is told at once
        (request(strings=["cd", "b"]), "abcd", "ab"),  # the first of the text, not of the list
        (request(strings=["d"]), "ab$cd", "ab$"),  # the end of the turn comes before the stop
        (request(strings=["b"], longest=4), "abcd", "ab"),
        (request(patterns=["[0-9]$"]), "a1b2", "a1"),
        (request(patterns=["("]), "abcd", "abcd"),  # SGLang fails it
    ],
)
def test_what_lies_behind_the_first_end_is_cut(asked: SimpleNamespace, accepted: str, kept: str) -> None:
    assert tokens(accepted)[: tokens_to_end(asked, tokens(accepted)).num_tokens] == tokens(kept)


def test_ends_of_the_model_and_of_its_tokenizer() -> None:
    assert tokens_to_end(request(), [97, 3, 97]) == (2, True)
    assert tokens_to_end(request(), [97, 98, 4, 97]) == (3, True)


@pytest.mark.parametrize(
    ("asked", "accepted", "ends"),
    [
        (request(), "abc", False),
        (request("abc", longest=5), "de", True),
        (request("abc", longest=6), "de", False),
        (request(), "ab$", True),
        (request(ignore_eos=True), "ab$", False),
        (request(strings=["bc"]), "abc", True),
        (request(strings=["bc"]), "ab", False),
        (request(patterns=["[0-9]$"]), "ab1", True),
        (request(patterns=["[0-9]$"]), "abc", False),
        (request(patterns=["("]), "abcd", False),
    ],
)
def test_whether_a_text_ends_is_known_with_the_round(asked: SimpleNamespace, accepted: str, ends: bool) -> None:
    assert tokens_to_end(asked, tokens(accepted)).ends == ends
