"""Priors: which biases are chosen from what was seen, the file, and what routers make of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learned import cost_table, identity, record
from tests.unit.test_cost_aware import Gains, chosen, result, rows
from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.core.hints import Asked, Hints
from whiflash_sglang.core.spans import Context
from whiflash_sglang.core.types import HostRows, RowState
from whiflash_sglang.routing.cost_aware import CostAwareRouter
from whiflash_sglang.routing.exploration import LOOK_EVERY, TRY_EVERY, TrialRouter
from whiflash_sglang.routing.priors import (
    MAX_BIAS,
    MAX_ROUNDS,
    MAX_TOOLS,
    Place,
    Priors,
    document,
    load_priors,
    save_priors,
)
from whiflash_sglang.routing.threshold import ThresholdRouter
from whiflash_sglang.routing.yields import Yields
from whiflash_sglang.serving.record import Record
from whiflash_sglang.serving.totals import Totals
from whiflash_sglang.training.fit_priors import biases, fit_priors, margin_of
from whiflash_sglang.training.walk import walk

ANSWER = Place("tool_output", "answer", None)
LOOKUP = ANSWER._replace(tool="lookup")


def seen(priors: Priors, place: Place, gain: float, differences: list[float]) -> None:
    for difference in differences:
        priors.add(place, gain, difference)


def test_a_place_where_the_score_is_wrong_gets_a_bias() -> None:
    """The score says -1, and e3 gains 2 to 3 there."""
    priors = Priors()
    seen(priors, ANSWER, -1.0, [2.0, 3.0] * 20)
    priors.settle(margin=0.25)
    assert -1.0 + priors.bias(*ANSWER) > 0.25
    assert priors.bias("user", "answer", None) == 0.0


def test_a_score_that_is_wrong_where_it_does_not_matter_keeps_the_last_word() -> None:
    """It is off by four tokens on average, but every choice is the right one."""
    priors = Priors()
    seen(priors, ANSWER, 1.0, [5.0] * 40)
    seen(priors, ANSWER, -1.0, [-5.0] * 10)
    priors.settle(margin=0.25)
    assert priors.bias(*ANSWER) == 0.0


def test_the_bias_stands_in_the_middle_of_what_is_worth_the_same() -> None:
    """Rounds of score -1 are e3's, those of -2 are not: any bias above 1.25 up to 2.25 parts them. At the end of that
    range a score that is off by a little would have sent either kind the wrong way."""
    priors = Priors()
    seen(priors, ANSWER, -1.0, [2.0, 3.0] * 20)
    seen(priors, ANSWER, -2.0, [-2.0, -3.0] * 20)
    priors.settle(margin=0.25)
    bias = priors.bias(*ANSWER)
    assert bias == pytest.approx(1.875)
    for off in (-0.5, 0.3):
        assert -1.0 + off + bias > 0.25 >= -2.0 + off + bias


def test_of_two_ranges_the_nearer_is_taken_and_none_where_nothing_is_better() -> None:
    priors = Priors()
    seen(priors, ANSWER, -1.0, [2.0, 3.0] * 20)
    seen(priors, ANSWER, -2.0, [0.25] * 20)  # exactly the margin: sending them to e3 or not is worth the same
    priors.settle(margin=0.25)
    assert 1.25 < priors.bias(*ANSWER) <= 3.0
    few = Priors()
    seen(few, ANSWER, 1.0, [3.0] * 40)
    few.settle(margin=0.25)
    assert few.bias(*ANSWER) == 0.0, "the middle of no change is no change"


def test_chance_is_no_evidence() -> None:
    """No bias is right more often than not where e3 gains nothing on average: at most a few of 100 places get one."""
    dice, biased = random.Random(1), 0
    for _ in range(100):
        priors = Priors()
        for _ in range(60):
            priors.add(ANSWER, dice.uniform(-2, 2), dice.choice([-3.0, 3.0]))
        priors.settle(margin=0.0)
        biased += priors.bias(*ANSWER) != 0.0
    assert biased <= 15
    few = Priors()
    seen(few, ANSWER, -1.0, [4.0] * 7)
    few.settle(margin=0.25)
    assert few.bias(*ANSWER) == 0.0


def test_a_tool_has_what_any_tool_has_unless_it_is_surely_another_matter() -> None:
    priors = Priors()
    seen(priors, ANSWER._replace(tool="other"), -1.0, [2.0, 3.0] * 20)
    seen(priors, LOOKUP, -1.0, [-2.0, 2.0] * 2)
    priors.settle(margin=0.25)
    usual = priors.bias(*ANSWER)
    assert usual > 0
    assert priors.bias(*LOOKUP) == usual
    assert priors.bias(*ANSWER._replace(tool="never seen")) == usual
    seen(priors, LOOKUP, -1.0, [-2.0, -3.0] * 8)
    priors.settle(margin=0.25)
    assert -1.0 + priors.bias(*LOOKUP) <= 0.25 < -1.0 + priors.bias(*ANSWER._replace(tool="other"))


def test_what_is_kept_is_bounded() -> None:
    priors = Priors()
    for number in range(2 * MAX_TOOLS):
        priors.add(ANSWER._replace(tool=f"tool{number}"), 0.0, 1.0)
    assert len(priors.tools) == MAX_TOOLS
    assert priors.places[ANSWER].rounds == 2 * MAX_TOOLS
    priors = Priors()
    seen(priors, ANSWER, -9.0, [9.0] * (3 * MAX_ROUNDS))
    priors.settle(margin=0.25)
    assert priors.places[ANSWER].rounds <= MAX_ROUNDS
    assert abs(priors.bias(*ANSWER)) <= MAX_BIAS


def test_what_was_long_ago_fades() -> None:
    priors = Priors()
    seen(priors, ANSWER, -1.0, [3.0] * MAX_ROUNDS)
    priors.settle(margin=0.25)
    assert priors.bias(*ANSWER) > 0
    seen(priors, ANSWER, -1.0, [-3.0] * 2 * MAX_ROUNDS)
    priors.settle(margin=0.25)
    assert priors.bias(*ANSWER) == 0.0


def test_trials_teach_what_replays_would_have() -> None:
    """e3 yields 6 tokens and df 4, each with some scatter; of a trial only one of both is known."""
    dice, priors = random.Random(2), Priors()
    for _ in range(400):
        drafter = dice.choice(["df", "e3"])
        tokens = dice.choice([4, 8]) if drafter == "e3" else dice.choice([2, 6])
        priors.add_trial(LOOKUP, -0.5, drafter, tokens, usual_tokens=9.0)
    (found,) = priors.places[LOOKUP].seen.values()
    assert found.difference / found.rounds == pytest.approx(2.0, abs=0.6)
    priors.settle(0.3, LOOKUP)
    assert priors.bias(*LOOKUP) > 0.8


# ---- the file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    priors = Priors()
    seen(priors, LOOKUP, -1.0, [2.0, 3.0] * 20)
    priors.add_trial(ANSWER, 0.4, "e3", 7, 5.0)
    priors.settle(margin=0.25)
    save_priors(tmp_path / "priors.json", {"entropy": priors}, identity(), sessions=40)
    return tmp_path / "priors.json"


def test_what_is_saved_is_loaded(file: Path) -> None:
    content = json.loads(file.read_text())
    priors = load_priors(str(file), "entropy", identity())
    assert document({"entropy": priors}, identity(), sessions=40) == content
    assert priors.bias(*LOOKUP) > 0
    before = priors.bias(*LOOKUP)
    priors.settle(margin=0.25)
    assert priors.bias(*LOOKUP) == before, "evidence was saved with the biases"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "is 'x' version 1"),
        ({"scores": {}}, "has priors for no score, not for entropy"),
        ({"scores": {"neural": []}}, "has priors for neural, not for entropy"),
        ({"scores": {"entropy": [{}]}}, "missing or ill-typed field"),
        ({"scores": {"entropy": {"a": 1}}}, "missing or ill-typed field"),
        ({"models": {**identity().to_json(), "target": "other"}}, "made for another target"),
        ({"span": "song"}, "unknown place 'tool_output', 'song'"),
        ({"tool": 7}, "`tool` must be null or a name"),
        ({"bias": float("nan")}, "NaN or infinite"),
        ({"bias": 99}, "a bias beyond 3.0 tokens"),
        ({"trials": "many"}, "ill-typed"),
        ({"seen": [[0, 0, 0, 0]]}, "0.0 rounds"),
        ({"seen": [[1, 2]]}, "ill-typed"),
    ],
)
def test_refused_by_name(file: Path, changes: dict[str, Any], message: str) -> None:
    content = json.loads(file.read_text())
    if set(changes) <= set(content):
        content.update(changes)
    else:
        content["scores"]["entropy"][0].update(changes)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="--whiflash-priors") as caught:
        load_priors(str(file), "entropy", identity())
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; create it with .*calibrate --priors FILE"):
        load_priors(str(tmp_path / "nowhere.json"), "entropy", identity())


# ---- learned from replays


def test_priors_from_replays_yield_more_on_them() -> None:
    """Half of the replies are e3's, and the score does not see which."""
    ours = [record(df=[2, 1, 1] * 20, e3=[5, 4, 3] * 20, session=f"a{i}", span=2) for i in range(4)]
    others = [record(df=[6, 4, 2] * 20, e3=[3, 2, 1] * 20, session=f"b{i}", span=1) for i in range(4)]
    records, gain, ms = ours + others, np.full(8 * 60, -0.5), {"df": 10.0, "e3": 11.0}
    priors = fit_priors(records, gain, ms)
    assert priors.bias("user", "tool_call", None) > 0.5
    assert priors.bias("user", "reasoning", None) == 0.0
    margin = margin_of(records, gain, ms)
    without = walk(records, gain > margin, ms).tokens_per_ms
    assert walk(records, gain + biases(records, priors) > margin, ms).tokens_per_ms > 1.2 * without


# ---- in the routers


def state(prior: float = 0.0, route: str = "auto", tool: str | None = "lookup") -> RowState:
    return RowState("answer", "tool_output", tool, 0.0, route, prior)


class Tokens(Gains):
    in_tokens = True


def test_a_request_carries_the_prior_of_its_place() -> None:
    priors = Priors()
    seen(priors, LOOKUP, -1.0, [2.0, 3.0] * 20)
    priors.settle(margin=0.25)
    totals = Totals(("df", "e3"), priors=priors)
    asked = Asked(Hints(prior=0.5), Context("tool_output", "lookup"))
    totals.begin(3, Record(totals.reader, totals.priors, asked, [], [], None))
    (found,) = totals.with_states(HostRows([3], [256])).states or ()
    assert (found.prior, found.asked_prior) == (priors.bias(*LOOKUP), 0.5)


@pytest.mark.parametrize("kind", ["threshold", "costs"])
def test_the_share_of_rounds_that_priors_decide(kind: str) -> None:
    """Of two rows one goes elsewhere with its prior."""
    score = Tokens([0.0, 0.0])
    router = (
        ThresholdRouter(score, 1.0)
        if kind == "threshold"
        else CostAwareRouter(score, cost_table(none=500.0), Yields({"df": 5.0, "e3": 5.0}))
    )
    batch = rows(2)._replace(states=(state(9.0), state(-9.0)._replace(span="reasoning")))
    for _ in range(2 * LOOK_EVERY):
        assert chosen(router.route(batch)) == {"df": [1], "e3": [0]}
    assert router.share.snapshot() == {
        "tool_output": {"answer": {"rounds": 2, "decided": 2}, "reasoning": {"rounds": 2, "decided": 0}}
    }


def test_a_row_is_tried_now_and_then() -> None:
    priors = Priors()
    router = TrialRouter(ThresholdRouter(Tokens([-1.0]), 0.0), priors, 5.0)
    batch = rows(1)._replace(states=(state(),))
    e3_rounds = 0
    for _ in range(100 * TRY_EVERY):
        plan = router.route(batch)
        e3_rounds += "e3" in plan
        router.learn(batch, result(plan, [7 if "e3" in plan else 4]), 10.0)
    tried = priors.places[LOOKUP].trials
    assert 70 <= tried <= 95, "fewer, the more is known"
    assert 0.25 * tried <= e3_rounds <= 0.75 * tried, "a coin"
    assert priors.bias(*LOOKUP) > 0.75, "and it has learned from it"


def test_where_much_is_known_little_is_tried() -> None:
    priors = Priors()
    for _ in range(2000):
        priors.add(LOOKUP, -1.0, -3.0)
    router = TrialRouter(ThresholdRouter(Tokens([-1.0]), 0.0), priors, 5.0)
    batch = rows(1)._replace(states=(state(),))
    for _ in range(100 * TRY_EVERY):
        router.learn(batch, result(router.route(batch), [4]), 10.0)
    assert 2 <= priors.places[LOOKUP].trials <= 25


def test_who_asks_for_a_drafter_is_not_tried() -> None:
    router = TrialRouter(ThresholdRouter(Tokens([-1.0, -1.0]), 0.0), Priors(), 5.0)
    batch = rows(2)._replace(states=(state(route="df"), state()))
    asked = rows(2)._replace(states=(state(route="df"), state(route="df")))
    for _ in range(20 * TRY_EVERY):
        assert chosen(router.route(batch)).get("e3") in (None, [1])
        assert chosen(router.route(asked)) == {"df": [0, 1]}


def test_no_drafts_no_trials() -> None:
    priors = Priors()
    router = TrialRouter(
        CostAwareRouter(Tokens([0.0]), cost_table(df=100.0, e3=100.0, none=1.0), Yields({"df": 2.0, "e3": 2.0})),
        priors,
        2.0,
    )
    batch = rows(1)._replace(states=(state(),))
    for _ in range(3 * TRY_EVERY):
        plan = router.route(batch)
        router.learn(batch, result(plan, [2]), 100.0 if any(plan) else 1.0)
    assert sum(evidence.trials for place, evidence in priors.places.items() if place.tool is None) <= 1, (
        "but where drafts are tried anyway"
    )


def test_a_drafter_that_was_switched_off_is_not_judged() -> None:
    priors = Priors()
    router = TrialRouter(ThresholdRouter(Tokens([-1.0]), 0.0), priors, 5.0)
    batch = rows(1)._replace(states=(state(),))
    for _ in range(20 * TRY_EVERY):
        router.route(batch)
        router.learn(batch, result(["df"], [4]), 10.0)  # e3 is gone
    assert 0 < priors.places[LOOKUP].trials < 20
