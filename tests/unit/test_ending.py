"""A server that is told to end: requests may finish, then they are aborted; new ones are refused."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from whiflash_sglang.bridge import shutdown as ending
from whiflash_sglang.bridge.shutdown import RefuseWhenEnding, requests_have_ended

BOUNDS = (ending.FINISH_SECONDS, ending.ABORT_SECONDS, ending.WRITE_SECONDS)


class Manager:
    """Whose requests end by themselves, when they are aborted, or never."""

    def __init__(self, ends_after: float | None, abortable: bool = True) -> None:
        self.gracefully_exit = False
        self.rid_to_state: dict[str, Any] = {"a": None}
        self.ends_after = ends_after
        self.abortable = abortable
        self.aborts = 0

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        assert (rid, abort_all) == ("", True)
        self.aborts += 1
        if self.abortable:
            self.rid_to_state.clear()

    async def serve(self) -> None:
        await asyncio.sleep(0.05)
        self.gracefully_exit = True
        if self.ends_after is not None:
            await asyncio.sleep(self.ends_after)
            self.rid_to_state.clear()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"LOOK_SECONDS": 0.005, "FINISH_SECONDS": 0.2, "ABORT_SECONDS": 0.1, "WRITE_SECONDS": 0.02}
    for name, seconds in times.items():
        monkeypatch.setattr(ending, name, seconds)


class Clockless(asyncio.SelectorEventLoop):
    """Whose time is what was slept, so that it is the same on any machine."""

    def __init__(self) -> None:
        super().__init__(selector := selectors.SelectSelector())
        self.now, select = 0.0, selector.select

        def sleep(timeout: float | None = None) -> Any:
            self.now += timeout or 0.0
            return select(0)

        selector.select = sleep  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now


def ended(manager: Manager) -> tuple[bool, float]:
    async def run() -> bool:
        serving = asyncio.create_task(manager.serve())
        gone = await requests_have_ended(manager)
        serving.cancel()
        return gone

    with asyncio.Runner(loop_factory=Clockless) as runner, pytest.MonkeyPatch.context() as patch:
        loop = runner.get_loop()
        patch.setattr(ending.time, "monotonic", loop.time)
        return runner.run(run()), loop.time()


def test_requests_that_end_in_time_are_left_alone() -> None:
    manager = Manager(ends_after=0.05)
    gone, seconds = ended(manager)
    assert gone and manager.aborts == 0 and 0.1 <= seconds < 0.15


def test_the_others_are_aborted() -> None:
    manager = Manager(ends_after=None)
    gone, seconds = ended(manager)
    assert gone and manager.aborts == 1 and 0.25 <= seconds < 0.3


def test_a_request_that_cannot_be_aborted_is_not_waited_for() -> None:
    manager = Manager(ends_after=None, abortable=False)
    gone, seconds = ended(manager)
    assert not gone and 0.35 <= seconds < 0.4


def test_the_bounds_leave_time_within_ten_seconds() -> None:
    assert sum(BOUNDS) < 6.5


def test_new_requests_are_refused_with_what_to_do() -> None:
    told = [False]
    paths = ("/generate", "/abort_request", "/health")
    routes = [Route(path, lambda request: PlainTextResponse("served"), methods=["GET", "POST"]) for path in paths]
    app = Starlette(routes=routes)
    app.add_middleware(RefuseWhenEnding, is_ending=lambda: told[0])
    client = TestClient(app)
    assert client.post("/generate", json={}).text == "served"
    told[0] = True
    refused = client.post("/generate", json={})
    assert refused.status_code == 503 and "another server" in refused.json()["message"]
    assert client.post("/abort_request", json={}).text == "served"
    assert client.get("/health").text == "served"
