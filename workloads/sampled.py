"""Count sampled continuations of one prompt, to test a server's output distribution.

    kinds = {"e3": {"temperature": 1.0, "custom_params": {"whiflash": {"route": "e3"}}}, "off": {...}}
    counts = count(url, prompt, 4, kinds, number=5000)      # {"e3": Counter({(12, 7, 7, 3): 801, ...}), ...}

Requests of all kinds are sent in shuffled order, so they share batches on the server.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from whiflash_workloads.tokens import TIMEOUT_SECONDS, TokenIds

IN_FLIGHT = 16
AT_ONCE = 25  # samples per request (`n`), which share one prefix lookup

Kind = TypeVar("Kind", bound=Hashable)


def count(
    base_url: str,
    prompt: TokenIds,
    length: int,
    kinds: Mapping[Kind, Mapping[str, Any]],
    number: int,
    *,
    seeded: bool = False,
) -> dict[Kind, Counter[tuple[int, ...]]]:
    """Sample `number` continuations of `length` tokens for each of `kinds` (name -> sampling parameters).

    `seeded`: one sample per request, each with its own seed, for servers with `--enable-deterministic-inference`.
    """
    at_once = 1 if seeded else AT_ONCE
    fixed = {"max_new_tokens": length, "ignore_eos": True}
    order = [kind for kind in kinds for _ in range(0, number, at_once)]
    random.Random(0).shuffle(order)
    sampling = [{**kinds[kind], **fixed, "n": at_once} for kind in order]
    if seeded:
        sampling = [params | {"sampling_seed": seed} for seed, params in enumerate(sampling)]
    counts: dict[Kind, Counter[tuple[int, ...]]] = {kind: Counter() for kind in kinds}
    replies = asyncio.run(_ask_all(base_url, prompt, sampling))
    for kind, reply in zip(order, replies, strict=True):
        for sample in reply:
            counts[kind][tuple(sample["output_ids"])] += 1
    return counts


async def _ask_all(base_url: str, prompt: TokenIds, sampling: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    turnstile = asyncio.Semaphore(IN_FLIGHT)

    async def one(client: httpx.AsyncClient, params: Mapping[str, Any]) -> list[Any]:
        async with turnstile:
            body = {"input_ids": prompt, "sampling_params": params}
            reply = await client.post(f"{base_url}/generate", json=body)
            reply.raise_for_status()
            answer = reply.json()
            return answer if isinstance(answer, list) else [answer]

    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
        return list(await asyncio.gather(*(one(client, params) for params in sampling)))
