"""Expected texts of greedy asks: those of a server without speculation, streamed and not.

Left out are asks with a near tie of two tokens, where rounding may choose either, and unfinished tool calls, which a
parser shows depending on the pieces of the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from whiflash_workloads.stress.answers import Heard
from whiflash_workloads.stress.client import hear_all
from whiflash_workloads.stress.requests import CHAT, GENERATE, Request, as_stream, with_logprobs
from whiflash_workloads.stress.verdicts import Replies

NEAR = 1e-4  # gap of the two best logits; rounding moves them in the sixth digit


class Reference(NamedTuple):
    asks: list[Request]
    expected: dict[tuple[int, bool], Replies]
    left_out: dict[str, int]  # asks by reason


async def collect(http: httpx.AsyncClient, asks: Sequence[Request], at_a_time: int, deadline_s: float) -> Reference:
    """Ask the server at `http`. Raises ValueError if it does not answer an ask completely."""
    near = await _near_ties(http, asks, at_a_time)
    heard: dict[bool, list[Heard]] = {}
    for streamed in (False, True):
        requests = [as_stream(ask, streamed) for ask in asks]
        heard[streamed] = await hear_all(http, requests, at_a_time, deadline_s)
    kept: list[Request] = []
    expected: dict[tuple[int, bool], Replies] = {}
    left_out = {"near tie": 0, "unfinished call": 0}
    for ask, is_near, plain, stream in zip(asks, near, heard[False], heard[True], strict=True):
        if not (plain.whole and stream.whole) or ask.ask is None:
            raise ValueError(f"the reference server's answer to {ask.kind} #{ask.ask}: {plain} / {stream}")
        if is_near:
            left_out["near tie"] += 1
        elif ask.kind in ("tools", "tool required") and "length" in plain.ends:
            left_out["unfinished call"] += 1
        else:
            kept.append(ask)
            expected |= {(ask.ask, False): plain.replies, (ask.ask, True): stream.replies}
    return Reference(kept, expected, left_out)


async def _near_ties(http: httpx.AsyncClient, asks: Sequence[Request], at_a_time: int) -> list[bool]:
    turnstile = asyncio.Semaphore(at_a_time)

    async def one(ask: Request) -> bool:
        async with turnstile:
            reply = await http.post(ask.path, json=with_logprobs(ask))
            reply.raise_for_status()
            return smallest_gap(ask.path, reply.json()) < NEAR

    return list(await asyncio.gather(*(one(ask) for ask in asks)))


def smallest_gap(path: str, reply: dict[str, Any]) -> float:
    """The smallest gap between the logprobs of the two best tokens, over all positions of all replies."""
    if path == GENERATE:
        best = [[entry[0] for entry in position] for position in reply["meta_info"]["output_top_logprobs"]]
    elif path == CHAT:
        positions = [entry for choice in reply["choices"] for entry in choice["logprobs"]["content"]]
        best = [[token["logprob"] for token in position["top_logprobs"]] for position in positions]
    else:
        best = [list(position.values()) for c in reply["choices"] for position in c["logprobs"]["top_logprobs"]]
    # Two tokens with the same text are one entry.
    gaps = [abs(pair[0] - pair[1]) for pair in best if len(pair) > 1]
    return min(gaps, default=float("inf"))
