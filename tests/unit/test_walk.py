"""Rounds on paper: which a policy would take, what they cost, and who is best in hindsight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learned import record
from whiflash_sglang.training.walk import best_threshold, by_worth, ceiling, oracle, walk

MS = {"df": 10.0, "e3": 12.0}
# A reply of 5 positions and a last token. df from 0: 3 tokens, then 1, then 2 (one token is left behind the end).
REPLY = record(df=[3, 1, 1, 1, 4], e3=[2, 2, 4, 1, 1])


def test_rounds_of_df() -> None:
    found = walk([REPLY], np.zeros(5, dtype=bool), MS)
    assert found.tokens.tolist() == [3, 1, 2]
    assert found.position.tolist() == [0, 3, 4]
    assert found.acceptance_length == pytest.approx(2.0)
    assert found.tokens_per_ms == pytest.approx(6 / 30)


def test_rounds_of_e3_and_a_mix() -> None:
    assert walk([REPLY], np.ones(5, dtype=bool), MS).tokens.tolist() == [2, 4]
    mixed = walk([REPLY], np.array([False, False, False, True, False]), MS)
    assert mixed.is_e3.tolist() == [False, True, False]
    assert mixed.ms.tolist() == [10.0, 12.0, 10.0]


def test_a_round_may_be_decided_by_what_was_known_earlier() -> None:
    """Positions 0, 2 and 3 of the first reply; the second one's first round knows nothing of the first."""
    to_e3 = np.array([True, False, False, True, False, False, False, False, True, False])
    at_once, late = walk([REPLY, REPLY], to_e3, MS), walk([REPLY, REPLY], to_e3, MS, lag=1)
    assert at_once.position.tolist() == [0, 2, 3, 4, 5, 8, 9]
    assert at_once.is_e3.tolist() == [True, False, True, False, False, True, False]
    assert late.position.tolist() == [0, 2, 5, 8, 9]
    assert late.is_e3.tolist() == [True, True, False, False, True]
    assert late.tokens.tolist() == [2, 4, 3, 1, 1]


def test_replies_are_walked_one_after_the_other() -> None:
    found = walk([REPLY, REPLY], np.array([False] * 5 + [True] * 5), MS)
    assert found.position.tolist() == [0, 3, 4, 5, 7]
    assert found.by_span()["reasoning"]["rounds"] == 5


def test_the_oracle_takes_the_round_with_more_tokens_per_ms() -> None:
    assert oracle([record(df=[5, 5, 1], e3=[6, 7, 1])], MS).tolist() == [False, True, False]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_the_ceiling_is_the_quickest_of_all_walks(lengths: list[tuple[int, int]]) -> None:
    n = len(lengths)
    left = [n + 1 - i for i in range(n)]  # a round ends with the reply
    df, e3 = ([min(pair[k], left[i]) for i, pair in enumerate(lengths)] for k in (0, 1))
    reply = record(df=df, e3=e3)
    every = [walk([reply], np.array(choice), MS).ms.sum() for choice in itertools.product((False, True), repeat=n)]
    assert walk([reply], ceiling([reply], MS), MS).ms.sum() == pytest.approx(min(every))
    assert walk([reply], oracle([reply], MS), MS).ms.sum() >= min(every) - 1e-9


def test_a_gain_has_to_be_worth_its_time() -> None:
    """20 replies of rounds of 5 tokens in 10 ms: 2 ms are worth a token, and e3's gain of half a one is not enough."""
    records = [record(df=[5] * 20, e3=[5] * 20) for _ in range(20)]
    gain = np.tile([0.5, 2.0], 200)
    choice = by_worth(records, gain, MS)
    assert not choice[::2].any()
    assert choice[1::2].all()


def test_the_best_threshold_is_the_one_that_parts_them() -> None:
    records = [record(df=[6, 6, 2, 2] * 5, e3=[2, 2, 6, 6] * 5)]
    score = np.tile([0.1, 0.1, 0.9, 0.9], 5)
    threshold, table = best_threshold(records, score, (0.0, 0.5, 1.0), {"df": 1.0, "e3": 1.0})
    assert threshold == 0.5
    assert table[0.5] > table[0.0] and table[0.5] > table[1.0]
