"""Prompts for traces that give lengths only: as long as recorded, sharing prefixes where their hash ids do.

    session = with_prompts(session, tokens_per_word=1.1)      # an ordinary session of user messages
    synthetic_prompt(lengths, "name of what stands behind the hashed blocks", tokens_per_word=1.1)

A prompt is a row of short common words. The words of a block depend on its hash id alone, so that two prompts that
begin with the same ids begin with the same text, and a server finds that prefix in its cache. What lies behind the
hashed blocks depends on `name`, which no two prompts should share.

How many tokens a word has depends on the tokenizer under test, most often one. To meet the recorded lengths, the replay
has the server count the tokens of `sample()` and divides by its words. What a chat template adds comes on top. Replayed
texts of this kind measure cache and latency only: they say nothing of acceptance (`Session.length_only`).
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
    """A text of about `lengths.input_tokens` tokens; the same arguments give the same text, anywhere."""
    total = words_of(lengths.input_tokens, tokens_per_word)
    words: list[str] = []
    for number, hash_id in enumerate(lengths.hash_ids, start=1):
        end = min(total, words_of(number * lengths.block_tokens, tokens_per_word))
        words += _words(f"block {hash_id}", end - len(words))
    words += _words(f"rest of {name}", total - len(words))
    return " ".join(words)


def with_prompts(session: Session, tokens_per_word: float = 1.0) -> Session:
    """The session with a text in each user message of which only the length is known."""
    messages = [
        _with_prompt(message, f"{session.session_id}, message {i}", tokens_per_word)
        for i, message in enumerate(session.messages)
    ]
    return session.model_copy(update={"messages": messages})


def sample() -> str:
    """A text of `SAMPLE_WORDS` words like those of the prompts, for counting tokens."""
    return " ".join(_words("sample", SAMPLE_WORDS))


def reply_tokens(session: Session, index: int) -> int | None:
    """How many tokens the reply at message `index` has to have; None where it ends by itself."""
    message = session.messages[index]
    recorded = message.output_tokens if isinstance(message, AssistantMessage) and session.length_only else None
    return None if recorded is None else max(1, recorded)  # no server replies in none


def words_of(tokens: int, tokens_per_word: float) -> int:
    """At least one: no prompt is empty."""
    return max(1, round(tokens / tokens_per_word))


def _words(seed: str, count: int) -> list[str]:
    """The first `count` words of an endless row that belongs to `seed`."""
    return random.Random(seed).choices(WORDS.split(), k=count)


def _with_prompt(message: Message, name: str, tokens_per_word: float) -> Message:
    if not isinstance(message, UserMessage) or message.lengths is None:
        return message
    text = synthetic_prompt(message.lengths, name, tokens_per_word)
    return UserMessage.model_validate(message.model_dump() | {"content": text})
