"""Compare the greedy text of two servers token by token, and explain where it differs.

A difference is accepted only if it is a tie: the reference's two best logits at that position differ by no more than
rounding (`TIE`), so either token is correct. `Difference.gap` is that logit difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from whiflash_workloads.tokens import TIMEOUT_SECONDS, TokenIds, post

TIE = 1e-5  # largest gap of the two best logits that counts as rounding in float32


@dataclass(frozen=True)
class Difference:
    """The first position where a text differs from the reference."""

    prompt: int  # index of the prompt
    position: int  # number of equal output tokens before it
    reference: int | None  # token id; None if the text had ended
    found: int | None
    best: tuple[tuple[float, int], ...]  # the reference's two best there: (logprob, token id)

    @property
    def is_tie(self) -> bool:
        """Whether both tokens are the reference's two best, with almost equal logits."""
        return self.is_tie_within(TIE)

    def is_tie_within(self, gap: float) -> bool:
        """Like `is_tie`, for logits that differ by up to `gap`."""
        return self.gap <= gap and {self.reference, self.found} == {token for _, token in self.best}

    @property
    def gap(self) -> float:
        """Best minus second-best logit (equal to the difference of logprobs)."""
        return self.best[0][0] - self.best[1][0]


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a server's texts with the reference."""

    prompts: int
    tokens: int
    differences: tuple[Difference, ...]

    def figures(self) -> dict[str, Any]:
        """As plain data; `different` lists the differences that are not ties."""
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
    """Generate `num_tokens` greedy tokens after each prompt, `in_flight` requests at a time. Returns token ids."""
    replies = await post(base_url, prompts, num_tokens, in_flight, {"ignore_eos": True, **(sampling or {})})
    return [reply["output_ids"] for reply in replies]


def compare(
    reference_url: str, prompts: Sequence[TokenIds], reference: Sequence[TokenIds], found: Sequence[TokenIds]
) -> Comparison:
    """Find the first differences between `found` and `reference`, with logits from the server at `reference_url`."""
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
    """(logprob, token id) of the two best tokens after `text`, best first."""
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
