"""Judges answers: one verdict for each request, and their tally.

`judge` is pure: it compares a request's answer with the expected text. A greedy text must be equal, and an answer that
was cut short must be a prefix. Every verdict of `FAULTS` is a fault of the server.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from whiflash_workloads.history import Reply
from whiflash_workloads.stress.answers import Heard
from whiflash_workloads.stress.requests import Request

Verdict = Literal[
    "right",  # the ask's text
    "sampled",  # an answer whose text is free
    "cut short",  # aborted, left, or ended with the server; what came is a beginning of the ask's text
    "refused",  # a bad request, with an error
    "failed",  # a good request, with an error
    "wrong text",
    "hung",  # not answered in time
    "silent",  # neither an end nor an error
    "accepted",  # a bad request that was answered
    "crashed",  # a bad request, answered with a 5xx or by no response
]
FAULTS: tuple[Verdict, ...] = ("failed", "wrong text", "hung", "silent", "accepted", "crashed")
WITH_ERROR: tuple[Verdict, ...] = ("refused", "failed", "crashed")
MAX_EXAMPLES = 10  # enough to see what is wrong
MAX_BEHIND = 80  # characters that a round may have added after the end of a text

Replies = tuple[Reply, ...]
Expected = Mapping[tuple[int, bool], Replies]
"""(number of an ask, whether it was streamed) -> its replies."""


def judge(request: Request, heard: Heard, expected: Expected) -> Verdict:
    """Compare what a client heard with what it should have heard."""
    if heard.late:
        return "hung"
    if request.refused:
        return _judge_bad(heard)
    was_aborted = heard.error is not None or "abort" in heard.ends
    if heard.left or (was_aborted and request.fate in ("abort", "ended")):
        return "cut short" if _begins(request, heard, expected) else "wrong text"
    if was_aborted:
        return "failed"
    if not heard.whole:
        return "silent"
    if request.ask is None:
        return "sampled" if _well_formed(request, heard) else "wrong text"
    return "right" if _plain(heard.replies) == _plain(expected[request.ask, request.streamed]) else "wrong text"


def _judge_bad(heard: Heard) -> Verdict:
    if heard.status is None or heard.status >= 500:
        return "crashed"
    if heard.error is not None:
        return "refused"
    return "accepted" if heard.whole or heard.left else "silent"


def _begins(request: Request, heard: Heard, expected: Expected) -> bool:
    """Whether what came is a prefix of the expected text. Of calls, only the names are compared.

    SGLang does not cut a text that is aborted in its last round. Its end token, a stop string and accepted tokens after
    them are shown.
    """
    if request.ask is None:
        return True
    whole = expected[request.ask, request.streamed]
    behind = 0 if heard.left else MAX_BEHIND
    pairs = zip(heard.replies, whole, strict=True)
    return all(
        is_beginning(got.reasoning, all_.reasoning)
        and is_beginning(got.content, all_.content, behind)
        and [name for _, name, _ in got.calls] == [name for _, name, _ in all_.calls][: len(got.calls)]
        for got, all_ in pairs
    )


def is_beginning(part: str, whole: str, behind: int = 0) -> bool:
    """Whether `part` is a prefix, ignoring white space at the edges and an incomplete last character.

    `behind`: characters that may follow the whole.
    """
    part, whole = part.strip().rstrip("\N{REPLACEMENT CHARACTER}").rstrip(), whole.strip()
    return whole.startswith(part) or (part.startswith(whole) and len(part) - len(whole) <= behind)


def _well_formed(request: Request, heard: Heard) -> bool:
    """Whether a sampled text has the requested form, if it was finished."""
    if not request.json_expected or heard.ends != ("stop",):
        return True
    try:
        return isinstance(json.loads(heard.replies[0].content), dict)
    except ValueError:
        return False


def _plain(replies: Replies) -> list[tuple[str, ...]]:
    """Without call ids, which are random, and without white space at the edges, which depends on the pieces of a
    stream."""
    return [
        (reply.reasoning.strip(), reply.content.strip(), *(part.strip() for _, *call in reply.calls for part in call))
        for reply in replies
    ]


@dataclass
class Tally:
    """The verdicts of one phase."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    retractions: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, request: Request, heard: Heard, expected: Expected) -> Verdict:
        """Count a reply. Keeps examples of faults."""
        verdict = judge(request, heard, expected)
        self.verdicts[verdict] += 1
        self.kinds["bad" if request.refused else request.kind] += 1
        self.retractions += heard.meta.get("num_retractions", 0)  # missing if it was aborted in the queue
        if verdict in FAULTS and len(self.faults) < MAX_EXAMPLES:
            self.faults.append(example(request, heard, expected, verdict))
        return verdict

    @property
    def requests(self) -> int:
        return self.verdicts.total()

    def count(self, *verdicts: Verdict) -> int:
        """The number of replies with these verdicts."""
        return sum(self.verdicts[verdict] for verdict in verdicts)


def example(request: Request, heard: Heard, expected: Expected, verdict: Verdict) -> dict[str, Any]:
    """A fault for the report: the request, the answer, and the expected one."""
    shown: dict[str, Any] = {"verdict": verdict, "kind": request.kind, "path": request.path, "fate": request.fate}
    shown |= {"status": heard.status, "ends": heard.ends, "error": heard.error}
    if isinstance(request.body, dict):
        params = request.body.get("sampling_params", request.body)
        shown["hints"] = params.get("custom_params") if isinstance(params, dict) else None
        shown["stream"] = request.streamed
    if verdict == "wrong text":
        shown["replies"] = [reply.text for reply in heard.replies]
        if request.ask is not None:
            shown["expected"] = [reply.text for reply in expected[request.ask, request.streamed]]
    return shown
