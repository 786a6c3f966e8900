"""Render traces to token ids: the demo tokenizer, its Qwen-style chat template, and span labels.

The template keeps reasoning in the history. A rendered assistant turn then has exactly the generated tokens, and the
next prompt extends it, which keeps the radix cache usable.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from whiflash_workloads.demo.prompts import parsed_arguments

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VOCAB_SIZE = 1280
DOCUMENTS = (".py", ".rst", ".md")
DOCUMENT_CHARACTERS = 6000
# Words with their leading space or sign, single digits, punctuation, line ends, spaces. Digits are separate, so ids and
# amounts are copied digit by digit, as in Qwen's tokenizers.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n' }}
{%- for tool in tools %}
{%- set function = tool.function %}
{{- '- ' + function.name + ' ' + ((function.parameters or {}).properties | default({}) | tojson) }}
{{- ': ' + (function.description or '') + '\\n' }}
{%- endfor %}
{{- 'Call a tool with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content is string and message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
{%- set content = content.lstrip('\\n') %}
{%- endif %}
{{- content }}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set function = call.function if call.function else call %}
{%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{%- if function.arguments is string %}{{- function.arguments }}{%- else %}{{- function.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

CONTEXT, REASONING, TOOL_CALL, ANSWER = range(4)
SPANS = ("context", "reasoning", "tool_call", "answer")


class Example(NamedTuple):
    """One rendered session."""

    ids: np.ndarray  # [tokens] int64
    spans: np.ndarray  # [tokens] uint8, index into SPANS; markers belong to the span that they open or close


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer on rendered traces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKERS),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not special, because reasoning and tool-call parsers need them in the decoded text.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer files in the format of transformers and SGLang."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def render(session: dict[str, Any], tokenizer: Any) -> Example:
    """Render a session with the chat template; `tokenizer`: the saved one, loaded by transformers."""
    messages = [parsed_arguments(message) for message in session["messages"]]
    text = tokenizer.apply_chat_template(messages, tools=session["tools"], tokenize=False)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    return Example(ids, span_labels(ids, tokenizer))


def local_text(count: int, seed: int) -> Iterator[str]:
    """Texts of up to `count` source and documentation files from Python's standard library and installed packages."""
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    files = sorted({file for folder in folders for file in Path(folder).rglob("*") if file.suffix in DOCUMENTS})
    for file in random.Random(seed).sample(files, min(count, len(files))):
        if text := file.read_text(errors="replace")[:DOCUMENT_CHARACTERS].strip():
            yield text


def document(text: str, tokenizer: Any) -> Example:
    """A text as one long answer, all of it to be generated."""
    ids = np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], dtype=np.int64)
    return Example(ids, np.full(len(ids), ANSWER, dtype=np.uint8))


def span_labels(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Span of every token, [tokens] uint8, by a state machine over the markers."""
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL_TOKENS, *MARKERS)}
    assistant = tokenizer.encode("assistant\n", add_special_tokens=False)
    labels = np.zeros(len(ids), dtype=np.uint8)
    state, skip = CONTEXT, 0
    for i, current in enumerate(ids.tolist()):
        if current == token["<|im_start|>"]:
            is_reply = ids[i + 1 : i + 1 + len(assistant)].tolist() == assistant
            state, skip = (ANSWER, len(assistant) + 1) if is_reply else (CONTEXT, 0)
        if skip:
            skip -= 1
            continue
        if state == CONTEXT:
            continue
        if current == token["<think>"]:
            state = REASONING
        elif current == token["<tool_call>"]:
            state = TOOL_CALL
        labels[i] = state
        if current in (token["</think>"], token["</tool_call>"]):
            state = ANSWER
        elif current == token["<|im_end|>"]:
            state = CONTEXT
    return labels


def batches(examples: list[Example], tokens: int, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Infinite shuffled batches of about `tokens` tokens: ids and spans, [rows, longest] each.

    Sessions are cut to `length` tokens; those of similar length share a batch. Padding is -1 in ids.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples))
        chunk = 512
        groups = []
        for start in range(0, len(order), chunk):
            by_length = sorted(order[start : start + chunk], key=lambda i: len(examples[i].ids))
            rows = max(1, tokens // length)
            groups += [by_length[i : i + rows] for i in range(0, len(by_length), rows)]
        for group in rng.permutation(len(groups)):
            rows = [examples[i] for i in groups[group]]
            longest = min(length, max(len(row.ids) for row in rows))
            ids = np.full((len(rows), longest), -1, dtype=np.int64)
            spans = np.zeros((len(rows), longest), dtype=np.uint8)
            for i, row in enumerate(rows):
                n = min(longest, len(row.ids))
                ids[i, :n], spans[i, :n] = row.ids[:n], row.spans[:n]
            yield ids, spans
