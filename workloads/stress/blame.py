"""Sends malformed requests, and finds whose fault each 5xx is.

    figures = fuzz(base_url, reference, cases, prompts, in_flight=8, until=deadline)
    all(figures["checks"].values())

The reference is the same server with `--whiflash-router off`. If it answers a request with 5xx too, or ends, the fault
is SGLang's own; otherwise it is ours.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from whiflash_workloads import server
from whiflash_workloads.stress.answers import Heard
from whiflash_workloads.stress.client import hear
from whiflash_workloads.stress.malformed import Case
from whiflash_workloads.stress.servers import idle_load
from whiflash_workloads.tokens import TokenIds

REQUEST_S = 120.0
BROKEN, HUNG, LEFT = 599, 598, 0  # instead of a status: connection lost, no answer in time, the client left
PROBE_TOKENS = 48
MAX_SHOWN = 20  # failures: enough to see what is wrong


class Outcome(NamedTuple):
    case: Case
    status: int  # or BROKEN, HUNG, LEFT
    said: str = ""

    @property
    def failed(self) -> bool:
        return self.status >= 500

    @classmethod
    def of(cls, case: Case, heard: Heard) -> Outcome:
        """The outcome of an answer. The status of a stream is fixed when it begins; its error events count too."""
        if heard.late:
            return cls(case, HUNG, f"no answer in {REQUEST_S:.0f} s")
        status = BROKEN if heard.status is None else max(heard.status, heard.code)
        if heard.left and (heard.status is None or status < 500):
            status = LEFT
        return cls(case, status, heard.error or "")


async def attack(
    base_url: str, cases: Iterable[Case], in_flight: int, until: float, headers: dict[str, str] | None = None
) -> list[Outcome]:
    """Send `cases` in order, until the time `until` (monotonic) or the server's end."""
    outcomes: list[Outcome] = []
    waiting = iter(cases)  # shared: each worker takes the next
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a broken connection is not reused

    async def work(http: httpx.AsyncClient) -> None:
        for case in waiting:
            if time.monotonic() > until:
                return
            heard = await hear(http, case.request(), REQUEST_S)
            if heard.status is None and (heard.error or "").startswith("ConnectError"):  # the server has ended
                return
            outcomes.append(Outcome.of(case, heard))

    async with httpx.AsyncClient(base_url=base_url, timeout=None, limits=limits, headers=headers) as http:
        await asyncio.gather(*(work(http) for _ in range(in_flight)))
    return outcomes


def fuzz(
    base_url: str,
    reference: Reference,
    cases: Sequence[Case],
    prompts: Sequence[TokenIds],
    in_flight: int,
    until: float,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Send the cases, and check that the server is alive and right afterwards. Figures for the JSON line."""
    texts = greedy_texts(reference.url(), prompts)
    before = greedy_texts(base_url, prompts, headers)
    outcomes = asyncio.run(attack(base_url, cases, in_flight, until, headers))
    try:
        idle, _ = idle_load(base_url, headers)
        after = greedy_texts(base_url, prompts, headers)
    except httpx.HTTPError:
        # One of the last cases ended it. The reference would have to restart for each of them.
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
    """The greedy texts of prompts, one at a time."""
    found = []
    with httpx.Client(base_url=base_url, headers=headers, timeout=REQUEST_S) as client:
        for prompt in prompts:
            params = {"temperature": 0, "max_new_tokens": PROBE_TOKENS, "ignore_eos": True}
            reply = client.post("/generate", json={"input_ids": prompt, "sampling_params": params})
            found.append(reply.raise_for_status().json()["output_ids"])
    return found


class Reference:
    """The server that decides. Started when it is first needed, and again if a request has ended it."""

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
        """How the reference fails a request: the exception in its log, else its message. None if it does not."""
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
            self.stop()  # its scheduler has ended, so every request would fail
        return error

    def stop(self) -> None:
        """Stop the reference server."""
        if self.running is not None:
            self.running.stop()
            self.running = None


def last_error(log: str) -> str | None:
    """The last exception of a log, such as `TypeError: must be real number`, without details of the case."""
    errors = re.findall(r"^(?:\[[^]]*\] )?([A-Za-z_.]*(?:Error|Exception|Exceeded)\b.*)$", log, flags=re.MULTILINE)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "..", errors[-1])[:120] if errors else None


def judge(outcomes: Sequence[Outcome], reference: Reference) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Failed requests: those that are SGLang's own, by path and error, and those that are ours."""
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
    """Number of requests by path and status."""
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
