"""Records of running requests: their row states, what their rounds came to, and what is kept of a traced one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from tests.fakes import VOCAB, FakeDrafter, FakeTarget, World, plain_greedy
from whiflash_sglang.core.hints import Asked, Hints
from whiflash_sglang.core.round import DecodeRound
from whiflash_sglang.core.spans import Context, Markers, Pair, SpanReader
from whiflash_sglang.core.types import HostRows, RoundResult
from whiflash_sglang.routing import create_router
from whiflash_sglang.serving.record import Record
from whiflash_sglang.serving.totals import Totals
from whiflash_sglang.serving.trace import MAX_TRACED_ROUNDS, Trace
from whiflash_sglang.startup.config import WhiFlashConfig

THINK, CLOSE, CALL, END = range(4)
HINTS, CONTEXT = Hints(), Context()
MARKERS = Markers(Pair("<think>", "</think>"), Pair("<call>", "</call>"))
PIECES = {THINK: "<think>", CLOSE: "</think>", CALL: "<call>", END: "</call>"} | {i: f"w{i}" for i in range(4, 20)}


@pytest.fixture
def totals() -> Totals:
    return Totals(("df", "e3"), SpanReader(MARKERS, PIECES))


def record(
    totals: Totals,
    hints: Hints = HINTS,
    context: Context | None = CONTEXT,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    sampled: int | None = 5,
    trace: Trace | None = None,
) -> Record:
    return Record(totals.reader, totals.priors, Asked(hints, context), prompt, output, sampled, trace)


def rows(slots: list[int], draftable: list[bool] | None = None) -> HostRows:
    return HostRows(slots, [0] * len(slots), draftable)


def result(plan: dict[str, list[int]], window: list[list[int]], drafts: list[int], tokens: list[list[int]]):
    """`window` and `tokens` are filled up to one width here."""
    width = max(map(len, [*window, *tokens]))
    padded, verified = (torch.tensor([row + [99] * (width - len(row)) for row in part]) for part in (tokens, window))
    by_row = [next((name for name, rows in plan.items() if row in rows), None) for row in range(len(drafts))]
    return RoundResult(by_row, drafts, verified, padded, tokens, {}, {})


def test_steps_without_drafts_are_rounds_of_their_own(totals: Totals) -> None:
    trace = Trace()
    totals.begin(3, record(totals, Hints(), Context(), [], [], THINK, trace))
    steps = result({}, [[9]], [0], [[5, CLOSE, 6]])._replace(steps=3)
    totals.count(totals.with_states(rows([3])), steps, {"entropy": [0.5]})
    assert totals.steps == 3
    figures = totals.records[3].figures()
    assert (figures["rounds"], figures["accepted_drafts"], figures["switches"]) == (3, 0, 0)
    assert figures["by_span_drafter"] == {
        "reasoning": {"none": {"rounds": 2, "tokens": 2}},
        "answer": {"none": {"rounds": 1, "tokens": 1}},
    }
    seen = [(entry["tokens"], entry["accepted"], entry["entropy"]) for entry in trace.rounds]
    assert seen == [([5], 0, 0.5), ([CLOSE], 0, None), ([6], 0, None)]


def test_a_round_counts_for_the_span_in_which_it_began(totals: Totals) -> None:
    totals.begin(3, record(totals, Hints(), Context("tool_output", "get_order"), [], [], THINK, None))
    totals.begin(1, record(totals, Hints(), Context(), [], [], 7, None))
    batch = totals.with_states(rows([3, 1]))
    assert [(s.span, s.context_kind, s.tool) for s in batch.states] == [
        ("reasoning", "tool_output", "get_order"),
        ("answer", "user", None),
    ]
    totals.count(batch, result({"df": [0]}, [[9], [9]], [1, 0], [[5, CLOSE, 6], [8]]), {})
    totals.count(totals.with_states(rows([3])), result({"e3": [0]}, [[9]], [1], [[CALL, 5]]), {})
    totals.count(totals.with_states(rows([3])), result({"df": [0]}, [[9]], [1], [[5]]), {})
    figures = totals.records[3].figures()
    assert figures["by_span"] == {
        "reasoning": {"rounds": 1, "tokens": 3},
        "answer": {"rounds": 1, "tokens": 2},
        "tool_call": {"rounds": 1, "tokens": 1},
    }
    assert figures["by_span_drafter"]["answer"] == {"e3": {"rounds": 1, "tokens": 2}}
    assert (figures["context_kind"], figures["tool"], figures["hints"]) == ("tool_output", "get_order", {})
    shown = totals.snapshot()
    assert shown["by_span"]["answer"] == {"rounds": 2, "tokens": 3}
    assert shown["by_span_drafter"]["answer"] == {"none": {"rounds": 1, "tokens": 1}, "e3": {"rounds": 1, "tokens": 2}}
    assert shown["by_context"] == {"tool_output": {"rounds": 3, "tokens": 6}, "user": {"rounds": 1, "tokens": 1}}
    assert shown["by_context_span"]["tool_output"]["reasoning"] == {"rounds": 1, "tokens": 3}


def test_totals_outlive_a_slot(totals: Totals) -> None:
    for _ in range(2):
        totals.begin(0, record(totals, Hints(), Context(), [], [], 7, None))
        totals.count(totals.with_states(rows([0])), result({"df": [0]}, [[9]], [1], [[4, 5]]), {})
    assert totals.records[0].figures()["by_span"] == {"answer": {"rounds": 1, "tokens": 2}}
    assert totals.snapshot()["by_span"] == {"answer": {"rounds": 2, "tokens": 4}}


def test_hints_come_before_what_the_prompt_says(totals: Totals) -> None:
    hints = Hints("auto", "tool_call", 1.5, "mine", False)
    totals.begin(0, record(totals, hints, Context("tool_output", "get_order"), [THINK], [], 5, None))
    state = totals.with_states(rows([0])).states[0]
    assert (state.span, state.tool, state.asked_prior) == ("tool_call", "mine", 1.5)
    totals.count(totals.with_states(rows([0])), result({}, [[9]], [0], [[END]]), {})
    assert totals.with_states(rows([0])).states[0].span == "answer", "a marker takes over from the hint"


def test_a_retracted_request_goes_on_in_its_span(totals: Totals) -> None:
    """Its text is prompt and output then, and the span must not be that of the prompt's end."""
    place = record(totals, Hints(), Context(), [5, THINK], [6, CLOSE, CALL, 7], 8, None).place
    assert place.span == "tool_call"


def test_a_chunk_of_a_prompt_samples_nothing(totals: Totals) -> None:
    trace = Trace()
    record(totals, Hints(trace=True), None, [5, THINK], [], None, trace)
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
    totals: Totals, routes: list[str], draftable: list[bool] | None, expected: list[bool] | None
) -> None:
    for slot, route in enumerate(routes):
        totals.begin(slot, record(totals, Hints(route=route), Context(), [], [], 5, None))
    found = totals.with_states(rows(list(range(len(routes))), draftable)).draftable
    assert found == expected


def test_a_trace_is_every_round_as_it_was(totals: Totals) -> None:
    totals.begin(0, record(totals, Hints(trace=True), Context(), [], [], THINK, Trace()))
    totals.begin(1, record(totals, Hints(), Context(), [], [], 5, None))
    round_ = result({"e3": [1], "df": [0]}, [[THINK, 5, 6, 7], [5, 4]], [3, 1], [[5, 6, CLOSE], [4]])
    totals.count(totals.with_states(rows([0, 1])), round_, {"entropy": [0.25, 2.0]})
    assert totals.records[0].figures()["first"] == THINK
    assert totals.records[0].figures()["trace"] == [
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
    assert "trace" not in totals.records[1].figures(), "nothing is kept of who has not asked"


@pytest.mark.parametrize(("signals", "expected"), [({"score": [1.0]}, 0.5), ({"entropy": [1.0]}, None)])
def test_a_trace_shows_the_prior_where_the_router_has_a_use_for_it(
    totals: Totals, signals: dict[str, list[float]], expected: float | None
) -> None:
    totals.begin(0, record(totals, Hints(prior=0.5, trace=True), Context(), [], [], 5, Trace()))
    totals.count(totals.with_states(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6]]), signals)
    assert totals.records[0].figures()["trace"][0].get("prior") == expected


def test_a_trace_goes_on_after_a_retraction(totals: Totals) -> None:
    trace = Trace()
    totals.begin(0, record(totals, Hints(trace=True), Context(), [], [], 5, trace))
    totals.count(totals.with_states(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6, THINK]]), {})
    record(totals, Hints(trace=True), Context(), [], [5, 6, THINK], 7, trace)
    figures = trace.figures()
    assert figures["first"] == 5
    assert [entry["tokens"] for entry in figures["trace"]] == [[6, THINK], [7]]
    assert figures["trace"][1]["drafter"] == "none"
    assert figures["trace"][1]["span"] == "reasoning"


def test_a_trace_is_bounded(totals: Totals) -> None:
    totals.begin(0, record(totals, Hints(trace=True), Context(), [], [], 5, Trace()))
    for _ in range(MAX_TRACED_ROUNDS + 7):
        totals.count(totals.with_states(rows([0])), result({"df": [0]}, [[5, 6]], [1], [[6]]), {})
    figures = totals.records[0].figures()
    assert (len(figures["trace"]), figures["trace_rounds_left_out"]) == (MAX_TRACED_ROUNDS, 7)
    assert figures["by_span"]["answer"]["rounds"] == MAX_TRACED_ROUNDS + 7


def test_signals_are_asked_for_only_where_a_request_is_traced(totals: Totals) -> None:
    router = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e"), 4)
    router.keep([1], router.observe(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 0), torch.tensor([0])).tolist())
    totals.begin(0, record(totals, Hints(), Context(), [], [], 5, None))
    totals.begin(1, record(totals, Hints(trace=True), Context(), [], [], 5, Trace()))
    assert totals.signals(totals.with_states(rows([0])), router) == {}
    signals = totals.signals(totals.with_states(rows([0, 1])), router)
    assert signals["entropy"] == pytest.approx([0.0, 0.6931], abs=1e-3)
    fixed = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router="fixed:df"), 4)
    assert totals.signals(totals.with_states(rows([1])), fixed) == {}


@pytest.mark.parametrize("router", ["fixed:df", "fixed:e3", "alternate", "random:3", "entropy"])
@pytest.mark.parametrize("switched_off", [False, True])
def test_every_router_gives_requests_the_drafter_that_they_want(router: str, switched_off: bool) -> None:
    """And the text stays the plain greedy text; whoever wants a drafter that is switched off gets the other."""
    slots, routes = [0, 1, 2, 3, 4], ["auto", "e3", "off", "df", "e3"]
    world = World(6, 160)
    totals = Totals(("df", "e3"), SpanReader(Markers(), {i: "x" for i in range(VOCAB)}))
    drafters = {name: FakeDrafter(name, drafts, world, 0.6, 1) for name, drafts in (("df", 7), ("e3", 4))}
    policy = create_router(WhiFlashConfig(dflash_draft="d", eagle_draft="e", router=router), 6)
    decode = DecodeRound(policy, drafters, FakeTarget(world), world.backlog(["df", "e3"], 16))
    prompts = {slot: [slot, 5, 7] for slot in slots}
    for slot in slots:
        world.texts[slot] = [*prompts[slot], *plain_greedy(prompts[slot], 1)]
        totals.begin(slot, record(totals, Hints(route=routes[slot]), Context(), prompts[slot], [], 1, None))
    decode.prefill(world.prefill(slots), torch.randn(len(slots), VOCAB))
    if switched_off:
        decode.health.switch_off("e3")
    shuffle = random.Random(router)
    for _ in range(12):
        batch = shuffle.sample(slots, shuffle.randint(1, len(slots)))
        rows_ = world.rows(batch, 8)
        rows_ = rows_._replace(host=totals.with_states(rows_.host))
        found = decode.run(rows_)
        totals.count(rows_.host, found, {})
        drafter = {slot: name or "off" for slot, name in zip(batch, found.plan, strict=True)}
        for row, slot in enumerate(batch):
            asked = "df" if switched_off and routes[slot] == "e3" else routes[slot]
            assert drafter[slot] == asked or asked == "auto"
            world.texts[slot] += found.committed[row]
    for slot in slots:
        text = world.texts[slot][3:]
        assert text == plain_greedy(prompts[slot], len(text))
    assert sum(count["rounds"] for count in totals.snapshot()["by_span"].values()) > 12
