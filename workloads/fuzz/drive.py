"""What a server made of hostile requests: each one's outcome, and whose doing an outcome of 5xx was.

    figures = fuzz(base_url, reference, cases, prompts, in_flight=8, until=deadline)
    all(figures["checks"].values())

The reference is the same server with `--whiflash-router off`. A request that it answers with 5xx too, or dies of, is
SGLang's own; any other is ours. A stream cannot change its status any more: an error event in it counts as its status.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from whiflash_workloads import server
from whiflash_workloads.fuzz.cases import Case
from whiflash_workloads.tokens import TokenIds

REQUEST_S = 120.0
IDLE_S = 60.0
BROKEN, HUNG, LEFT = 599, 598, 0  # instead of a status: the connection ended early; no answer in time; the client left
PROBE_TOKENS = 48
MAX_SHOWN = 20  # failures: enough to see what is wrong
HEADERS = {"Content-Type": "application/json"}


class Outcome(NamedTuple):
    case: Case
    status: int
    said: str = ""

    @property
    def failed(self) -> bool:
        return self.status >= 500


async def attack(
    base_url: str, cases: Iterable[Case], in_flight: int, until: float, headers: dict[str, str] | None = None
) -> list[Outcome]:
    """Send `cases` in order, until the time `until` (monotonic) or the server's end."""
    outcomes: list[Outcome] = []
    waiting = iter(cases)  # shared: each worker takes the next
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a broken one breaks no other

    async def work(client: httpx.AsyncClient) -> None:
        for case in waiting:
            if time.monotonic() > until:
                return
            try:
                outcomes.append(await send(client, case))
            except httpx.ConnectError:  # it has ended
                return

    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_S, limits=limits, headers=headers) as client:
        await asyncio.gather(*(work(client) for _ in range(in_flight)))
    return outcomes


async def send(client: httpx.AsyncClient, case: Case) -> Outcome:
    """Send a case and read the reply. Raises httpx.ConnectError if the server has ended."""
    try:
        async with client.stream(case.method, case.path, content=case.body, headers=HEADERS) as reply:
            if case.leaves:
                return Outcome(case, reply.status_code if reply.status_code >= 500 else LEFT)
            said = (await reply.aread()).decode(errors="replace")
    except httpx.TimeoutException:
        return Outcome(case, HUNG, f"no answer in {REQUEST_S:.0f} s")
    except httpx.ConnectError:
        raise
    except httpx.TransportError as error:
        return Outcome(case, BROKEN, repr(error))
    return Outcome(case, max(reply.status_code, error_in(said)), said)


def error_in(stream: str) -> int:
    """The greatest code of the error events of a stream; 0 without any."""
    codes = [0]
    for line in stream.split("\n"):  # of all line ends the one that JSON escapes
        if line.startswith('data: {"error"'):
            code = json.loads(line.removeprefix("data: "))["error"].get("code")
            codes.append(code if isinstance(code, int) else 500)
    return max(codes)


def fuzz(
    base_url: str,
    reference: Reference,
    cases: Sequence[Case],
    prompts: Sequence[TokenIds],
    in_flight: int,
    until: float,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Send the cases; whether the server is alive and right afterwards, and who failed which."""
    texts = greedy_texts(reference.url(), prompts)
    before = greedy_texts(base_url, prompts, headers)
    outcomes = asyncio.run(attack(base_url, cases, in_flight, until, headers))
    try:
        idle = is_idle(base_url, headers)
        after = greedy_texts(base_url, prompts, headers)
    except httpx.HTTPError:
        # Whichever were last may have ended it; the reference would start anew for each of them.
        return {
            "checks": {"alive": False},
            "cases": len(outcomes),
            "last": [described(outcome) for outcome in outcomes[-2 * in_flight :]],
        }
    own, ours = judge(outcomes, reference)
    checks = {
        "alive": True,
        "every_case_was_sent": len(outcomes) == len(cases),
        "no_5xx_of_ours": not ours,
        "idle_afterwards": idle,
        "same_texts_as_before": after == before,
        "same_texts_as_off": after == texts,
    }
    return {
        "checks": checks,
        "cases": len(outcomes),
        "answered": answered(outcomes),
        "sglang_own": dict(own.most_common()),
        "ours": ours[:MAX_SHOWN],
    }


def greedy_texts(base_url: str, prompts: Sequence[TokenIds], headers: dict[str, str] | None = None) -> list[list[int]]:
    """Of prompts one after the other."""
    found = []
    with httpx.Client(base_url=base_url, headers=headers, timeout=REQUEST_S) as client:
        for prompt in prompts:
            params = {"temperature": 0, "max_new_tokens": PROBE_TOKENS, "ignore_eos": True}
            reply = client.post("/generate", json={"input_ids": prompt, "sampling_params": params})
            found.append(reply.raise_for_status().json()["output_ids"])
    return found


class Reference:
    """The server that decides, started when it is first asked, and anew where a request has ended it."""

    def __init__(self, module: str, *arguments: str, log: Path):
        self.module, self.arguments, self.log = module, arguments, log
        self.running: server.Server | None = None

    def url(self) -> str:
        """The reference server's URL. Starts it if it has ended."""
        if self.running is None or self.running.process.poll() is not None:
            self.stop()
            self.running = server.start(self.module, *self.arguments, log=self.log)
            self.running.wait_until_ready()
        return self.running.base_url

    def fails(self, case: Case) -> str | None:
        """How the reference fails a request: the last line of the traceback in its log, or what it said."""
        url = self.url()
        logged = self.log.stat().st_size
        deadline = time.monotonic() + REQUEST_S
        try:
            (outcome,) = asyncio.run(attack(url, [case._replace(leaves=False)], 1, deadline))
        except ValueError:  # it was not sent
            return None
        if not outcome.failed:
            return None
        with self.log.open("rb") as file:
            file.seek(logged)
            error = last_error(file.read().decode(errors="replace")) or outcome.said[:120]
        if outcome.status in (BROKEN, HUNG) and not is_alive(url):
            self.stop()  # a server whose scheduler has ended fails whatever comes, until it has ended itself
        return error

    def stop(self) -> None:
        """Stop the reference server."""
        if self.running is not None:
            self.running.stop()
            self.running = None


def last_error(log: str) -> str | None:
    """`TypeError: must be real number, not str` of the last traceback, without what differs from case to case."""
    errors = re.findall(r"^(?:\[[^]]*\] )?([A-Za-z_.]*(?:Error|Exception|Exceeded)\b.*)$", log, flags=re.MULTILINE)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "..", errors[-1])[:120] if errors else None


def judge(outcomes: Sequence[Outcome], reference: Reference) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Failed requests that are SGLang's own, by path and error; and those that are ours."""
    own: Counter[str] = Counter()
    ours: list[dict[str, Any]] = []
    for outcome in outcomes:
        if not outcome.failed:
            continue
        error = reference.fails(outcome.case)
        if error is not None:
            own[f"{outcome.case.path} {error}"] += 1
        else:
            ours.append(described(outcome))
    return own, ours


def described(outcome: Outcome) -> dict[str, Any]:
    """An outcome, for the JSON line."""
    case = outcome.case
    body = case.body[:2000].decode(errors="replace")
    return {"request": f"{case.method} {case.path}", "body": body, "status": outcome.status, "said": outcome.said[:500]}


def answered(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many of each path's requests had which status."""
    names = {BROKEN: "broken", HUNG: "hung", LEFT: "left"}
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        path = "/whiflash" if outcome.case.path.startswith("/whiflash") else outcome.case.path
        found.setdefault(path, Counter())[names.get(outcome.status, str(outcome.status))] += 1
    return {path: dict(sorted(counts.items())) for path, counts in sorted(found.items())}


def is_alive(base_url: str) -> bool:
    """Whether a token is still generated."""
    try:
        return httpx.get(f"{base_url}/health_generate", timeout=REQUEST_S).status_code == 200
    except httpx.HTTPError:
        return False


def is_idle(base_url: str, headers: dict[str, str] | None = None) -> bool:
    """Whether the server comes to rest: no request runs or waits, and no KV slot is held but by the cache."""
    deadline = time.monotonic() + IDLE_S
    while time.monotonic() < deadline:
        reply = httpx.get(f"{base_url}/v1/loads", params={"include": "core"}, headers=headers, timeout=REQUEST_S)
        now = reply.raise_for_status().json()["loads"][0]
        if now["num_running_reqs"] + now["num_waiting_reqs"] + now["num_used_tokens"] == 0:
            return True
        time.sleep(0.3)
    return False
