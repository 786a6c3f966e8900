"""The chaos run: what it asks, what it hears, and that whatever a server does wrong is found."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.scripts import load_script
from whiflash_workloads.history import Reply
from whiflash_workloads.stress.answers import Ear, Heard, message_of
from whiflash_workloads.stress.client import MAX_FAULTS, Client, hear
from whiflash_workloads.stress.reference import collect, smallest_gap
from whiflash_workloads.stress.requests import (
    BAD,
    CHAT,
    COMPLETIONS,
    GENERATE,
    KINDS,
    SAMPLED,
    Draw,
    Question,
    Request,
    as_stream,
    bad_requests,
    greedy_asks,
    pool_for,
    with_logprobs,
)
from whiflash_workloads.stress.verdicts import FAULTS, MAX_BEHIND, Tally, judge

TEXT = "Order 1042 is shipped."
QUESTIONS = [Question([5, 6, 7 + i], f"question {i}", [{"role": "user", "content": f"{i}"}], []) for i in range(12)]
ASKS = greedy_asks(QUESTIONS)
PLAIN = ASKS[0]  # /generate, of token ids
EXPECTED = {(ask.ask, streamed): (Reply(content=TEXT),) * ask.replies for ask in ASKS for streamed in (False, True)}
REFUSED = bad_requests(QUESTIONS[0], 100)[0]


# ---------------------------------------------------------------------------------------------------------- the mix


def test_every_kind_is_asked_greedily() -> None:
    assert [ask.kind for ask in ASKS] == list(KINDS)
    assert all(ask.body.get("sampling_params", ask.body)["temperature"] == 0 for ask in ASKS)
    assert PLAIN.tokens == 3 + 96
    assert next(ask for ask in ASKS if ask.kind == "two chats").tokens == 3 + 2 * 96


def test_the_pool_is_a_quarter_of_what_the_clients_need() -> None:
    assert pool_for([replace(PLAIN, tokens=100), replace(PLAIN, tokens=300)], clients=32) == 32 * 200 // 4


def drawn(seed: int, count: int = 4000) -> list[Request]:
    draw = Draw(ASKS, bad_requests(QUESTIONS[0], 100), random.Random(seed))
    return [draw.request() for _ in range(count)]


def test_what_is_drawn_is_mixed_and_the_same_for_a_seed() -> None:
    before = json.dumps([ask.body for ask in ASKS])
    requests = drawn(1)
    assert requests == drawn(1) != drawn(2)
    good = [request for request in requests if not request.refused]
    assert 1 - len(good) / len(requests) == pytest.approx(BAD, abs=0.02)
    assert sum(request.ask is None for request in good) / len(good) == pytest.approx(SAMPLED, abs=0.03)
    assert {request.fate for request in good} == {"finish", "abort", "leave"}
    params = [request.body.get("sampling_params", request.body) for request in good]
    routes = Counter(p["custom_params"]["whiflash"]["route"] if "custom_params" in p else None for p in params)
    assert set(routes) == {"auto", "e3", "df", "off", None}
    assert {(request.kind, request.streamed) for request in good} == {(k, s) for k in KINDS for s in (False, True)}
    assert json.dumps([ask.body for ask in ASKS]) == before, "an ask is as it was when its text was asked for"


def test_no_id_is_the_beginning_of_another() -> None:
    """SGLang aborts every request whose id begins with the one that it is given."""
    ids = [request.rid for request in drawn(3) if not request.refused]
    assert len(set(ids)) == len(ids) and len({len(rid) for rid in ids}) == 1


def test_bad_requests_are_of_many_kinds() -> None:
    bad = bad_requests(QUESTIONS[0], 100)
    assert len({request.kind for request in bad}) == len(bad) > 40
    assert all(request.refused and request.ask is None for request in bad)
    assert {GENERATE, CHAT, COMPLETIONS} <= {request.path for request in bad}


# ------------------------------------------------------------------------------------------------------- what is heard


def heard(path: str, *lines: Any, replies: int = 1) -> Heard:
    ear = Ear(path, replies)
    for line in lines:
        ear.line(f"data: {line if isinstance(line, str) else json.dumps(line)}")
    return ear.heard()


def generated(text: str, reason: dict[str, Any] | None) -> dict[str, Any]:
    return {"text": text, "meta_info": {"finish_reason": reason, "num_retractions": 2}}


def chunk(end: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": end}]}


def call(name: str | None, arguments: str, index: int = 0) -> list[dict[str, Any]]:
    return [{"index": index, "id": "drawn", "function": {"name": name, "arguments": arguments}}]


def test_a_stream_of_generate_repeats_its_text() -> None:
    found = heard(GENERATE, generated("Order", None), generated(TEXT, {"type": "stop"}), "[DONE]")
    assert found == Heard(
        200,
        (Reply(content=TEXT),),
        ("stop",),
        whole=True,
        meta={"finish_reason": {"type": "stop"}, "num_retractions": 2},
    )


def test_a_streamed_chat_is_put_together() -> None:
    pieces = [
        chunk(reasoning_content="I look"),
        chunk(reasoning_content=" it up."),
        chunk(tool_calls=call("get", "")),
        chunk(tool_calls=call(None, '{"id"')),
        chunk(tool_calls=call(None, ": 1}")),
        chunk("tool_calls"),
    ]
    found = heard(CHAT, *pieces, "[DONE]")
    assert found.replies == (Reply("I look it up.", "", (("", "get", '{"id": 1}'),)),)
    assert found.whole
    assert not heard(CHAT, *pieces).whole, "the stream has not ended"
    assert not heard(CHAT, *pieces[:-1], "[DONE]").whole, "the reply has not ended"


def test_each_of_two_replies_has_its_own_end() -> None:
    pieces = [{"choices": [{"index": i, "text": "a", "finish_reason": None}]} for i in (0, 1, 1)]
    ends = [{"choices": [{"index": i, "text": "", "finish_reason": "length"}]} for i in (0, 1)]
    assert heard(COMPLETIONS, *pieces, *ends, "[DONE]", replies=2).replies == (Reply(content="a"), Reply(content="aa"))
    assert not heard(COMPLETIONS, *pieces, ends[0], "[DONE]", replies=2).whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "a"}, "a"),
        ({"object": "error", "message": "a"}, "a"),
        ({"detail": "a"}, "a"),
        (" a ", "a"),
        ({}, None),
        ("", None),
        ({"error": {"message": ""}}, None),
    ],
)
def test_messages_of_errors(content: Any, message: str | None) -> None:
    assert message_of(content) == message


def test_a_refusal_in_a_stream_is_an_error_and_an_abort_is_none() -> None:
    refused = {"type": "abort", "message": "Failed to compile", "status_code": 400}
    aborted = {"type": "abort", "message": "Aborted by the client"}
    assert heard(GENERATE, generated("", refused), "[DONE]").error == "Failed to compile"
    assert heard(GENERATE, generated("a", aborted), "[DONE]").error is None
    assert heard(CHAT, {"error": {"message": "a"}}, "[DONE]").error == "a"
    assert heard(CHAT, "{no json").error == "an event that is not JSON: {no json"


# ---------------------------------------------------------------------------------------------------------- verdicts

RIGHT = Heard(200, (Reply(content=TEXT),), ("stop",), whole=True)
BEGINNING = RIGHT._replace(replies=(Reply(content="Order 10"),), ends=(None,), whole=False)
OTHER = (Reply(content="Order 1043 is shipped."),)
ABORTED = BEGINNING._replace(ends=("abort",), whole=True)
BEHIND = ABORTED._replace(replies=(Reply(content=f"{TEXT}<|im_end|>"),))
FAR_BEHIND = ABORTED._replace(replies=(Reply(content=TEXT + "a" * (MAX_BEHIND + 1)),))
NO_JSON = Heard(200, (Reply(content='{"order": 1'),), ("stop",), whole=True)


@pytest.mark.parametrize(
    ("request_", "heard_", "verdict"),
    [
        (PLAIN, RIGHT, "right"),
        (PLAIN, RIGHT._replace(replies=(Reply(content=f"\n{TEXT} "),)), "right"),
        (PLAIN, RIGHT._replace(replies=OTHER), "wrong text"),
        (PLAIN, RIGHT._replace(replies=(Reply(content="Order 10"),)), "wrong text"),
        (PLAIN, RIGHT._replace(replies=(Reply(reasoning=TEXT),)), "wrong text"),
        (PLAIN, BEGINNING, "silent"),
        (PLAIN, BEGINNING._replace(late=True), "hung"),
        (PLAIN, BEGINNING._replace(error="gone"), "failed"),
        (PLAIN, ABORTED, "failed"),
        (PLAIN, Heard(500), "silent"),
        (replace(PLAIN, fate="leave"), BEGINNING._replace(left=True), "cut short"),
        (replace(PLAIN, fate="leave"), BEHIND._replace(left=True), "wrong text"),
        (replace(PLAIN, fate="leave"), RIGHT._replace(replies=OTHER, left=True), "wrong text"),
        (replace(PLAIN, fate="leave"), BEGINNING._replace(error="gone"), "failed"),
        (replace(PLAIN, fate="abort"), ABORTED, "cut short"),
        (replace(PLAIN, fate="abort"), BEHIND, "cut short"),
        (replace(PLAIN, fate="abort"), FAR_BEHIND, "wrong text"),
        (replace(PLAIN, fate="abort"), ABORTED._replace(replies=OTHER), "wrong text"),
        (replace(PLAIN, fate="abort"), RIGHT, "right"),
        (replace(PLAIN, fate="abort"), BEGINNING, "silent"),
        (replace(PLAIN, fate="ended"), BEGINNING._replace(error="ReadError"), "cut short"),
        (replace(PLAIN, fate="ended"), BEGINNING, "silent"),
        (replace(PLAIN, ask=None), RIGHT._replace(replies=OTHER), "sampled"),
        (replace(PLAIN, ask=None, kind="json schema"), NO_JSON, "wrong text"),
        (replace(PLAIN, ask=None, kind="json schema"), NO_JSON._replace(ends=("length",)), "sampled"),
        (REFUSED, Heard(400, error="unknown field"), "refused"),
        (REFUSED, Heard(200, error="unknown field"), "refused"),
        (REFUSED, Heard(400), "silent"),
        (REFUSED, RIGHT, "accepted"),
        (REFUSED, Heard(500, error="Internal Server Error"), "crashed"),
        (REFUSED, Heard(error="ConnectError"), "crashed"),
        (REFUSED, Heard(late=True), "hung"),
    ],
)
def test_verdicts(request_: Request, heard_: Heard, verdict: str) -> None:
    assert judge(request_, heard_, EXPECTED) == verdict


def test_calls_are_compared_but_for_their_ids() -> None:
    expected = {(0, False): (Reply(calls=(("a", "get", "{}"),)),)}
    for name, verdict in (("get", "right"), ("set", "wrong text")):
        found = RIGHT._replace(replies=(Reply(calls=(("b", name, "{}"),)),))
        assert judge(PLAIN, found, expected) == verdict


def test_a_fault_is_shown() -> None:
    tally = Tally()
    for reply in (RIGHT, RIGHT._replace(replies=OTHER)):
        tally.add(PLAIN, reply, EXPECTED)
    (fault,) = tally.faults
    assert (fault["kind"], fault["replies"], fault["expected"]) == ("ids", [OTHER[0].text], [TEXT])
    assert tally.requests == 2 and tally.count(*FAULTS) == 1


# ----------------------------------------------------------------------------------------------------------- clients


class Stub:
    """A server of texts; `fault` is what it does wrong with every good request."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.aborted: list[str] = []
        paths = {GENERATE: self.answer, CHAT: self.answer, COMPLETIONS: self.answer, "/abort_request": self.abort}
        self.app = Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()])

    def connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://stub")

    async def abort(self, request: HttpRequest) -> Response:
        self.aborted.append((await request.json())["rid"])
        return Response()

    async def answer(self, request: HttpRequest) -> Response:
        body = await request.json()
        if body.get("custom_params", {}).get("whiflash", {}).get("nobody"):
            return JSONResponse({"message": "" if self.fault == "no message" else "unknown field"}, 400)
        if self.fault == "hang":
            await asyncio.sleep(60)
        if self.fault == "500":
            return JSONResponse({"error": {"message": "no"}}, 500)
        text = "Order 1043 is shipped." if self.fault == "wrong text" else TEXT
        path, replies = request.url.path, body.get("n", 1)
        if not body.get("stream"):
            if path == GENERATE:
                return JSONResponse(generated(text, {"type": "stop"}))
            said = {"message": {"content": text}, "text": text, "finish_reason": "stop"}
            return JSONResponse({"choices": [{"index": i, **said} for i in range(replies)]})

        async def pieces() -> Any:
            for i in range(replies):
                said = {"index": i, "delta": {"content": text}, "text": text, "finish_reason": "stop"}
                piece = generated(text, {"type": "stop"}) if path == GENERATE else {"choices": [said]}
                yield f"data: {json.dumps(piece)}\n\n"
            if self.fault != "no end":
                yield "data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")


def loaded(
    stub: Stub,
    asks: list[Request],
    bad: list[Request],
    deadline_s: float = 60.0,
    done: Callable[[Tally], bool] = lambda tally: False,
) -> Tally:
    """The tally of a load that lasts until it is `done`, or has too many faults."""

    async def run() -> Tally:
        async with stub.connect() as http:
            client = Client(http, EXPECTED, deadline_s)
            draw = Draw(asks, bad, random.Random(1))
            while not done(client.tally) and client.tally.count(*FAULTS) < MAX_FAULTS:
                await client.load(draw, clients=4, until=asyncio.get_running_loop().time() + 0.3)
            return client.tally

    return asyncio.run(run())


def test_a_server_that_does_right_has_no_faults() -> None:
    stub = Stub()
    asks = [ask for ask in ASKS if ask.kind != "json schema"]

    def all_seen(tally: Tally) -> bool:
        return bool(stub.aborted) and all(map(tally.count, ("right", "sampled", "cut short", "refused")))

    tally = loaded(stub, asks, [REFUSED], done=all_seen)
    assert tally.count(*FAULTS) == 0, tally.faults


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [("wrong text", "wrong text"), ("hang", "hung"), ("500", "failed"), ("no end", "silent"), ("no message", "silent")],
)
def test_planted_faults_are_found_and_end_the_load(fault: str, verdict: Any) -> None:
    tally = loaded(Stub(fault), ASKS[:1], [REFUSED], deadline_s=0.05 if fault == "hang" else 60.0)
    assert tally.verdicts[verdict] > 0
    assert MAX_FAULTS <= tally.count(*FAULTS) < MAX_FAULTS + 4


def test_a_server_that_is_not_there_is_heard_as_an_error() -> None:
    async def run() -> Heard:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:9") as http:
            return await hear(http, PLAIN, 5.0)

    found = asyncio.run(run())
    assert found.status is None and found.error is not None and found.error.startswith("ConnectError")


def test_what_is_not_streamed_is_left_by_the_clock() -> None:
    async def run() -> Heard:
        async with Stub("hang").connect() as http:
            return await hear(http, replace(PLAIN, fate="leave", cut_at=1), 5.0)

    found = asyncio.run(run())
    assert found.left and not found.late


# --------------------------------------------------------------------------------------------------------- reference


def test_the_smallest_gap_of_two_best_tokens() -> None:
    generate = {
        "meta_info": {"output_top_logprobs": [[[-0.1, 5, None], [-2.0, 6, None]], [[-0.7, 5, ""], [-0.8, 6, ""]]]}
    }
    best = [{"top_logprobs": [{"logprob": -0.1}, {"logprob": -0.15}]}, {"top_logprobs": [{"logprob": -0.1}]}]
    chat = {"choices": [{"logprobs": {"content": best}}]}
    completions = {"choices": [{"logprobs": {"top_logprobs": [{"a": -0.5, "b": -0.9}, {"a": -0.1}]}}]}
    assert smallest_gap(GENERATE, generate) == pytest.approx(0.1)
    assert smallest_gap(CHAT, chat) == pytest.approx(0.05)
    assert smallest_gap(COMPLETIONS, completions) == pytest.approx(0.4)
    assert all(with_logprobs(ask) != ask.body for ask in ASKS)


def test_texts_that_rounding_may_change_are_left_out() -> None:
    class Judged(Stub):
        async def answer(self, request: HttpRequest) -> Response:
            body = await request.json()
            if not body.get("return_logprob"):
                return await super().answer(request)
            gap = 1e-6 if body["input_ids"] == PLAIN.body["input_ids"] else 1.0
            best = [[[-0.5, 1, None], [-0.5 - gap, 2, None]]]
            return JSONResponse({"meta_info": {"output_top_logprobs": best}})

    asks = [ask for ask in ASKS if ask.path == GENERATE]

    async def run(stub: Stub) -> Any:
        async with stub.connect() as http:
            return await collect(http, asks, 2, 5.0)

    known = asyncio.run(run(Judged()))
    assert [ask.ask for ask in known.asks] == [ask.ask for ask in asks[1:]]
    assert known.left_out["near tie"] == 1
    assert known.expected[asks[1].ask, True] == (Reply(content=TEXT),)
    with pytest.raises(ValueError, match="the reference server's answer to ids #0"):
        asyncio.run(run(Judged("no end")))


# ------------------------------------------------------------------------------------------------- what it comes to


@pytest.fixture(scope="module")
def chaos() -> Any:
    return load_script("chaos")


def phases(chaos: Any) -> dict[str, Any]:
    """Of a server without faults."""

    def one(switched_off: dict[str, int]) -> Any:
        mixed = {"right": 5, "sampled": 3, "cut short": 2, "refused": 1}
        tally = Tally(Counter(mixed), retractions=1)
        end = chaos.Ending(5.0, 0, Tally(Counter({"right": 1, "cut short": 3})), True)
        counted = {"backlog_max": 16, "switched_off": switched_off}
        probed = {"ingested_by_drafter": {"df": 9, "e3": 9}}
        memory = [100.0, 900.0, 1000.0, 1000.0, 1001.0, 1001.0]
        return chaos.Phase(tally, 0, True, memory, counted, Tally(Counter({"right": 2})), probed, end)

    return {"load": one({}), "poisoned": one({"e3": 1})}


def test_a_run_without_faults_passes(chaos: Any) -> None:
    figures = chaos.figures(phases(chaos), "e3")
    assert all(figures["checks"].values()), figures["checks"]
    assert (figures["requests"], figures["failed_with_error"], figures["leaked_slots"]) == (34, 2, 0)
    assert figures["rss_growth_mb"] == 1.0


def plant(path: str, value: Any) -> Any:
    """Set an attribute, or an item, of a phase."""

    def planted(found: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = found
        for name in way:
            place = place[name] if isinstance(place, dict) else getattr(place, name)
        if isinstance(place, dict):
            place[last] = value
        else:
            setattr(place, last, value)

    return planted


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (plant("load.tally.verdicts.wrong text", 1), ["none_wrong_text"]),
        (plant("poisoned.tally.verdicts.wrong text", 1), ["none_wrong_text"]),
        (plant("poisoned.probes.verdicts.hung", 1), ["none_hung"]),
        (plant("load.end.streams.verdicts.silent", 1), ["none_silent"]),
        (plant("load.tally.verdicts.accepted", 1), ["none_accepted"]),
        (plant("load.tally.verdicts.crashed", 1), ["none_crashed"]),
        (plant("load.tally.verdicts.failed", 1), ["none_failed"]),
        (plant("load.leaked", 8), ["no_slot_leaked"]),
        (plant("load.alive", False), ["servers_lived", "no_backlog_left"]),
        (plant("load.probed.ingested_by_drafter.e3", 8), ["no_backlog_left"]),
        (plant("load.memory", [100.0, 900.0, 1000.0, 1000.0, 1031.0, 1031.0]), ["memory_flat"]),
        (plant("load.tally.retractions", 0), ["requests_were_retracted"]),
        (plant("poisoned.counted.switched_off", {}), ["poisoned_drafter_switched_off"]),
        (plant("load.end.seconds", 10.1), ["stopped_in_time"]),
        (plant("poisoned.end.processes_left", 1), ["no_process_left"]),
        (plant("load.end.late_refused", False), ["late_requests_refused"]),
        (plant("load.tally.verdicts.sampled", 0), ["load_was_mixed"]),
    ],
)
def test_each_planted_fault_fails_its_check(chaos: Any, fault: Any, checks: list[str]) -> None:
    found = phases(chaos)
    fault(found)
    figures = chaos.figures(found, "e3")
    assert [name for name, holds in figures["checks"].items() if not holds] == checks


def test_a_server_that_died_is_told_of(chaos: Any) -> None:
    found = phases(chaos)
    found["load"] = chaos.Phase(Tally(Counter({"failed": 20})))
    figures = chaos.figures(found, "e3")
    assert not figures["checks"]["servers_lived"] and not figures["checks"]["stopped_in_time"]
    assert figures["leaked_slots"] is None and figures["rss_growth_mb"] is None


def test_bounds_of_the_run(chaos: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--minutes", "19"], "at most 18"), (["--questions", "5"], "12 questions")):
        monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments])
        with pytest.raises(SystemExit):
            chaos.main()
        assert said in capsys.readouterr().err


def test_streams_of_an_ask_are_the_ask() -> None:
    assert as_stream(PLAIN).streamed and not PLAIN.streamed
    assert as_stream(PLAIN, False).body == {**PLAIN.body, "stream": False}
