"""Figures of finished requests: what is kept, how long, and the text of traces."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from whiflash_sglang.bridge.http_routes import Finished, TokenTexts, routes, with_texts


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
    ids = [uuid.uuid4().hex for _ in range(5)]
    for i, request_id in enumerate(ids):
        finished.keep(request_id, figures(i, traced=True))
    assert finished.get(ids[4]) == figures(4, traced=True)
    forgotten = finished.get(ids[1])
    assert forgotten is not None
    assert (forgotten["rounds"], forgotten["trace"], forgotten["trace_forgotten"]) == (1, None, True)
    assert list(finished.traces) == ids[3:]


@pytest.mark.parametrize("request_id", ["1", "job-7", "0" * 31, f"{'0' * 32}x", f"{'0' * 32}\n", "A" * 32])
def test_text_is_not_kept_under_an_id_that_can_be_guessed(request_id: str) -> None:
    """Whoever may use the server may ask for any id: a client's own `rid` would give its text to all of them."""
    finished = Finished()
    finished.keep(request_id, figures(2, traced=True))
    assert finished.get(request_id) == {
        "rounds": 2,
        "hints": {"trace": True},
        "trace": None,
        "trace_withheld": True,
    }
    assert not finished.traces


def test_ids_of_parallel_samples_are_as_good() -> None:
    finished, request_id = Finished(), f"job-7_{uuid.uuid4().hex}"
    finished.keep(request_id, figures(2, traced=True))
    assert finished.get(request_id) == figures(2, traced=True)


def test_long_ids_are_not_kept() -> None:
    """1,024 ids of 10 MB, each a client's own, would be 10 GB."""
    finished = Finished()
    finished.keep("x" * 257, figures())
    assert not finished.figures


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


def state(replica: int, rounds: int, priors: Any = None) -> dict[str, Any]:
    ranks = {"replica": replica, "size": 1}
    return {"whiflash": {"rounds": rounds}, "whiflash_priors": priors, "whiflash_ranks": ranks}


def client_of(*replicas: dict[str, Any]) -> TestClient:
    finished = Finished()
    finished.keep("abc", figures(2))

    async def states(priors: bool = False) -> list[dict[str, Any]]:
        return [{**replica, "whiflash_priors": replica["whiflash_priors"] if priors else None} for replica in replicas]

    app = FastAPI()
    app.include_router(routes(finished, states, {"model": "m", "router": "entropy"}, lambda endpoint: endpoint))
    return TestClient(app)


@pytest.fixture
def client() -> TestClient:
    return client_of(state(0, rounds=7))


def test_figures_of_several_replicas_add_up() -> None:
    """They used to be those of whichever replica answered first."""
    several = client_of(state(0, rounds=7, priors={"a": 1}), state(1, rounds=5, priors={"b": 2}))
    stats = several.get("/whiflash/stats").json()
    assert stats["rounds"] == 12
    assert [(each["ranks"]["replica"], each["rounds"]) for each in stats["replicas"]] == [(0, 7), (1, 5)]
    assert [several.get(f"/whiflash/priors?replica={n}").json() for n in (0, 1)] == [{"a": 1}, {"b": 2}]
    missing = several.get("/whiflash/priors?replica=2")
    assert missing.status_code == 404 and "has 2" in missing.json()["message"]


def test_routes(client: TestClient) -> None:
    ranks = state(0, rounds=7)["whiflash_ranks"]
    assert client.get("/whiflash/stats").json() == {"model": "m", "router": "entropy", "rounds": 7, "ranks": ranks}
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


HOSTILE = ["../../etc/passwd", "a/b", "<script>alert(1)</script>", "'; DROP TABLE x; --", "{{7*7}}", "\0"]


@pytest.mark.parametrize("request_id", HOSTILE)
def test_an_id_is_a_key_and_nothing_else(request_id: str) -> None:
    """Whatever a client gives as `rid` is found under it again, and what it does not know is no path and no markup."""
    finished = Finished()

    async def states() -> list[dict[str, Any]]:
        return []

    app = FastAPI()
    app.include_router(routes(finished, states, {}, lambda endpoint: endpoint))
    client, path = TestClient(app), f"/whiflash/requests/{quote(request_id, safe='')}"
    unknown = client.get(path)
    assert unknown.status_code == 404
    assert unknown.headers["content-type"] == "application/json"
    assert unknown.json()["message"].isprintable()
    finished.keep(request_id, figures(2))
    assert client.get(path).json() == figures(2)


def test_a_long_unknown_id_is_not_sent_back_whole(client: TestClient) -> None:
    assert len(client.get(f"/whiflash/requests/{'x' * 5000}").json()["message"]) < 300
