"""Speculation figures of one reply, requested after the reply over the same connection.

    figures = FigureReader().read(client, "chatcmpl-...")    # {"rounds": 12, "rounds_by_drafter": {"df": 9, ...}, ...}
    acceptance_length(figures), drafter_shares(figures)

Uses `GET {root}/whiflash/requests/{id}`, where the root is the OpenAI base URL without `/v1`. If the server does not
have this route (other servers, gateways) or does not know the reply, figures are None, with one warning in the log.
After such failures requests back off, since each may take up to 2 s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import openai

log = logging.getLogger(__name__)

Figures = dict[str, Any]
# The server answers from memory. The timeout bounds how long a busy server delays a reply.
OPTIONS: Any = {"timeout": 2.0, "max_retries": 0}
FAILURES = (openai.APIError, json.JSONDecodeError)
NO_ID = "its reply has no id"
MOST_PASSED_OVER = 64  # max replies skipped between two attempts


class FigureReader:
    """Reads the figures of replies. A model and its copies share one reader, and so its back-off."""

    def __init__(self) -> None:
        self.has_told = False
        self.pause = 0  # replies to skip after the last failure
        self.left = 0  # replies still to skip

    def read(self, client: openai.OpenAI, response_id: str | None) -> Figures | None:
        """The figures of a reply, or None. Never raises for a failed request."""
        if not response_id:
            return self._none(client, NO_ID)
        if self._passes_over():
            return None
        try:
            return self._checked(client.get(_url(client, response_id), cast_to=object, options=OPTIONS), client)
        except FAILURES as error:
            return self._none(client, error)

    async def aread(self, client: openai.AsyncOpenAI, response_id: str | None) -> Figures | None:
        """Like `read`, async."""
        if not response_id:
            return self._none(client, NO_ID)
        if self._passes_over():
            return None
        try:
            return self._checked(await client.get(_url(client, response_id), cast_to=object, options=OPTIONS), client)
        except FAILURES as error:
            return self._none(client, error)

    def _passes_over(self) -> bool:
        if self.left == 0:
            return False
        self.left -= 1
        return True

    def _checked(self, reply: object, client: openai.OpenAI | openai.AsyncOpenAI) -> Figures | None:
        if not isinstance(reply, dict):
            return self._none(client, f"the reply is not a JSON object: {reply!r:.80}")
        self.pause = 0
        return reply

    def _none(self, client: openai.OpenAI | openai.AsyncOpenAI, reason: object) -> None:
        level = logging.DEBUG if self.has_told else logging.WARNING
        self.has_told = True
        self.left = self.pause = min(2 * self.pause + 1, MOST_PASSED_OVER)
        log.log(
            level,
            "no speculation figures from %s (%s): response_metadata['whiflash'] is None; "
            "serve with whiflash_sglang.launch_server, or set speculation_figures=False",
            _root(client),
            " ".join(str(reason).split()),
        )


def acceptance_length(figures: Mapping[str, Any]) -> float | None:
    """Mean committed tokens per round, including the bonus token; None without rounds (a one-token reply)."""
    rounds = figures["rounds"]
    return (rounds + sum(figures["accepted_by_drafter"].values())) / rounds if rounds else None


def drafter_shares(figures: Mapping[str, Any]) -> dict[str, float]:
    """Share of rounds by drafter, largest first."""
    by_drafter = sorted(figures["rounds_by_drafter"].items(), key=lambda item: -item[1])
    return {name: rounds / figures["rounds"] for name, rounds in by_drafter if rounds}


def _root(client: openai.OpenAI | openai.AsyncOpenAI) -> str:
    return str(client.base_url).rstrip("/").removesuffix("/v1")


def _url(client: openai.OpenAI | openai.AsyncOpenAI, response_id: str) -> str:
    return f"{_root(client)}/whiflash/requests/{quote(response_id, safe='')}"
