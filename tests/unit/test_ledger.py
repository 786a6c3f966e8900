"""Records of running requests: where they stand, what their rounds came to, and what is kept of a traced one."""

from __future__ import annotations

import random

import pytest
import torch

from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, plain_greedy
from whiflash_sglang.core.hints import Hints
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.spans import Context, Markers, Pair, SpanReader
from whiflash_sglang.core.types import HostRows, RoundResult
from whiflash_sglang.routing import create_router
from whiflash_sglang.serving.ledger import MAX_TRACED_ROUNDS, Ledger, Trace
from whiflash_sglang.startup.config import WhiFlashConfig

THINK, CLOSE, CALL, END = range(4)
MARKERS = Markers(Pair("<think>", "</think>"), Pair("<call>", "</call>"))
PIECES = {THINK: "<think>", CLOSE: "</think>", CALL: "<call>", END: "</call>"} | {i: f"w{i}" for i in range(4, 20)}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(SpanReader(MARKERS, PIECES))


def rows(slots: list[int], draftable: list[bool] | None = None) -> HostRows:
    return HostRows(slots, [0] * len(slots), draftable)


def result(plan: dict[str, list[int]], window: list[list[int]], drafts: list[int], tokens: list[list[int]]):
    """`window` and `tokens` are filled up to one width here."""
    width = max(map(len, [*window, *tokens]))
    padded, verified = (torch.tensor([row + [99] * (width - len(row)) for row in part]) for part in (tokens, window))
    by_row = [next((name for name, rows in plan.items() if row in rows), None) for row in range(len(drafts))]
    return RoundResult(by_row, drafts, verified, padded, tokens, {}, {})


def test_steps_without_drafts_are_rounds_of_their_own(ledger: Ledger) -> None:
    trace = Trace()
    ledger.begin(3, ledger.record(Hints(), Context(), [], [], THINK, trace))
    steps = result({}, [[9]], [0], [[5, CLOSE, 6]])._replace(steps=3)
    ledger.count(ledger.stand(rows([3])), steps, {"entropy": [0.5]})
    assert ledger.records[3].figures()["by_span_drafter"] == {
        "reasoning": {"none": {"rounds": 2, "tokens": 2}},
        "answer": {"none": {"rounds": 1, "tokens": 1}},
    }
    seen = [(entry["tokens"], entry["accepted"], entry["entropy"]) for entry in trace.rounds]
    assert seen == [([5], 0, 0.5), ([CLOSE], 0, None), ([6], 0, None)]


def test_a_round_counts_for_the_span_in_which_it_began(ledger: Ledger) -> None:
    ledger.begin(3, ledger.record(Hints(), Context("tool_output", "get_order"), [], [], THINK, None))
    ledger.begin(1, ledger.record(Hints(), Context(), [], [], 7, None))
    standing = ledger.stand(rows([3, 1]))
    assert [(s.span, s.context_kind, s.tool) for s in standing.standings] == [
        ("reasoning", "tool_output", "get_order"),
        ("answer", "user", None),
    ]
    ledger.count(standing, result({"df": [0]}, [[9], [9]], [1, 0], [[5, CLOSE, 6], [8]]), {})
    ledger.count(ledger.stand(rows([3])), result({"e3": [0]}, [[9]], [1], [[CALL, 5]]), {})
    ledger.count(ledger.stand(rows([3])), result({"df": [0]}, [[9]], [1], [[5]]), {})
    figures = ledger.records[3].figures()
    assert figures["by_span"] == {
        "reasoning": {"rounds": 1, "tokens": 3},
        "answer": {"rounds": 1, "tokens": 2},
        "tool_call": {"rounds": 1, "tokens": 1},
    }
    assert figures["by_span_drafter"]["answer"] == {"e3": {"rounds": 1, "tokens": 2}}
    assert (figures["context_kind"], figures["tool"], figures["hints"]) == ("tool_output", "get_order", {})
    totals = ledger.snapshot()
    assert totals["by_span"]["answer"] == {"rounds": 2, "tokens": 3}
    assert totals["by_span_drafter"]["answer"] == {"none": {"rounds": 1, "tokens": 1}, "e3": {"rounds": 1, "tokens": 2}}
    assert totals["by_context"] == {"tool_output": {"rounds": 3, "tokens": 6}, "user": {"rounds": 1, "tokens": 1}}
    assert totals["by_context_span"]["tool_output"]["reasoning"] == {"rounds": 1, "tokens": 3}


def test_totals_outlive_a_slot(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.begin(0, ledger.record(Hints(), Context(), [], [], 7, None))
        ledger.count(ledger.stand(rows([0])), result({"df": [0]}, [[9]], [1], [[4, 5]]), {})
    assert ledger.records[0].figures()["by_span"] == {"answer": {"rounds": 1, "tokens": 2}}
    assert ledger.snapshot()["by_span"] == {"answer": {"rounds": 2, "tokens": 4}}


def test_hints_come_before_what_the_prompt_says(ledger: Ledger) -> None:
    hints = Hints("auto", "tool_call", 1.5, "mine", False)
    ledger.begin(0, ledger.record(hints, Context("tool_output", "get_order"), [THINK], [], 5, None))
    standing = ledger.stand(rows([0])).standings[0]
    assert (standing.span, standing.tool, standing.asked_prior) == ("tool_call", "mine", 1.5)
    ledger.count(ledger.stand(rows([0])), result({}, [[9]], [0], [[END]]), {})
    assert ledger.stand(rows([0])).standings[0].span == "answer", "a marker takes over from the hint"


def test_a_retracted_request_goes_on_in_its_span(ledger: Ledger) -> None:
    """Its text is prompt and output then, and the span must not be that of the prompt's end."""
    place = ledger.record(Hints(), Context(), [5, THINK], [6, CLOSE, CALL, 7], 8, None).place
    assert place.span == "tool_call"


def test_a_chunk_of_a_prompt_samples_nothing(ledger: Ledger) -> None:
    trace = Trace()
    ledger.record(Hints(trace=True), None, [5, THINK], [], None, trace)
    assert trace.figures()["first"] is None


@pytest.mark.parametrize(
    ("routes", "draftable", "expected"),
    [
        (["auto", "e3"], None, None),
        (["auto", "off"], None, [True, False]),
        (["auto", "off", "df"], [False, True, True], [False, False, True]),
    ],
)
def test_rows_that_want_no_drafts_may_not_be_drafted_for(
    ledger: Ledger, routes: list[str], draftable: list[bool] | None, expected: list[bool] | None
) -> None:
    for slot, route in enumerate(routes):
        ledger.begin(slot, ledger.record(Hints(route=route), Context(), [], [], 5, None))
    found = ledger.stand(rows(list(range(len(routes))), draftable)).draftable
    assert found == expected


def test_a_trace_is_every_round_as_it_was(ledger: Ledger) -> None:
    ledger.begin(0, ledger.record(Hints(trace=True), Context(), [], [], THINK, Trace()))
    ledger.begin(1, ledger.record(Hints(), Context(), [], [], 5, None))
    round_ = result({"e3": [1], "df": [0]}, [[THINK, 5, 6, 7], [5, 4]], [3, 1], [[5, 6, CLOSE], [4]])
    ledger.count(ledger.stand(rows([0, 1])), round_, {"entropy": [0.25, 2.0]})
    assert ledger.records[0].figures()["first"] == THINK
    assert ledger.records[0].figures()["trace"] == [
        {
            "drafter": "df",
            "drafts": [5, 6, 7],
            "accepted": 2,
            "tokens": [5, 6, CLOSE],
            "span": "reasoning",
            "entropy": 0.25,
            "score": None,
        }
    ]
    assert "trace" not in ledger.records[1].figures(), "nothing is kept of who has not asked"


@pytest.mark.parametrize(("signals", "expected"), [({"score": [1.0]}, 0.5), ({"entropy": [1.0]}, None)])
def test_a_trace_shows_the_prior_where_the_router_has_a_use_for_it(
    ledger: Ledger, signals: dict[str, list[float]], expected: float | None
) -> None:
    ledger.begin(0, ledger.record(Hints(prior=0.5, trace=True), Context(), [], [], 5, Trace()))
    ledger.count(ledger.stand(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6]]), signals)
    assert ledger.records[0].figures()["trace"][0].get("prior") == expected


def test_a_trace_goes_on_after_a_retraction(ledger: Ledger) -> None:
    trace = Trace()
    ledger.begin(0, ledger.record(Hints(trace=True), Context(), [], [], 5, trace))
    ledger.count(ledger.stand(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6, THINK]]), {})
    ledger.record(Hints(trace=True), Context(), [], [5, 6, THINK], 7, trace)
    figures = trace.figures()
    assert figures["first"] == 5
    assert [entry["tokens"] for entry in figures["trace"]] == [[6, THINK], [7]]
    assert figures["trace"][1]["drafter"] == "none"
    assert figures["trace"][1]["span"] == "reasoning"


def test_a_trace_is_bounded(ledger: Ledger) -> None:
    ledger.begin(0, ledger.record(Hints(trace=True), Context(), [], [], 5, Trace()))
    for _ in range(MAX_TRACED_ROUNDS + 7):
        ledger.count(ledger.stand(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6]]), {})
    figures = ledger.records[0].figures()
    assert (len(figures["trace"]), figures["trace_rounds_left_out"]) == (MAX_TRACED_ROUNDS, 7)
    assert figures["by_span"]["answer"]["rounds"] == MAX_TRACED_ROUNDS + 7


def test_signals_are_asked_for_only_where_a_request_is_traced(ledger: Ledger) -> None:
    router = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e"), 4)
    router.keep([1], router.observe(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 0), torch.tensor([0])).tolist())
    ledger.begin(0, ledger.record(Hints(), Context(), [], [], 5, None))
    ledger.begin(1, ledger.record(Hints(trace=True), Context(), [], [], 5, Trace()))
    assert ledger.signals(ledger.stand(rows([0])), router) == {}
    signals = ledger.signals(ledger.stand(rows([0, 1])), router)
    assert signals["entropy"] == pytest.approx([0.0, 0.6931], abs=1e-3)
    fixed = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router="fixed:df"), 4)
    assert ledger.signals(ledger.stand(rows([1])), fixed) == {}


@pytest.mark.parametrize("router", ["fixed:df", "fixed:e3", "alternate", "random:3", "entropy"])
@pytest.mark.parametrize("switched_off", [False, True])
def test_every_router_gives_requests_the_drafter_that_they_want(router: str, switched_off: bool) -> None:
    """And the text stays the plain greedy text; whoever wants a drafter that is switched off gets the other."""
    slots, routes = [0, 1, 2, 3, 4], ["auto", "e3", "off", "df", "e3"]
    world = World(6, 160)
    ledger = Ledger(SpanReader(Markers(), {i: "x" for i in range(VOCAB)}))
    drafters = {name: FakeDrafter(name, drafts, world, 0.6, 1) for name, drafts in (("df", 7), ("e3", 4))}
    policy = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router), 6)
    decode = DecodeRound(policy, drafters, FakeTarget(world), world.backlog(["df", "e3"], 16))
    prompts = {slot: [slot, 5, 7] for slot in slots}
    for slot in slots:
        world.texts[slot] = [*prompts[slot], *plain_greedy(prompts[slot], 1)]
        ledger.begin(slot, ledger.record(Hints(route=routes[slot]), Context(), prompts[slot], [], 1, None))
    decode.prefill(world.prefill(slots), torch.randn(len(slots), VOCAB))
    if switched_off:
        decode.health.switch_off("e3")
    shuffle = random.Random(router)
    for _ in range(12):
        batch = shuffle.sample(slots, shuffle.randint(1, len(slots)))
        rows_ = world.rows(batch, 8)
        rows_ = rows_._replace(host=ledger.stand(rows_.host))
        found = decode.run(rows_)
        ledger.count(rows_.host, found, {})
        drafter = {slot: name or "off" for slot, name in zip(batch, found.plan, strict=True)}
        for row, slot in enumerate(batch):
            asked = "df" if switched_off and routes[slot] == "e3" else routes[slot]
            assert drafter[slot] == asked or asked == "auto"
            world.texts[slot] += found.committed[row]
    for slot in slots:
        text = world.texts[slot][3:]
        assert text == plain_greedy(prompts[slot], len(text))
    assert sum(count["rounds"] for count in ledger.snapshot()["by_span"].values()) > 12
