"""What drafters are expected to yield: levels, trust, and who learns from whose rounds."""

from __future__ import annotations

import pytest

from whiflash_sglang.core.types import HostRows, RowState
from whiflash_sglang.routing.yields import DF, E3, MOST, Yields

LENGTHS = {DF: 6.0, E3: 5.0}


def state(span: str = "answer", kind: str = "user") -> RowState:
    return RowState(span, kind, None, 0.0, "auto")


def rounds(
    yields: Yields, drafter: str, tokens: int, count: int, gain: float = 0.0, span: str = "answer", slot: int = 0
) -> int:
    """So many rounds of one request that commit `tokens`; its length afterwards."""
    length = 100
    for _ in range(count):
        rows = HostRows([slot], [length], None, [state(span)])
        yields.learn(rows, yields.expect(rows, [gain]), [drafter or None], [tokens])
        yields.advance(rows, [tokens])
        length += tokens
    return length


def expected(yields: Yields, length: int, gain: float = 0.0, span: str = "answer", slot: int = 0) -> dict[str, float]:
    (row,) = yields.expect(HostRows([slot], [length], None, [state(span)]), [gain])
    return dict(row.tokens)


def test_at_first_the_score_is_believed() -> None:
    assert expected(Yields(LENGTHS), 100, gain=-2.0) == {DF: 6.0, E3: 4.0}
    assert expected(Yields(LENGTHS), 100, gain=-9.0)[E3] == 1.0, "a round commits one token at least"


def test_what_is_never_accepted_is_expected_no_more() -> None:
    for drafter in (DF, E3):
        yields = Yields(LENGTHS)
        length = rounds(yields, drafter, 1, 30, gain=4.0)
        assert expected(yields, length, gain=4.0)[drafter] < 1.3


def test_a_drafters_rounds_say_half_as_much_of_the_other() -> None:
    yields = Yields(LENGTHS)
    length = rounds(yields, DF, 1, 8)
    found = expected(yields, length)
    assert found[DF] < found[E3] < 5.0


def test_requests_are_told_apart() -> None:
    """One client sends text that no drafter knows, beside another whose text all know."""
    yields = Yields(LENGTHS)
    lengths = [100, 100]
    for _ in range(60):
        rows = HostRows([0, 1], lengths, None, [state(), state()])
        yields.learn(rows, yields.expect(rows, [0.0, 0.0]), [DF, DF], [1, 6])
        yields.advance(rows, [1, 6])
        lengths = [lengths[0] + 1, lengths[1] + 6]
    strange, known = yields.expect(HostRows([0, 1], lengths, None, [state(), state()]), [0.0, 0.0])
    assert strange.tokens[DF] < 2.0 and known.tokens[DF] > 4.5


def test_a_new_request_begins_with_what_others_at_its_place_have_come_to() -> None:
    yields = Yields(LENGTHS)
    rounds(yields, DF, 1, 30)
    assert expected(yields, 7)[DF] < 1.3, "the same slot, another length"
    assert expected(yields, 7, slot=3)[DF] < 1.3
    assert expected(yields, 7, span="reasoning", slot=4)[DF] == 6.0, "nothing was seen there"


def test_levels_follow_what_scores_leave_out() -> None:
    """Where e3 gains, df accepts little: that is where a score sends rows to e3."""
    yields = Yields(LENGTHS)
    length = 100
    for turn in range(400):
        gain, drafter, tokens = (2.0, E3, 4) if turn % 4 == 0 else (-2.0, DF, 7)
        rows = HostRows([0], [length], None, [state()])
        yields.learn(rows, yields.expect(rows, [gain]), [drafter], [tokens])
        yields.advance(rows, [tokens])
        length += tokens
    open_text, sure_text = expected(yields, length, gain=2.0), expected(yields, length, gain=-2.0)
    assert open_text[E3] == pytest.approx(4.0, abs=0.7) and open_text[DF] == pytest.approx(2.0, abs=0.7)
    assert sure_text[DF] == pytest.approx(7.0, abs=0.7) and sure_text[E3] == pytest.approx(5.0, abs=0.7)


def test_strange_text_says_nothing_about_levels() -> None:
    yields = Yields(LENGTHS)
    rounds(yields, DF, 1, 300)
    assert not yields.levels or min(level.drafts for level in yields.levels.values()) > 4.0


def test_trust_is_bounded() -> None:
    yields = Yields({DF: 1.0, E3: 1.0})
    length = rounds(yields, DF, 16, 200)
    (row,) = yields.expect(HostRows([0], [length], None, [state()]), [0.0])
    assert row.trust[DF] <= MOST


def test_rounds_without_drafts_say_nothing() -> None:
    yields = Yields(LENGTHS)
    length = rounds(yields, "", 1, 100)
    assert expected(yields, length) == {DF: 6.0, E3: 6.0}
