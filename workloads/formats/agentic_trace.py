"""SGLang's agentic traces (`bench_serving --dataset-name agentic-trace`).

    {"metadata": {...}, "conversations": [[{"messages": [...], "prompt_tokens": 73821}, {"messages": [...]}, ...], ...]}

A conversation is a list of turns, and a turn has only the new messages of its request. Replies are not recorded; the
server's own replies go into the history (`Session.needs_live_history`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whiflash_workloads.formats import Item, Record
from whiflash_workloads.formats.foreign import Place, Raw, each, own_record
from whiflash_workloads.formats.openai_messages import checked
from whiflash_workloads.schema import Session, TraceError

UNKNOWN_REPLY: Raw = {"role": "assistant", "content": "", "reply_known": False}


def read(path: Path, items: Iterable[Item]) -> Iterator[Session | TraceError]:
    """The reader of this format; see `formats`."""
    for item in items:
        if isinstance(item, TraceError):
            yield item
            continue
        conversations = item.value.get("conversations") if isinstance(item.value, dict) else None
        if not isinstance(conversations, list) or not conversations:
            place = Place(path, item.line, item.where, 0)
            yield place.error("conversations", "an agentic trace needs a list of conversations here")
            continue
        places = (Record(item.line, f"{item.where}conversations.{i}.", turns) for i, turns in enumerate(conversations))
        yield from each(path, places, _convert)


def _convert(turns: Any, place: Place) -> Raw:
    if not isinstance(turns, list):
        raise place.error("(whole)", "a conversation is a list of turns")
    messages: list[Raw] = []
    for i, turn in enumerate(turns):
        new = turn.get("messages") if isinstance(turn, dict) else None
        if not isinstance(new, list):
            raise place.error(f"{i}.messages", "a turn needs a list of messages here")
        if new:  # SGLang skips turns without
            messages += [checked(raw, place, f"{i}.messages.{j}") for j, raw in enumerate(new)]
            messages.append(dict(UNKNOWN_REPLY))
    return own_record(f"{place.path.stem}-{place.number + 1}", "agentic-trace", messages)
