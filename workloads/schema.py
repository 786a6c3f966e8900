"""The trace format: recorded agent sessions as JSON lines.

A session is one line:

    {"schema_version": 2, "session_id": "desk-1", "source": "demo", "tools": [...], "messages": [...]}

or several parts, one line per turn, as a recorder writes them. The parts of a session are in order, but may be
interleaved with other sessions:

    {"schema_version": 2, "session_id": "desk-1", "part": 0, "source": "recorded", "tools": [...], "messages": [...]}
    {"schema_version": 2, "session_id": "desk-1", "part": 1, "resent": {...}, "messages": [...]}

The messages of a part are the new ones of its request and, last, the reply. `resent` is the previous part's reply as
this request contains it, if that differs in any byte: many clients drop the reasoning or re-serialize JSON.

`tools` are OpenAI tool schemas. `messages` are OpenAI messages, kept verbatim, including unknown fields and key order,
so a replay sends the same bytes. Every assistant message except a first one is a turn, a reply that was requested;
`Session.turns` are their indices. In addition to OpenAI's fields a message may have:

    timestamp_s          all        creation time, in seconds on a clock shared by all sessions of a file
    tool_duration_s      tool       duration of the tool call, in seconds
    asked                assistant  false: part of the history, not requested (default: true)
    options              assistant  the rest of its request: model, temperature, max_tokens, ...
    output_tokens        assistant  length of the reply in tokens
    resent               assistant  the message as later requests contain it, if that differs
    reply_known          assistant  false: the reply was not recorded (default: true)
    lengths              user       the text is unknown, but its length and shared prefixes are given
    changed              all        conversions to today's format (workloads/adapted.py)

Version 1 is the one-line form without these fields; it can be read, too. An invalid record raises `TraceError`, which
names file, line, field and fix.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)

from whiflash_workloads.adapted import adapted, wire

SCHEMA_VERSION: Final = 2
BLOCK_TOKENS = 512  # tokens per hash id in Mooncake's traces
SKIP = "or skip the record with --skip-bad"

Seconds = Annotated[float, Field(allow_inf_nan=False)]


R = TypeVar("R", bound=BaseModel)


class TraceError(ValueError):
    """A trace that cannot be read: file, line, field, problem and fix."""

    def __init__(self, path: Path | str, line: int, field: str, problem: str, fix: str):
        self.path, self.line, self.field = Path(path), line, field
        super().__init__(f"{path}, line {line}, field {field}: {problem}; {fix}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FunctionCall(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    arguments: str


class ToolCall(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: FunctionCall


class Lengths(_Record):
    """A prompt of unknown text, with its length and the hashes of its leading token blocks.

    A hash covers its block and all blocks before it. Prompts that begin with the same ids share that prefix.
    """

    input_tokens: int = Field(gt=0)
    hash_ids: list[int] = []
    block_tokens: int = Field(default=BLOCK_TOKENS, gt=0)

    @model_validator(mode="after")
    def _blocks_within_input(self) -> Lengths:
        if self.hash_ids and (len(self.hash_ids) - 1) * self.block_tokens >= self.input_tokens:
            raise ValueError(
                f"{len(self.hash_ids)} hash ids of {self.block_tokens} tokens are too many for {self.input_tokens} "
                "input tokens"
            )
        return self


def _text_or_parts(content: object) -> object:
    if isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        return content
    raise ValueError("is neither a string nor a list of content parts")


Resent = Annotated[dict[str, Any] | None, BeforeValidator(wire)]
Content = Annotated[str | list[dict[str, Any]], BeforeValidator(_text_or_parts)]


class _Message(BaseModel):
    """A message as sent (`wire`), and our own fields (`noted`)."""

    model_config = ConfigDict(frozen=True, extra="allow")
    noted: ClassVar[frozenset[str]] = frozenset({"timestamp_s", "changed"})

    timestamp_s: Seconds | None = None
    changed: tuple[str, ...] = ()
    _wire: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_wire(cls, data: Any, build: ModelWrapValidatorHandler[_Message]) -> _Message:
        message = build(data)
        if isinstance(data, dict):
            message._wire = {key: value for key, value in data.items() if key not in cls.noted}
        return message

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        """The wire, and our own fields that differ from their defaults."""
        notes = {name: getattr(self, name) for name in type(self).model_fields if name in self.noted}
        defaults = {name: type(self).model_fields[name].default for name in notes}
        kept = {name: value for name, value in notes.items() if value != defaults[name]}
        plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in kept.items()}
        return self._wire | plain

    @property
    def wire(self) -> dict[str, Any]:
        """OpenAI's part of the message, as recorded. Do not modify."""
        return self._wire


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    noted = _Message.noted | {"lengths"}

    role: Literal["user"]
    content: Content
    lengths: Lengths | None = None


class AssistantMessage(_Message):
    noted = _Message.noted | {"asked", "options", "output_tokens", "resent", "reply_known"}

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    asked: bool = True
    options: dict[str, Any] | None = None
    output_tokens: int | None = Field(default=None, ge=0)
    resent: Resent = None
    reply_known: bool = True


class ToolMessage(_Message):
    noted = _Message.noted | {"tool_duration_s"}

    role: Literal["tool"]
    tool_call_id: str = Field(min_length=1)
    content: Content
    tool_duration_s: Seconds | None = Field(default=None, ge=0)


Message = Annotated[
    Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")],
    BeforeValidator(adapted),
]
NOTED = SystemMessage.noted | UserMessage.noted | AssistantMessage.noted | ToolMessage.noted


class Session(_Record):
    """One complete recorded session."""

    schema_version: Literal[1, 2]
    session_id: str = Field(min_length=1)
    source: str
    tools: list[dict[str, Any]] = []
    messages: list[Message] = Field(min_length=1)

    @property
    def turns(self) -> tuple[int, ...]:
        """Indices of the assistant messages that were requested, and that a replay requests."""
        return tuple(i for i, message in enumerate(self.messages) if i and _was_asked(message))

    @property
    def changed(self) -> Counter[str]:
        """Kind of conversion -> count, over all messages."""
        return Counter(change for message in self.messages for change in message.changed)

    @property
    def length_only(self) -> bool:
        """Whether prompts must be synthesized (workloads/synthetic.py); acceptance is then meaningless."""
        return any(isinstance(message, UserMessage) and message.lengths for message in self.messages)

    @property
    def needs_live_history(self) -> bool:
        """Whether later prompts contain an unknown reply, which the server's own must replace."""
        return any(isinstance(m, AssistantMessage) and not m.reply_known for m in self.messages[:-1])


class Part(_Record):
    """One turn of a session in parts: its request's new messages, and the reply."""

    schema_version: Literal[2]
    session_id: str = Field(min_length=1)
    part: int = Field(ge=0)
    source: str = "recorded"
    tools: list[dict[str, Any]] = []
    resent: Resent = None
    messages: list[Message] = Field(min_length=1)


def parse_session(record: object, path: Path | str, line: int, where: str = "") -> Session:
    """Parse `record` as a session. Raises TraceError for the first invalid field; `where` prefixes its name."""
    return parse(Session, record, path, line, where)


def parse(kind: type[R], record: object, path: Path | str, line: int, where: str = "") -> R:
    """Parse `record` as a `kind`. Raises TraceError."""
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(whole record)"
        raise TraceError(path, line, where + field, first["msg"], f"{_mend(field)}, {SKIP}") from error


def _mend(field: str) -> str:
    last = field.rpartition(".")[2]
    if field == "schema_version":
        return f"this release reads versions 1 to {SCHEMA_VERSION}: use the release that wrote it"
    if last in ("id", "tool_call_id"):
        return "give every tool call an id, and its output the same as tool_call_id"
    return "fix the record"


def to_openai(message: Message) -> dict[str, Any]:
    """The message as a chat completion request contains it, byte-identical if it was recorded."""
    resent = message.resent if isinstance(message, AssistantMessage) else None
    return dict(resent or message.wire)


def _was_asked(message: Message) -> bool:
    return isinstance(message, AssistantMessage) and message.asked
