"""The messages before a turn: as recorded (forced history), or with the server's own replies (live history).

In live history a reply replaces the recorded assistant message, and tool outputs stay as recorded. The reply's calls
get the recorded ids, in order, to match these outputs. A reply with a different number of calls is counted as a
divergence. After a failed turn the recorded message is kept.
"""

from __future__ import annotations

from typing import NamedTuple

from whiflash_workloads.fitting import Message
from whiflash_workloads.schema import Session, to_openai


class Reply(NamedTuple):
    """A server's reply, as it is sent back in the history."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str, str], ...] = ()  # (id, name, arguments as JSON text)

    @property
    def text(self) -> str:
        """All parts as one text, stripped: streaming parsers may keep or drop white space between them."""
        calls = "".join(name + arguments for _, name, arguments in self.calls)
        return "".join(part.strip() for part in (self.reasoning, self.content, calls))


class History:
    """The messages of one session. Every prompt starts with `marker`."""

    def __init__(self, session: Session, marker: str = "", live: bool = False):
        self.messages = [to_openai(message) for message in session.messages]
        self.head = marked(self.messages[0], marker)
        self.live = live
        self.divergences = 0

    def before(self, index: int) -> list[Message]:
        """The marker and the messages before message `index`."""
        return [*self.head, *self.messages[1:index]]

    def answer(self, index: int, reply: Reply) -> None:
        """Store the server's reply for message `index`, if the history is live."""
        if not self.live:
            return
        recorded = self.messages[index].get("tool_calls") or []
        self.divergences += len(recorded) != len(reply.calls)
        self.messages[index] = assistant_message(reply, [call["id"] for call in recorded])


def marked(first: Message, marker: str) -> list[Message]:
    """The first message with the marker, in a system message because templates put that before the tools."""
    if not marker:
        return [first]
    if first["role"] == "system":
        return [{**first, "content": f"{marker}\n{first['content']}"}]
    return [{"role": "system", "content": marker}, first]


def assistant_message(reply: Reply, recorded_ids: list[str]) -> Message:
    """The reply as an OpenAI message; its calls get the recorded ids."""
    message: Message = {"role": "assistant", "content": reply.content or (None if reply.calls else "")}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        ids = [*recorded_ids, *(own for own, _, _ in reply.calls[len(recorded_ids) :])]
        message["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, (_, name, arguments) in zip(ids, reply.calls, strict=False)
        ]
    return message
