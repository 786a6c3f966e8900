"""What SGLang would hand to its scheduler and the scheduler cannot bear: refused before, in the HTTP process.

An exception in the scheduler ends it, and with it every request of every client. SGLang checks most of a request where
it comes in; what is checked here was found by sending hostile bodies (`scripts/fuzz.py`), and by reading where values
go. Each is answered with HTTP 400, which names the field, the value and the mend.

`judge_types` comes first: SGLang declares the types of what it sends to the scheduler, but pickles it and looks at none
of them. The others take a request's parts as of those types. Imports msgspec and numpy, not SGLang.
"""

from __future__ import annotations

import functools
import math
import re
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from whiflash_sglang.core.errors import RequestError, shown

MEND_OF_TYPES = "give it the type that SGLang documents"
FILLED_IN = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_SAMPLES = 4096
MAX_NESTING = 200  # 2,000 levels take it minutes
MIN_REPETITION_PENALTY = 1e-6  # logits are divided by it, in float32


def judge_samples(number: object) -> None:
    """Replies to one prompt: SGLang makes a request of each at once, in the memory of the HTTP process."""
    if isinstance(number, int) and number > MAX_SAMPLES:
        raise RequestError("n", shown(number), "out of bounds", f"give at most {MAX_SAMPLES}")


def judge_names(sampling_params: Mapping[str, object]) -> None:
    """A request's own `sampling_params`: fields that SGLang fills in would be taken for filled in."""
    for field in FILLED_IN:
        if field in sampling_params:
            raise RequestError(f"sampling_params.{field}", None, "not a field of requests", "leave it out")


def judge_types(
    record: msgspec.Struct,
    path: str,
    encode: Callable[[msgspec.Struct], bytes],
    decode_hook: Callable[[type, Any], Any],
) -> None:
    """Whether a record's fields are of the types that its class declares, and its text can be written as UTF-8.

    `encode` and `decode_hook` are SGLang's own, for the types that msgspec does not know.
    """
    try:
        _decoder(type(record), decode_hook).decode(encode(record))
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        raise RequestError(path + _field(type(record), where), None, problem, MEND_OF_TYPES) from error
    except (UnicodeEncodeError, OverflowError, RecursionError, TypeError) as error:
        raise RequestError(path, None, str(error), MEND_OF_TYPES) from error


@functools.cache
def _decoder(record: type, decode_hook: Callable[[type, Any], Any]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(record, dec_hook=decode_hook)


def _field(record: type[msgspec.Struct], where: str) -> str:
    """`.stop[0]` of msgspec's "`$[3][0]`": these records travel as arrays, behind a tag if they have one."""
    found = re.match(r"`\$\[(\d+)\](.*)`", where)
    if found is None:
        return ""
    place = int(found[1]) - (record.__struct_config__.tag is not None)
    return f".{record.__struct_fields__[place]}{found[2]}"


def judge_prompt(input_ids: array[int] | None, vocab_size: int) -> None:
    """Token ids index the embedding, and the last position of a prompt gives the reply its first token; SGLang does not
    look at the ids, nor for empty prompts in a list."""
    if input_ids is None:  # embeddings instead
        return
    if not len(input_ids):
        raise RequestError("input_ids", None, "an empty prompt", "give one token id or more")
    ids = np.frombuffer(input_ids, dtype=np.int64)
    outside = int(ids.min()) if ids.min() < 0 else int(ids.max())
    if not 0 <= outside < vocab_size:
        raise RequestError("input_ids", outside, "outside the vocabulary", f"give ids from 0 to {vocab_size - 1}")


def judge_sampling(params: Any, vocab_size: int) -> None:
    """Numbers that overflow the tensors they are put into, index outside them, or make logits NaN."""
    for field in ("top_k", "min_new_tokens"):
        value = getattr(params, field)
        if value > INT32_MAX:
            raise RequestError(field, shown(value), "out of bounds", f"give at most {INT32_MAX}")
    seed = params.sampling_seed
    if seed is not None and seed > INT64_MAX:
        raise RequestError("sampling_seed", shown(seed), "out of bounds", f"give at most {INT64_MAX}")
    if params.repetition_penalty < MIN_REPETITION_PENALTY:
        mend = f"give a number from {MIN_REPETITION_PENALTY} to 2"
        raise RequestError("repetition_penalty", shown(params.repetition_penalty), "out of bounds", mend)
    for token in params.stop_token_ids or ():
        # Beside any request with `min_new_tokens`, each is a column of its penalties.
        if not 0 <= token < vocab_size:
            mend = f"give ids from 0 to {vocab_size - 1}"
            raise RequestError("stop_token_ids", shown(token), "outside the vocabulary", mend)
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias) or abs(bias) > FLOAT32_MAX:
            raise RequestError(f"logit_bias[{shown(token)}]", shown(bias), "out of bounds", "give e.g. -100 to 100")


def judge_grammars(params: Any) -> None:
    """Text that ends the grammar compiler (xgrammar 0.2), which is native code in the scheduler's process."""
    for field in ("json_schema", "regex", "ebnf", "structural_tag"):
        text = getattr(params, field)
        if text is None:
            continue
        if "\0" in text or "\\u0000" in text:
            raise RequestError(field, shown(text), "holds a NUL character", "leave it out")
        if _depth(text) > MAX_NESTING:
            raise RequestError(field, shown(text), "too deeply nested", f"nest at most {MAX_NESTING} levels")


def _depth(text: str) -> int:
    """Levels of brackets, those in strings included."""
    if sum(map(text.count, "([{")) <= MAX_NESTING:
        return 0
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def judge_logprobs(top_logprobs_num: int, vocab_size: int) -> None:
    """The best tokens of each position, of which there are as many as the vocabulary has."""
    if not 0 <= top_logprobs_num <= vocab_size:
        mend = f"give a number from 0 to {vocab_size}"
        raise RequestError("top_logprobs_num", shown(top_logprobs_num), "out of bounds", mend)
