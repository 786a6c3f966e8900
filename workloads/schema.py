"""The trace format: one JSON line is one recorded agent session.

    {"schema_version": 1, "session_id": "desk-1", "source": "demo", "tools": [...], "messages": [...]}

`tools` are OpenAI tool schemas. `messages` are OpenAI messages; an assistant message may carry `reasoning_content` and
`tool_calls` (whose `arguments` are a JSON text), a tool message answers one `tool_call_id`. What was timed may stand
beside it: `timestamp_s` (when a message came to be, on any clock that all sessions of a file share) and the
`tool_duration_s` of a tool message. A record that does not fit raises `TraceError`, which names file, line, field and
mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION = 1


class TraceError(ValueError):
    """A trace that cannot be read: where, which field, what is wrong, and what to do."""

    def __init__(self, path: Path | str, line: int, field: str, problem: str, mend: str):
        self.path, self.line, self.field = Path(path), line, field
        super().__init__(f"{path}, line {line}, field {field}: {problem}; {mend}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FunctionCall(_Record):
    name: str
    arguments: str


class ToolCall(_Record):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class _Timed(_Record):
    timestamp_s: float | None = None


class SystemMessage(_Timed):
    role: Literal["system"]
    content: str


class UserMessage(_Timed):
    role: Literal["user"]
    content: str


class AssistantMessage(_Timed):
    role: Literal["assistant"]
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(_Timed):
    role: Literal["tool"]
    tool_call_id: str
    content: str
    tool_duration_s: float | None = Field(default=None, ge=0)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Session(_Record):
    """One recorded session, whole."""

    schema_version: Literal[1]
    session_id: str
    source: str
    tools: list[dict[str, Any]] = []
    messages: list[Message] = Field(min_length=1)

    @property
    def turns(self) -> tuple[int, ...]:
        """Indices of the assistant messages that have something before them: what a replay asks for."""
        return tuple(i for i, message in enumerate(self.messages) if i and message.role == "assistant")


def parse_session(record: object, path: Path | str, line: int, where: str = "") -> Session:
    """`record` as a session, or a TraceError for its first bad field, with `where` the record is put before it."""
    try:
        return Session.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = where + (".".join(str(part) for part in first["loc"]) or "(whole record)")
        raise TraceError(
            path, line, field, first["msg"], "mend the record, or go on without it by --skip-bad"
        ) from error


def to_openai(message: Message) -> dict[str, Any]:
    """The message as a chat completion request carries it."""
    body = message.model_dump(exclude_none=True, exclude={"timestamp_s", "tool_duration_s"})
    body.setdefault("content", None)
    return body
