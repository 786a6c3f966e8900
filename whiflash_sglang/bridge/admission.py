"""Request validation in the HTTP process, for requests that would crash SGLang's scheduler.

An exception in the scheduler ends the server, and with it every request. SGLang validates most fields on arrival. The
checks here cover the rest, found by fuzzing (`scripts/fuzz.py`) and code review. Each raises RequestError, which
becomes HTTP 400 and names field, value and fix.

`judge_types` runs first: SGLang declares the types of scheduler messages, but pickles them without validation. The
other checks rely on those types. Imports msgspec and numpy, not SGLang.
"""

from __future__ import annotations

import functools
import math
import re
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from whiflash_sglang.core.errors import RequestError, shown

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_params import SamplingParams

TYPE_FIX = "use the type that SGLang documents"
FILLED_IN = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_SAMPLES = 4096
MAX_NESTING = 200  # the grammar compiler takes minutes for 2,000 levels
MIN_REPETITION_PENALTY = 1e-6  # logits are divided by it, in float32


def judge_samples(number: object) -> None:
    """Limit `n`: SGLang expands it into requests immediately, in the HTTP process's memory."""
    if isinstance(number, int) and number > MAX_SAMPLES:
        raise RequestError("n", shown(number), "out of bounds", f"give at most {MAX_SAMPLES}")


def judge_names(sampling_params: Mapping[str, object]) -> None:
    """Reject internal fields in `sampling_params`: SGLang would take them as already computed."""
    for field in FILLED_IN:
        if field in sampling_params:
            raise RequestError(f"sampling_params.{field}", None, "not a field of requests", "leave it out")


def judge_types(
    record: msgspec.Struct,
    path: str,
    encode: Callable[[msgspec.Struct], bytes],
    decode_hook: Callable[[type, Any], Any],
) -> None:
    """Check a record's fields against its class's type annotations, and that its text is valid UTF-8.

    `path`: the record's name in errors. `encode` and `decode_hook` are SGLang's own, for types unknown to msgspec.
    """
    try:
        _decoder(type(record), decode_hook).decode(encode(record))
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        raise RequestError(path + _field(type(record), where), None, problem, TYPE_FIX) from error
    except (UnicodeEncodeError, OverflowError, RecursionError, TypeError) as error:
        raise RequestError(path, None, str(error), TYPE_FIX) from error


@functools.cache
def _decoder(record: type, decode_hook: Callable[[type, Any], Any]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(record, dec_hook=decode_hook)


def _field(record: type[msgspec.Struct], where: str) -> str:
    """Translate msgspec's "`$[3][0]`" to `.stop[0]`. Records are encoded as arrays, after a tag if they have one."""
    found = re.match(r"`\$\[(\d+)\](.*)`", where)
    if found is None:
        return ""
    place = int(found[1]) - (record.__struct_config__.tag is not None)
    return f".{record.__struct_fields__[place]}{found[2]}"


def judge_prompt(input_ids: array[int] | None, vocab_size: int) -> None:
    """Reject empty prompts and token ids outside the vocabulary, which would index out of bounds in the embedding."""
    if input_ids is None:  # embeddings instead
        return
    if not len(input_ids):
        raise RequestError("input_ids", None, "an empty prompt", "give at least one token id")
    ids = np.frombuffer(input_ids, dtype=np.int64)
    outside = int(ids.min()) if ids.min() < 0 else int(ids.max())
    if not 0 <= outside < vocab_size:
        raise RequestError("input_ids", outside, "outside the vocabulary", f"give ids from 0 to {vocab_size - 1}")


def judge_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Reject numbers that overflow their tensors, index out of bounds, or turn logits into NaN."""
    for field in ("top_k", "min_new_tokens"):
        value = getattr(params, field)
        if value > INT32_MAX:
            raise RequestError(field, shown(value), "out of bounds", f"give at most {INT32_MAX}")
    seed = params.sampling_seed
    if seed is not None and seed > INT64_MAX:
        raise RequestError("sampling_seed", shown(seed), "out of bounds", f"give at most {INT64_MAX}")
    if params.repetition_penalty < MIN_REPETITION_PENALTY:
        fix = f"give a number from {MIN_REPETITION_PENALTY} to 2"
        raise RequestError("repetition_penalty", shown(params.repetition_penalty), "out of bounds", fix)
    for token in params.stop_token_ids or ():
        # With `min_new_tokens` in the batch, these ids index the penalty tensor.
        if not 0 <= token < vocab_size:
            fix = f"give ids from 0 to {vocab_size - 1}"
            raise RequestError("stop_token_ids", shown(token), "outside the vocabulary", fix)
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias) or abs(bias) > FLOAT32_MAX:
            raise RequestError(f"logit_bias[{shown(token)}]", shown(bias), "out of bounds", "give e.g. -100 to 100")


def judge_grammars(params: SamplingParams) -> None:
    """Reject text that crashes the grammar compiler (xgrammar 0.2), native code in the scheduler's process."""
    for field in ("json_schema", "regex", "ebnf", "structural_tag"):
        text = getattr(params, field)
        if text is None:
            continue
        if "\0" in text or "\\u0000" in text:
            raise RequestError(field, shown(text), "contains a NUL character", "remove it")
        if _depth(text) > MAX_NESTING:
            raise RequestError(field, shown(text), "too deeply nested", f"nest at most {MAX_NESTING} levels")


def _depth(text: str) -> int:
    """Bracket nesting depth, including brackets in strings."""
    if sum(map(text.count, "([{")) <= MAX_NESTING:
        return 0
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def judge_logprobs(top_logprobs_num: int, vocab_size: int) -> None:
    """Limit `top_logprobs_num` to the vocabulary size."""
    if not 0 <= top_logprobs_num <= vocab_size:
        fix = f"give a number from 0 to {vocab_size}"
        raise RequestError("top_logprobs_num", shown(top_logprobs_num), "out of bounds", fix)
