"""A server among people who do not trust each other: keys, hostile requests, model folders that bring code.

One server with both keys and metrics, from copies of the bundled models whose folders name code to be run; and the
reference without speculation that decides whose doing a 5xx is. `make fuzz` is the long form.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("sglang")

from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads.server import Server, start
from whiflash_workloads.stress.blame import Reference, fuzz
from whiflash_workloads.stress.malformed import cases
from whiflash_workloads.stress.servers import load
from whiflash_workloads.tokens import heldout_histories

pytestmark = pytest.mark.e2e

LAUNCHER = "whiflash_sglang.launch_server"
NUM_CASES = 300
KEY, ADMIN_KEY = "key-of-users", "key-of-operators"
USER = {"Authorization": f"Bearer {KEY}"}
OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}
SMALL = ("--context-length", "1024", "--max-total-tokens", "16384")
SECRET = "xyzzy"  # the text of a request that others must not see
FLAGS = {
    "target": "--model-path",
    "dflash": "--speculative-draft-model-path",
    "eagle3": "--whiflash-eagle-draft",
}


def with_code(models: Path, evidence: Path) -> list[str]:
    """Copies of the bundled models whose folders name classes of a module of theirs; the flags that serve them."""
    flags = []
    for name, flag in FLAGS.items():
        folder = models / name
        shutil.copytree(DEMO_MODELS / name, folder)
        (folder / "bait.py").write_text(f"from pathlib import Path\nPath({str(evidence)!r}).write_text('run')\n")
        for file, classes in (
            ("config.json", {"AutoConfig": "bait.Config", "AutoModel": "bait.M", "AutoModelForCausalLM": "bait.M"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["bait.T", None]}),
        ):
            if (folder / file).is_file():
                content = json.loads((folder / file).read_text())
                (folder / file).write_text(json.dumps(content | {"auto_map": classes}))
        flags += [flag, str(folder)]
    return flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Reference]:
    off = ("--whiflash-router", "off", "--disable-overlap-schedule")
    found = Reference(LAUNCHER, "--demo", *SMALL, *off, log=folder / "off.log")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    models = with_code(folder / "models", folder / "evidence")
    keys = ("--api-key", KEY, "--admin-api-key", ADMIN_KEY)
    router = ("--whiflash-router", "random:1", "--enable-metrics")
    running = start(LAUNCHER, "--demo", *SMALL, *models, *keys, *router, log=folder / "server.log")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def base_url(server: Server) -> str:
    return server.base_url


def chat(base_url: str, **more: object) -> dict:
    messages = [{"role": "user", "content": f"where is order 1042? {SECRET}"}]
    body = {"model": "whiflash-demo", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    reply = httpx.post(f"{base_url}/v1/chat/completions", json=body, headers=USER, timeout=600)
    return reply.raise_for_status().json()


# Keys


@pytest.mark.parametrize("path", ["stats", "priors", "requests/x", "requests/a/b", "nothing"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_our_routes_are_shut_without_a_key(base_url: str, path: str, method: str) -> None:
    wrong = {"Authorization": f"Bearer {KEY}x"}
    for headers in ({}, wrong, {"Authorization": KEY}):
        reply = httpx.request(method, f"{base_url}/whiflash/{path}", headers=headers, timeout=600)
        assert reply.status_code == 401


def test_a_user_sees_figures_and_an_operator_what_was_learned(base_url: str) -> None:
    """Priors name tools, which are words of requests."""
    get = lambda path, headers: httpx.get(f"{base_url}/{path}", headers=headers, timeout=600)  # noqa: E731
    assert get("whiflash/stats", USER).json()["router"] == "random:1"
    assert get("whiflash/requests/x", USER).status_code == 404
    assert get("whiflash/priors", USER).status_code == 401
    reply = get("whiflash/priors", OPERATOR)
    assert reply.status_code == 404 and "--whiflash-priors" in reply.json()["message"]


def test_server_info_shows_neither_keys_nor_priors(base_url: str) -> None:
    """SGLang shows all arguments there, to every user the operator's key."""
    for path in ("server_info", "get_server_info"):
        reply = httpx.get(f"{base_url}/{path}", headers=USER, timeout=600)
        assert KEY not in reply.text and ADMIN_KEY not in reply.text
        assert "whiflash_priors" not in reply.text
        assert reply.json()["internal_states"][0]["whiflash"]["rounds"] >= 0


# Code and addresses


def test_no_code_of_a_model_folder_is_run(base_url: str, folder: Path) -> None:
    assert chat(base_url)["choices"][0]["finish_reason"] in ("length", "stop")
    assert not (folder / "evidence").exists()


def test_only_this_machine_is_listened_to(server: Server, base_url: str) -> None:
    """Every listening socket of every process of the server but one: torch's rendezvous, which cannot be told where to
    listen (docs/security.md)."""
    parent = psutil.Process(server.process.pid)
    listening = {
        process.pid: [
            connection.laddr.ip
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        for process in (parent, *parent.children(recursive=True))
    }
    assert listening.pop(parent.pid) == ["127.0.0.1"]
    elsewhere = [ip for ips in listening.values() for ip in ips if ip not in ("127.0.0.1", "::1")]
    assert len(elsewhere) <= 1


# Other people's text


def test_a_trace_is_for_who_knows_its_id(base_url: str) -> None:
    traced = {"custom_params": {"whiflash": {"trace": True}}}
    own = chat(base_url, **traced)
    kept = httpx.get(f"{base_url}/whiflash/requests/{own['id']}", headers=USER, timeout=600).json()
    assert kept["first"] is not None and kept["trace"] is not None
    chosen = chat(base_url, rid="job-1", **traced)
    assert chosen["id"] == "job-1"
    withheld = httpx.get(f"{base_url}/whiflash/requests/job-1", headers=USER, timeout=600).json()
    assert (withheld["trace"], withheld["trace_withheld"], withheld.get("first")) == (None, True, None)
    assert withheld["completion_tokens"] == chosen["usage"]["completion_tokens"]


def test_a_client_that_chose_its_id_has_the_trace_in_its_reply(base_url: str) -> None:
    params = {"max_new_tokens": 8, "temperature": 0, "custom_params": {"whiflash": {"trace": True}}}
    body = {"rid": "job-2", "text": "where is", "sampling_params": params}
    reply = httpx.post(f"{base_url}/generate", json=body, headers=USER, timeout=600).raise_for_status().json()
    (figures,) = reply["meta_info"]["whiflash"]
    tokens = [figures["first"], *(token for entry in figures["trace"] for token in entry["tokens"])]
    assert "".join(tokens).startswith(reply["text"])


def test_an_id_that_is_in_use_is_nobody_elses(base_url: str) -> None:
    """Two clients that give the same `rid`: the second is refused while the first is served, and replaces its figures
    when it has ended."""

    def job(tokens: int) -> dict:
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return {"rid": "job-3", "text": "where is", "sampling_params": params}

    replies: list[httpx.Response] = []

    def ask(body: dict) -> None:
        replies.append(httpx.post(f"{base_url}/generate", json=body, headers=USER, timeout=600))

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, job(900))
        deadline = time.monotonic() + 60
        while load(base_url, USER)["num_running_reqs"] == 0:
            assert time.monotonic() < deadline and not first.done()
            time.sleep(0.02)
        ask(job(3))
        httpx.post(f"{base_url}/abort_request", json={"rid": "job-3"}, headers=OPERATOR, timeout=600)
        first.result(60)
    second = replies[0]
    assert second.status_code == 400 and "Duplicate request ID" in second.text
    ask(job(3))
    kept = httpx.get(f"{base_url}/whiflash/requests/job-3", headers=USER, timeout=600).json()
    assert kept["completion_tokens"] == 3


def test_no_text_in_totals_and_metrics(base_url: str) -> None:
    """Not even the tool's name, which is a word of the request."""
    hints = {"whiflash": {"tool": f"tool_{SECRET}", "trace": True}}
    messages = [
        {"role": "user", "content": SECRET},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": f"f_{SECRET}", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": SECRET},
    ]
    chat(base_url, custom_params=hints)
    chat(base_url, messages=messages, rid=f"rid-{SECRET}")
    assert "whiflash_span_rounds" in httpx.get(f"{base_url}/metrics", timeout=600).text, "metrics are open to everybody"
    for path in ("metrics", "whiflash/stats", "server_info", "v1/loads"):
        reply = httpx.get(f"{base_url}/{path}", headers=USER, timeout=600)
        assert reply.status_code == 200 and SECRET not in reply.text, path


# Hostile requests


def test_hostile_requests_do_no_harm(base_url: str, reference: Reference) -> None:
    prompts = [histories[0] for histories in heldout_histories(4)]
    figures = fuzz(base_url, reference, cases(NUM_CASES, seed=20), prompts, 8, time.monotonic() + 240, USER)
    assert all(figures["checks"].values()), figures
    assert figures["cases"] == NUM_CASES
    assert {"200", "400"} <= set(figures["answered"]["/generate"]), "what is sent is not refused whole"


KILLERS = [
    {"input_ids": [-1]},
    {"input_ids": [10**6]},
    {"input_ids": [[], [5]], "sampling_params": {"max_new_tokens": 1}},
    {"text": "a", "sampling_params": {"json_schema": {"type": "object"}}},
    {"text": "a", "sampling_params": {"is_normalized": True}},
    {"text": "a", "sampling_params": {"top_k": 2**40}},
    {"text": "a", "sampling_params": {"n": 10**9}},
    {"text": "a", "sampling_params": {"logit_bias": {"5": 1e39}}},
    {"text": "a", "sampling_params": {"logit_bias": {"5": float("nan")}}},
    {"text": "a", "sampling_params": {"stop_token_ids": [10**6], "min_new_tokens": 1}},
    {"text": "a", "sampling_params": {"repetition_penalty": 1e-45}},
    {"text": "a", "sampling_params": {"regex": "\0"}},
]


@pytest.mark.parametrize("body", KILLERS, ids=lambda body: json.dumps(body)[:60])
def test_what_ends_sglang_is_answered_with_400(base_url: str, body: dict) -> None:
    content = json.dumps(body).encode()
    headers = USER | {"Content-Type": "application/json"}
    reply = httpx.post(f"{base_url}/generate", content=content, headers=headers, timeout=600)
    assert reply.status_code == 400, reply.text
    assert chat(base_url)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_grammar_that_allows_nothing_fails_its_request_only(base_url: str, temperature: float) -> None:
    params = {"ebnf": "root ::= root", "max_new_tokens": 4, "temperature": temperature}
    reply = httpx.post(f"{base_url}/generate", json={"text": "a", "sampling_params": params}, headers=USER, timeout=600)
    assert reply.json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert chat(base_url)["usage"]["completion_tokens"] > 0
