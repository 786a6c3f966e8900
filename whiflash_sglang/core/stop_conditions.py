"""Where a request's text ends within the tokens that a round has accepted.

A round accepts several tokens at once. SGLang then checks all of them for the maximum length first, then for stop
strings in list order, then for stop tokens. With one token at a time, the earliest of these ends the text. So tokens
after the first end are cut off before SGLang sees them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Kept(NamedTuple):
    """The part of a round's accepted tokens that belongs to a request's text."""

    num_tokens: int
    ends: bool  # whether the text ends there


def tokens_to_end(request: Req, tokens: Sequence[int]) -> Kept:
    """Keep the accepted `tokens` up to and including the first that ends the request's text. At least one is kept."""
    params = request.sampling_params
    left = params.max_new_tokens - len(request.output_ids)
    count = min(len(tokens), max(1, left))
    ends = count >= left
    if not params.ignore_eos:
        ids = end_ids(request)
        first = next((i + 1 for i, token in enumerate(tokens[:count]) if token in ids), None)
        count, ends = (count, ends) if first is None else (first, True)
    if not params.stop_strs and not params.stop_regex_strs:
        return Kept(count, ends)
    window = 1 + max(params.stop_str_max_len, params.stop_regex_max_len)  # tokens that SGLang searches for a stop
    said = [*request.output_ids[-window:], *tokens[:count]]
    before = len(said) - count
    if not params.stop_regex_strs and not stops(request, said):
        return Kept(count, ends)
    stop = next((i for i in range(1, count + 1) if stops(request, said[: before + i][-window:])), None)
    return Kept(count, ends) if stop is None else Kept(stop, True)


def end_ids(request: Req) -> set[int]:
    """Tokens that end the request, unless `ignore_eos` is set."""
    return forbidden_ends(request) | set(request.eos_token_ids or ())


def forbidden_ends(request: Req) -> set[int]:
    """The end tokens that `min_new_tokens` forbids. As in SGLang, without those only in the model's config."""
    ids = set(request.sampling_params.stop_token_ids or ())
    if request.tokenizer is not None:
        ids |= {request.tokenizer.eos_token_id} | set(request.tokenizer.additional_stop_token_ids or ())
    return ids - {None}


def stops(request: Req, said: Sequence[int]) -> bool:
    """Whether the text of the tokens `said` contains a stop string or matches a stop regex of the request."""
    params = request.sampling_params
    text = request.tokenizer.decode(said)
    if any(stop in text for stop in params.stop_strs):
        return True
    try:
        return any(re.search(pattern, text) for pattern in params.stop_regex_strs)
    except (re.error, RecursionError):  # SGLang aborts the request
        return False
