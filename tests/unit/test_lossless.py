"""What the comparison of texts excuses: a tie of the two best tokens, and nothing else."""

from __future__ import annotations

import pytest

from whiflash_workloads.lossless import Difference

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


def test_rounding_may_be_coarser_than_float32_s() -> None:
    """In bfloat16 two logits that are 0.008 apart are as good as equal."""
    near = Difference(0, 3, 10, 20, ((-0.7, 10), (-0.708, 20)))
    assert not near.is_tie and near.is_tie_within(1e-2)
    assert not Difference(0, 3, 10, 99, near.best).is_tie_within(1e-2)
