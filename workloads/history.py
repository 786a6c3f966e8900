"""What stands before a turn: the recorded messages (forced), or the server's own replies among them (live).

In live history a reply takes the place of the recorded assistant message, and tool outputs stay as recorded: its calls
get the ids of the recorded ones, in order, so that these outputs answer them. A reply that makes another number of
calls than the recorded one is a divergence, which the replay counts. A turn that failed leaves the recorded message in
place.
"""

from __future__ import annotations

from typing import NamedTuple

from whiflash_workloads.fitting import Message
from whiflash_workloads.schema import Session, to_openai


class Reply(NamedTuple):
    """What a server answered: its parts as they are sent back to it."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str, str], ...] = ()  # (id, name, arguments as JSON text)

    @property
    def text(self) -> str:
        """All parts as one text. A streaming parser keeps or drops white space between them by where chunks end."""
        calls = "".join(name + arguments for _, name, arguments in self.calls)
        return "".join(part.strip() for part in (self.reasoning, self.content, calls))


class History:
    """The messages of one session as a server is asked with them; `marker` stands at the start of every prompt."""

    def __init__(self, session: Session, marker: str = "", live: bool = False):
        self.messages = [to_openai(message) for message in session.messages]
        self.head = marked(self.messages[0], marker)
        self.live = live
        self.divergences = 0

    def before(self, index: int) -> list[Message]:
        """The messages before message `index`, the marker in front."""
        return [*self.head, *self.messages[1:index]]

    def answer(self, index: int, reply: Reply) -> None:
        """The server's reply for message `index`; changes the history only if that is live."""
        if not self.live:
            return
        recorded = self.messages[index].get("tool_calls") or []
        self.divergences += len(recorded) != len(reply.calls)
        self.messages[index] = assistant_message(reply, [call["id"] for call in recorded])


def marked(first: Message, marker: str) -> list[Message]:
    """A template puts the system message before the tools, so that the marker has to stand there."""
    if not marker:
        return [first]
    if first["role"] == "system":
        return [{**first, "content": f"{marker}\n{first['content']}"}]
    return [{"role": "system", "content": marker}, first]


def assistant_message(reply: Reply, recorded_ids: list[str]) -> Message:
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
