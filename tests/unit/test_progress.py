"""The line that says how to ask the server comes when it answers, not before."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest

from whiflash_sglang.startup import progress


@pytest.mark.parametrize("status", [200, 401])
def test_ready_is_said_when_the_server_answers(
    status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It refuses connections at first, then is not ready; 401 is a server that wants its key."""
    answers: list[httpx.Response | Exception] = [
        httpx.ConnectError("refused"),
        httpx.Response(503),
        httpx.Response(status),
    ]
    waits: list[str] = []

    def get(client: httpx.Client, url: str) -> httpx.Response:
        assert url == "http://127.0.0.1:31000/model_info"
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(httpx.Client, "get", get)
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(capsys.readouterr().out))
    args = SimpleNamespace(url=lambda: "http://127.0.0.1:31000", ssl_verify=lambda: True)
    progress.say_when_ready(args, "curl ...")
    assert waits == ["", ""], "nothing is said before"
    assert capsys.readouterr().out.endswith("WHIFLASH: ready; try a request:\n  curl ...\n")
