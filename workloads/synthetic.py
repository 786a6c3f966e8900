"""Synthetic prompts for length-only traces, with the recorded lengths and shared prefixes.

    session = with_prompts(session, tokens_per_word=1.1)      # an ordinary session of user messages
    synthetic_prompt(lengths, "name of the text after the hashed blocks", tokens_per_word=1.1)

A prompt is a sequence of short common words. The words of a block depend only on its hash id. Prompts that begin with
the same ids therefore begin with the same text, which a server finds in its cache. The text after the hashed blocks
depends on `name`, which should be unique.

Tokens per word depend on the tokenizer; usually it is one. To match the recorded lengths, the replay lets the server
count the tokens of `sample()`. The chat template's tokens come on top. Such prompts measure cache and latency only, not
acceptance (`Session.length_only`).
"""

from __future__ import annotations

import random

from whiflash_workloads.schema import AssistantMessage, Lengths, Message, Session, UserMessage

WORDS = (
    "the of and to in a is that for it was on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know get "
    "through back much before go good new write our used me man too any day same right look think also around "
    "another came come work three word must because does part even place well such here take why things help put "
    "years different away again off went old number great tell men say small every found still between name should "
    "home big give air line"
)
SAMPLE_WORDS = 1024


def synthetic_prompt(lengths: Lengths, name: str, tokens_per_word: float = 1.0) -> str:
    """A text of about `lengths.input_tokens` tokens; deterministic."""
    total = words_of(lengths.input_tokens, tokens_per_word)
    words: list[str] = []
    for number, hash_id in enumerate(lengths.hash_ids, start=1):
        end = min(total, words_of(number * lengths.block_tokens, tokens_per_word))
        words += _words(f"block {hash_id}", end - len(words))
    words += _words(f"rest of {name}", total - len(words))
    return " ".join(words)


def with_prompts(session: Session, tokens_per_word: float = 1.0) -> Session:
    """The session with synthetic texts in its length-only user messages."""
    messages = [
        _with_prompt(message, f"{session.session_id}, message {i}", tokens_per_word)
        for i, message in enumerate(session.messages)
    ]
    return session.model_copy(update={"messages": messages})


def sample() -> str:
    """A text of `SAMPLE_WORDS` words, for measuring tokens per word."""
    return " ".join(_words("sample", SAMPLE_WORDS))


def reply_tokens(session: Session, index: int) -> int | None:
    """Forced length in tokens of the reply at message `index`; None if it ends by itself."""
    message = session.messages[index]
    recorded = message.output_tokens if isinstance(message, AssistantMessage) and session.length_only else None
    return None if recorded is None else max(1, recorded)  # servers generate at least one token


def words_of(tokens: int, tokens_per_word: float) -> int:
    """Number of words for `tokens` tokens, at least one."""
    return max(1, round(tokens / tokens_per_word))


def _words(seed: str, count: int) -> list[str]:
    """The first `count` words of the sequence for `seed`."""
    return random.Random(seed).choices(WORDS.split(), k=count)


def _with_prompt(message: Message, name: str, tokens_per_word: float) -> Message:
    if not isinstance(message, UserMessage) or message.lengths is None:
        return message
    text = synthetic_prompt(message.lengths, name, tokens_per_word)
    return UserMessage.model_validate(message.model_dump() | {"content": text})
