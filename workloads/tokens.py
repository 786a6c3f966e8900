"""Requests as token ids, for measurements independent of chat templates and parsers.

Unlike the OpenAI API, SGLang's `/generate` returns cached tokens and output ids. This repository's checks use `ask`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.report import Totals, difference, sum_of

TIMEOUT_SECONDS = 600.0
TOKENIZER = Path(__file__).resolve().parents[1] / "whiflash_sglang" / "demo_models" / "target"

TokenIds = list[int]


@dataclass(frozen=True)
class Answers:
    """A server's answers to a list of prompts."""

    texts: list[TokenIds]
    prompt_tokens: int
    cached_tokens: int  # prompt tokens found in the radix tree
    wall_s: float
    totals: Totals | None  # WHIFLASH's counters over these requests; None for other servers

    @property
    def tokens(self) -> int:
        """Number of output tokens."""
        return sum(map(len, self.texts))

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round; 1 without speculation."""
        if self.totals is None:
            return 1.0
        return 1 + float(self.totals["accepted_drafts"]) / float(self.totals["rounds"])


def heldout_histories(num_sessions: int, tokenizer_path: Path = TOKENIZER) -> list[list[TokenIds]]:
    """Prompts of held-out demo sessions as token ids: per session, the history before every assistant turn."""
    from transformers import AutoTokenizer

    from whiflash_workloads.demo.prompts import histories

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    return [[prompt for _, prompt in histories(s, tokenizer)] for s in sessions("heldout", num_sessions)]


def ask(
    base_url: str,
    prompts: Sequence[TokenIds],
    num_tokens: int | Sequence[int],
    in_flight: int = 1,
    sampling: dict[str, Any] | None = None,
) -> Answers:
    """Generate greedily, at most `num_tokens` tokens (one number, or [prompts]), `in_flight` requests at a time.

    `sampling` is merged into SGLang's sampling parameters. Raises httpx.HTTPError.
    """
    before = totals(base_url)
    began = time.perf_counter()
    replies = asyncio.run(post(base_url, prompts, num_tokens, in_flight, sampling))
    wall_s = time.perf_counter() - began
    after = totals(base_url)
    return Answers(
        [reply["output_ids"] for reply in replies],
        sum(reply["meta_info"]["prompt_tokens"] for reply in replies),
        sum(reply["meta_info"]["cached_tokens"] for reply in replies),
        wall_s,
        difference(after, before) if after is not None and before is not None else None,
    )


def totals(base_url: str) -> Totals | None:
    """WHIFLASH's counters, summed over replicas; None for other servers. Raises httpx.HTTPError."""
    reply = httpx.get(f"{base_url}/server_info", timeout=TIMEOUT_SECONDS)
    reply.raise_for_status()
    states = reply.json().get("internal_states") or [{}]
    found = [state["whiflash"] for state in states if "whiflash" in state]  # one of each replica
    return sum_of(found) if found else None


@dataclass(frozen=True)
class Streamed:
    """One streamed text."""

    tokens: TokenIds
    arrivals_s: list[float]  # [tokens] since the request; tokens of one chunk have the same time
    about: dict[str, Any]  # SGLang's meta_info


def stream(base_url: str, prompt: TokenIds, num_tokens: int, sampling: dict[str, Any] | None = None) -> Streamed:
    """Like `ask` for one prompt, with the arrival time of each token."""
    params = {"temperature": 0, "max_new_tokens": num_tokens, **(sampling or {})}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True}
    tokens: TokenIds = []
    arrivals: list[float] = []
    about: dict[str, Any] = {}
    began = time.perf_counter()
    with httpx.stream("POST", f"{base_url}/generate", json=body, timeout=TIMEOUT_SECONDS) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line.removeprefix("data: "))
            if "error" in piece:
                raise httpx.HTTPError(f"{base_url}: {piece['error']}")
            tokens, about = piece["output_ids"], piece["meta_info"]  # the whole text so far
            arrivals += [time.perf_counter() - began] * (len(tokens) - len(arrivals))
    return Streamed(tokens, arrivals, about)


async def post(
    base_url: str,
    prompts: Sequence[TokenIds],
    num_tokens: int | Sequence[int],
    in_flight: int = 1,
    sampling: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Like `ask`, returning SGLang's raw replies."""
    lengths = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    turnstile = asyncio.Semaphore(in_flight)

    async def one(client: httpx.AsyncClient, prompt: TokenIds, length: int) -> dict[str, Any]:
        async with turnstile:
            params = {"temperature": 0, "max_new_tokens": length, **(sampling or {})}
            body = {"input_ids": prompt, "sampling_params": params}
            reply = await client.post(f"{base_url}/generate", json=body)
            reply.raise_for_status()
            answer: dict[str, Any] = reply.json()
            return answer

    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
        return list(await asyncio.gather(*(one(client, *what) for what in zip(prompts, lengths, strict=True))))
