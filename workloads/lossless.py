"""Compare the greedy text of two servers token by token, and explain where it differs.

A difference is excused only if it is a tie: the reference server's two best logits at that place are closer than
rounding (`TIE`), so that either token is right. Nothing else is; `Difference.gap` says by how much it was missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from whiflash_workloads.tokens import TIMEOUT_SECONDS, TokenIds, post

TIE = 1e-5  # gap of the two best logits in float32 that is rounding and nothing else


@dataclass(frozen=True)
class Difference:
    """The first place where a text leaves the reference's."""

    prompt: int  # number of the prompt
    position: int  # output tokens before it, equal in both
    reference: int | None  # token ids; None where a text had ended
    found: int | None
    best: tuple[tuple[float, int], ...]  # the reference's two best there: log probability and token id

    @property
    def is_tie(self) -> bool:
        """Either text has one of the two best tokens, and they are as good as equal."""
        return self.is_tie_within(TIE)

    def is_tie_within(self, gap: float) -> bool:
        """As `is_tie`, where rounding moves logits by as much as `gap`."""
        return self.gap <= gap and {self.reference, self.found} == {token for _, token in self.best}

    @property
    def gap(self) -> float:
        """Best less second-best logit (a difference of log probabilities is one of logits)."""
        return self.best[0][0] - self.best[1][0]


@dataclass(frozen=True)
class Comparison:
    """Texts of one server against the reference's."""

    prompts: int
    tokens: int
    differences: tuple[Difference, ...]

    def figures(self) -> dict[str, Any]:
        """Plain data: `different` counts what no tie excuses."""
        ties = [asdict(d) for d in self.differences if d.is_tie]
        different = [asdict(d) for d in self.differences if not d.is_tie]
        return {"prompts": self.prompts, "tokens": self.tokens, "different": different, "ties": ties}


async def generate(
    base_url: str,
    prompts: Sequence[TokenIds],
    num_tokens: int,
    in_flight: int,
    sampling: dict[str, Any] | None = None,
) -> list[TokenIds]:
    """Token ids of `num_tokens` greedy tokens behind each prompt, at most `in_flight` requests at a time."""
    replies = await post(base_url, prompts, num_tokens, in_flight, {"ignore_eos": True, **(sampling or {})})
    return [reply["output_ids"] for reply in replies]


def compare(
    reference_url: str, prompts: Sequence[TokenIds], reference: Sequence[TokenIds], found: Sequence[TokenIds]
) -> Comparison:
    """Where `found` leaves `reference`. The server at `reference_url` is asked for the logits there."""
    differences = []
    for number, (prompt, expected, text) in enumerate(zip(prompts, reference, found, strict=True)):
        if expected == text:
            continue
        pairs = zip(expected, text, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(text)))
        best = two_best(reference_url, prompt + expected[:position])
        differences.append(Difference(number, position, _at(expected, position), _at(text, position), best))
    return Comparison(len(prompts), sum(map(len, found)), tuple(differences))


def two_best(base_url: str, text: TokenIds) -> tuple[tuple[float, int], ...]:
    """Log probability and id of the two best tokens behind `text`, the best first."""
    body = {
        "input_ids": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    reply = httpx.post(f"{base_url}/generate", json=body, timeout=TIMEOUT_SECONDS)
    reply.raise_for_status()
    return tuple((float(entry[0]), int(entry[1])) for entry in reply.json()["meta_info"]["output_top_logprobs"][0])


def _at(tokens: TokenIds, position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
