"""Acceptance: lossless for greedy text, in distribution for sampled text."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from whiflash_sglang.core.accept import accept
from whiflash_sglang.core.types import Proposal


def proposal(tokens: list[list[int]], num_drafts: list[int]) -> Proposal:
    return Proposal(torch.tensor(tokens), torch.tensor(num_drafts))


def test_worked_example_of_the_glossary() -> None:
    sat, on, a, mat, the, dot = range(6)
    accepted = accept(proposal([[sat, on, a, mat]], [3]), torch.tensor([[on, the, mat, dot]]))
    assert accepted.num_committed.tolist() == [2]
    assert accepted.tokens[0, :2].tolist() == [on, the]


@given(st.data())
def test_against_a_loop(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    token = st.integers(0, 2)
    matrix = st.lists(st.lists(token, min_size=width, max_size=width), min_size=rows, max_size=rows)
    tokens, predictions = data.draw(matrix), data.draw(matrix)
    num_drafts = data.draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows))
    accepted = accept(proposal(tokens, num_drafts), torch.tensor(predictions))
    for row in range(rows):
        expected = 0
        while expected < num_drafts[row] and tokens[row][expected + 1] == predictions[row][expected]:
            expected += 1
        assert int(accepted.num_committed[row]) == expected + 1
        assert accepted.tokens[row, : expected + 1].tolist() == predictions[row][: expected + 1]


def test_sampled_text_keeps_its_distribution() -> None:
    """Two tokens drawn through drafts that always propose token 0 are distributed as if drawn plainly."""
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([0.5, 0.3, 0.2])
    second = torch.tensor([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])  # given the first token
    n = 60_000
    choice = first.expand(n, 3).multinomial(1, generator=generator)
    # Column 1 of the window is verified behind the draft 0, so that its choice is drawn given token 0.
    after_draft = second[0].expand(n, 3).multinomial(1, generator=generator)
    drafts = torch.zeros(n, 2, dtype=torch.int64)
    accepted = accept(Proposal(drafts, torch.ones(n, dtype=torch.int64)), torch.cat([choice, after_draft], dim=1))
    again = second[accepted.tokens[:, 0]].multinomial(1, generator=generator)[:, 0]  # next round, for shorter rows
    pairs = torch.where(accepted.num_committed == 2, accepted.tokens[:, 1], again) + 3 * accepted.tokens[:, 0]
    observed = torch.bincount(pairs, minlength=9).double()
    expected = (first[:, None] * second).reshape(-1).double() * n
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001
