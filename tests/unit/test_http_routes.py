"""Figures of finished requests: what is kept, how long, and the text of traces."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from whiflash_sglang.http_routes import Finished, TokenTexts, routes, with_texts


def figures(rounds: int = 1, traced: bool = False) -> dict[str, Any]:
    hints = {"trace": True} if traced else {}
    trace = {"first": "a", "trace": [{"tokens": ["b"]}] * rounds, "trace_rounds_left_out": 0} if traced else {}
    return {"rounds": rounds, "hints": hints, **trace}


def test_the_oldest_requests_are_forgotten() -> None:
    finished = Finished(max_requests=3)
    for i in range(5):
        finished.keep(f"r{i}", figures(i))
    assert [finished.get(f"r{i}") and finished.get(f"r{i}")["rounds"] for i in range(5)] == [None, None, 2, 3, 4]


def test_an_id_that_comes_again_is_the_newest() -> None:
    finished = Finished(max_requests=2)
    for request_id, rounds in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        finished.keep(request_id, figures(rounds, traced=rounds == 1))
    assert finished.get("b") is None
    assert finished.get("a") == figures(3), "the trace of its first request is gone with it"


def test_fewer_traces_than_figures_are_kept() -> None:
    finished = Finished(max_requests=4, max_traces=2)
    for i in range(5):
        finished.keep(f"r{i}", figures(i, traced=True))
    assert finished.get("r4") == figures(4, traced=True)
    forgotten = finished.get("r1")
    assert forgotten is not None
    assert (forgotten["rounds"], forgotten["trace"], forgotten["trace_forgotten"]) == (1, None, True)
    assert set(finished.traces) == {"r3", "r4"}


def decode(tokens: Any) -> str:
    """Bytes as tokens, and a tokenizer that drops a space at the beginning."""
    return bytes(tokens).decode(errors="replace").removeprefix(" ")


TEXTS = TokenTexts(decode, b"a")


@given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text))
def test_token_texts_join_to_the_text(text: str) -> None:
    assert "".join(TEXTS(text.encode())) == text


def test_the_last_token_of_a_character_has_it() -> None:
    assert TEXTS(" é€!".encode()) == [" ", "", "é", "", "", "€", "!"]


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    assert TEXTS([0xC3]) == ["\ufffd"]
    assert "".join(TEXTS([0xFF] * 9 + [65])).endswith("A")


def test_characters_may_lie_across_rounds() -> None:
    euro = "€".encode()
    rounds = [{"tokens": list(euro[1:2]), "drafts": [65]}, {"tokens": [euro[2], 66], "drafts": []}]
    shown = with_texts({"first": euro[0], "trace": rounds}, TEXTS)
    assert shown["first"] == ""
    assert [entry["tokens"] for entry in shown["trace"]] == [[""], ["€", "B"]]
    assert shown["trace"][0]["drafts"] == ["A"]
    assert with_texts({"first": None, "trace": []}, TEXTS)["first"] is None


@pytest.fixture
def client() -> TestClient:
    finished = Finished()
    finished.keep("abc", figures(2))

    async def state() -> dict[str, Any]:
        return {"whiflash": {"rounds": 7}, "whiflash_priors": None}

    app = FastAPI()
    app.include_router(routes(finished, state, {"model": "m", "router": "entropy"}, lambda endpoint: endpoint))
    return TestClient(app)


def test_routes(client: TestClient) -> None:
    assert client.get("/whiflash/stats").json() == {"model": "m", "router": "entropy", "rounds": 7}
    assert client.get("/whiflash/requests/abc").json() == figures(2)


def test_a_server_without_priors_says_how_to_have_some(client: TestClient) -> None:
    reply = client.get("/whiflash/priors")
    assert reply.status_code == 404
    assert "--whiflash-priors learned" in reply.json()["message"]


def test_a_request_that_is_not_known(client: TestClient) -> None:
    reply = client.get("/whiflash/requests/nobody")
    assert reply.status_code == 404
    assert "nobody" in reply.json()["message"]
    assert "last 1024 finished" in reply.json()["message"]
