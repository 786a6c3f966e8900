"""What the comparison of texts excuses: a tie of the two best tokens, and nothing else."""

from __future__ import annotations

import pytest

from workloads.lossless import Difference

TIED = ((-0.7, 10), (-0.700001, 20))


@pytest.mark.parametrize(
    ("reference", "found", "best", "is_tie"),
    [
        (10, 20, TIED, True),
        (20, 10, TIED, True),
        (10, 99, TIED, False),
        (10, None, TIED, False),
        (10, 20, ((-0.7, 10), (-0.8, 20)), False),
    ],
)
def test_a_tie_is_of_the_two_best(reference: int, found: int | None, best: tuple, is_tie: bool) -> None:
    assert Difference(0, 3, reference, found, best).is_tie == is_tie
