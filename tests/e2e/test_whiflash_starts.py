"""Other ways to start a WHIFLASH server, and how it ends. Each test has a server of its own, on the bundled models, and
it is `python -m` that starts it, where other tests fork theirs (tests/zygote.py)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import time
from itertools import islice
from pathlib import Path

import httpx
import pytest

pytest.importorskip("sglang")

from transformers import AutoTokenizer

from tests.zygote import python_m
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads import server as server_module
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.demo.prompts import histories
from whiflash_workloads.lossless import generate
from whiflash_workloads.server import Server, start

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
REQUESTS = ROOT / "docs" / "requests.md"
LAUNCHER = "whiflash_sglang.launch_server"
NUM_TOKENS = 64
END_SECONDS = 30


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "target")
    return list(islice((p for session in sessions("heldout", 6) for _, p in histories(session, tokenizer)), 6))


@pytest.fixture(autouse=True)
def really(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "spawn", python_m)


@pytest.fixture
def launch(tmp_path: Path):
    """A started server that answers; what is left of it is killed at the end."""
    servers: list[Server] = []

    def launch(*flags: str) -> Server:
        servers.append(start(LAUNCHER, "--demo", *flags, log=tmp_path / f"server-{len(servers)}.log"))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()


def texts(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    return asyncio.run(generate(server.base_url, prompts, NUM_TOKENS, in_flight=3))


def totals(server: Server) -> dict:
    return httpx.get(f"{server.base_url}/server_info", timeout=600).json()["internal_states"][0]["whiflash"]


def ends(server: Server) -> bool:
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None and not server.processes():
            return True
        time.sleep(0.2)
    return False


def test_each_drafter_alone(launch, prompts):
    """One drafter is served without the other, with the same text; and the two ways in which a server ends."""
    ways = {"df": ends_with_its_scheduler, "e3": ends_soon_while_it_streams}
    both = {}
    for name, end in ways.items():
        server = launch("--whiflash-drafters", name)
        both[name] = texts(server, prompts)
        counted = totals(server)
        assert set(counted["rounds_by_drafter"]) == {name}
        assert counted["accepted_drafts"] > counted["rounds"]
        shows_little_and_a_command_that_works(server, name)
        end(server)
    assert both["df"] == both["e3"]


def shows_little_and_a_command_that_works(server: Server, drafter: str) -> None:
    """The phases in their order, one block, and a curl for the shell; SGLang's warnings, but none that are ours."""
    printed = said(server, "ready; try a request:")
    phases = [
        "importing SGLang",
        "loading the target",
        f"loading drafter {drafter}",
        "WhiFlash\n  target",
        "ready; try",
    ]
    assert [printed.index(phase) for phase in phases] == sorted(printed.index(phase) for phase in phases)
    assert "server_args=" not in printed and "Migrate the plugin" not in printed and "deprecated" not in printed
    asks(printed.partition("ready; try a request:\n")[2].splitlines()[0], server)
    documented = re.findall(r"^    (curl .*/v1/chat/completions.*)$", REQUESTS.read_text(), re.MULTILINE)
    assert len(documented) == 1
    asks(documented[0].replace("http://127.0.0.1:30000", server.base_url), server)


def asks(command: str, server: Server) -> None:
    """Send what a curl command sends: the demo's model answers by looking the order up."""
    _, url, flag, header, data, body = shlex.split(command)
    assert url == f"{server.base_url}/v1/chat/completions" and (flag, data) == ("-H", "-d")
    content = (ROOT / body.removeprefix("@")).read_bytes() if body.startswith("@") else body.encode()
    reply = httpx.post(url, headers=dict([header.split(": ")]), content=content, timeout=600)
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert "1042" in call["function"]["arguments"]


def said(server: Server, what: str) -> str:
    """The log, as soon as it has `what`."""
    deadline = time.monotonic() + END_SECONDS
    while what not in (text := server.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return text


def ends_with_its_scheduler(server: Server) -> None:
    (scheduler,) = (pid for pid in server.processes() if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(scheduler, signal.SIGKILL)
    assert ends(server), "a server without its scheduler stands and answers nobody"


def ends_soon_while_it_streams(server: Server) -> None:
    """SIGTERM: a request that would take much longer is ended as aborted, and what comes later is refused."""
    params = {"max_new_tokens": 7000, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": [5, 6, 7], "sampling_params": params, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/generate", json=body, timeout=600) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        os.kill(server.process.pid, signal.SIGTERM)
        short = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        while (late := httpx.post(f"{server.base_url}/generate", json=short, timeout=600)).status_code == 200:
            pass  # it has not heard of it yet
        assert late.status_code == 503 and "is shutting down" in late.json()["message"]
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["meta_info"]["finish_reason"]["type"] == "abort"
    assert done == "data: [DONE]"
    assert ends(server)  # how soon, `unit/test_ending.py` says


def of_type(dtype: str, folder: Path, copy: Path) -> Path:
    """A checkpoint whose config names another type for its weights."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    return copy


def test_bfloat16_and_ctrl_c(launch, prompts, tmp_path):
    """bfloat16 rounds logits, so that the text may be another; drafts are accepted all the same. Ctrl-C ends it all.

    SGLang takes each checkpoint's own type where `--dtype` names none. Drafters of another type than the target's could
    not read its features: the first request ended the scheduler.
    """
    df = of_type("float16", DEMO_MODELS / "dflash", tmp_path / "dflash")
    e3 = of_type("float16", DEMO_MODELS / "eagle3", tmp_path / "eagle3")
    drafters = (f"--speculative-draft-model-path={df}", f"--whiflash-eagle-draft={e3}")
    server = launch("--dtype=auto", "--whiflash-router", "entropy", "--whiflash-entropy-threshold", "0.1", *drafters)
    assert [len(text) for text in texts(server, prompts)] == [NUM_TOKENS] * len(prompts)
    counted = totals(server)
    assert set(counted["rounds_by_drafter"]) == {"df", "e3"}
    assert counted["accepted_drafts"] > counted["rounds"]
    os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
    assert ends(server)
