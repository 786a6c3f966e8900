"""Hostile requests are what they claim to be, and whose failure is whose."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from tests.stub_server import StubServer
from whiflash_workloads.stress.answers import Heard
from whiflash_workloads.stress.blame import (
    BROKEN,
    HUNG,
    LEFT,
    Outcome,
    Reference,
    answered,
    attack,
    judge,
    last_error,
)
from whiflash_workloads.stress.client import hear
from whiflash_workloads.stress.malformed import Case, cases, encoded

POST = Case("POST", "/generate", b"{}")


def test_a_seed_stands_for_its_requests() -> None:
    assert cases(30, seed=3) == cases(30, seed=3)
    assert cases(30, seed=3) != cases(30, seed=4)


def test_requests_are_for_every_endpoint_and_of_every_kind() -> None:
    drawn = cases(400, seed=1)
    assert len(drawn) == 400
    paths = {case.path for case in drawn}
    assert {"/generate", "/v1/completions", "/v1/chat/completions", "/whiflash/stats"} <= paths
    bodies = b"\n".join(case.body for case in drawn)
    for part in (b"\\ud800", b"Infinity", b"custom_params", b"tool_choice", b'"stream": true', b"json_schema"):
        assert part in bodies, part
    assert 0 < sum(case.leaves for case in drawn) < 200


def test_bodies_carry_what_json_should_not() -> None:
    assert encoded({"a": [float("nan"), "\ud800"]}) == b'{"a": [NaN, "\\ud800"]}'


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        ('data: {"text": "a"}\n\ndata: [DONE]\n\n', 200),
        ('data: {"error": {"message": "a", "code": 400}}\n\ndata: [DONE]\n\n', 400),
        ('data: {"error": {"message": "a\x85\u2028b", "code": 503}}\n\n', 503),
        ('data: {"error": {"message": "a", "code": null}}\n\n', 500),
        ('{"error": {"message": "a"}}', 200),
    ],
)
def test_an_error_event_counts_as_its_code(stream: str, status: int) -> None:
    """A message may hold characters that Python takes for the end of a line."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=stream.encode(), headers={"content-type": "text/event-stream"})

    async def run() -> Heard:
        async with httpx.AsyncClient(base_url="http://stub", transport=httpx.MockTransport(answer)) as http:
            return await hear(http, POST.request(), 5.0)

    assert Outcome.of(POST, asyncio.run(run())).status == status


@pytest.mark.parametrize(
    ("heard", "status"),
    [
        (Heard(late=True), HUNG),
        (Heard(error="ReadError: gone"), BROKEN),
        (Heard(left=True), LEFT),
        (Heard(200, left=True), LEFT),
        (Heard(500, left=True), 500),
        (Heard(200, whole=True), 200),
    ],
)
def test_outcomes_of_answers(heard: Heard, status: int) -> None:
    assert Outcome.of(POST, heard).status == status


def test_a_failure_is_named_by_its_traceback() -> None:
    log = "[2026-11-25 11:14:57] Error in request: 'x'\nTraceback (most recent call last):\n  a\nKeyError: 'length_7'\n"
    assert last_error(log) == "KeyError: .."
    assert last_error("all is well\n") is None


class FailsOn(Reference):
    """A reference that fails some bodies."""

    def __init__(self, *bodies: bytes):
        self.bodies = bodies

    def fails(self, case: Case) -> str | None:
        return "TypeError: .." if case.body in self.bodies else None


def test_what_the_reference_fails_too_is_not_ours() -> None:
    own, ours = POST._replace(body=b'{"own": 1}'), POST._replace(body=b'{"ours": 1}')
    outcomes = [Outcome(POST, 200), Outcome(own, 500), Outcome(ours, BROKEN, "gone"), Outcome(ours, 400)]
    found, failed = judge(outcomes, FailsOn(own.body))
    assert found == {"/generate TypeError: ..": 1}
    assert [(each["body"], each["status"], each["said"]) for each in failed] == [('{"ours": 1}', BROKEN, "gone")]


def test_outcomes_are_counted_by_path() -> None:
    ours = Case("GET", "/whiflash/requests/x", b"")
    outcomes = [Outcome(POST, 200), Outcome(POST, 400), Outcome(POST, LEFT), Outcome(ours, 404), Outcome(POST, 200)]
    assert answered(outcomes) == {"/generate": {"200": 2, "400": 1, "left": 1}, "/whiflash": {"404": 1}}


def test_a_server_that_has_gone_ends_the_attack() -> None:
    with StubServer() as stub:
        url = stub.base_url
    assert asyncio.run(attack(url, [POST] * 20, 4, time.monotonic() + 60)) == []


def test_time_ends_the_attack() -> None:
    assert asyncio.run(attack("http://127.0.0.1:9", [POST], 1, time.monotonic() - 1)) == []


def test_a_stub_answers() -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}).encode()
    with StubServer() as stub:
        outcomes = asyncio.run(
            attack(stub.base_url, [Case("POST", "/v1/chat/completions", body)], 1, time.monotonic() + 60)
        )
    assert [outcome.status for outcome in outcomes] == [200]
