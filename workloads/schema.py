"""The trace format: JSON lines that hold recorded agent sessions.

A session may stand in one line:

    {"schema_version": 2, "session_id": "desk-1", "source": "demo", "tools": [...], "messages": [...]}

or in parts, one line a turn, as a recorder writes it while the session goes on. The parts of a session stand in order;
those of other sessions may stand between them:

    {"schema_version": 2, "session_id": "desk-1", "part": 0, "source": "recorded", "tools": [...], "messages": [...]}
    {"schema_version": 2, "session_id": "desk-1", "part": 1, "resent": {...}, "messages": [...]}

The messages of a part are the new ones of its request and, last, the reply. `resent` is the reply of the part before as
this request carried it, where that is not the same to the byte: many clients drop the reasoning or write JSON anew.

`tools` are OpenAI tool schemas. `messages` are OpenAI messages, kept as they are written, unknown fields and the order
of keys included, so that a replay asks what was asked, byte for byte. A session asks for a reply at every assistant
message that has something before it; `Session.turns` are their indices. Beside OpenAI's fields a message may carry:

    timestamp_s          all        when it came to be, in seconds on a clock that all sessions of a file share
    tool_duration_s      tool       how long the tool took
    asked                assistant  false: it stood in the history already and was not asked for (default: true)
    options              assistant  the rest of the request that asked for it: model, temperature, max_tokens, ...
    output_tokens        assistant  how many tokens the reply had
    resent               assistant  the message as later requests carry it, where that differs
    reply_known          assistant  false: the trace tells what was asked, not what was answered (default: true)
    lengths              user       the text is not known, only its length and the prefixes that it shares
    changed              all        what was changed so that a request of today carries it (workloads/adapted.py)

Version 1 is the first form in one line without these fields, and is read too. A record that does not fit raises
`TraceError`, which names file, line, field and mend.
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
BLOCK_TOKENS = 512  # of one hash id, in Mooncake's traces
SKIP = "or go on without the record by --skip-bad"

Seconds = Annotated[float, Field(allow_inf_nan=False)]


R = TypeVar("R", bound=BaseModel)


class TraceError(ValueError):
    """A trace that cannot be read: where, which field, what is wrong, and what to do."""

    def __init__(self, path: Path | str, line: int, field: str, problem: str, mend: str):
        self.path, self.line, self.field = Path(path), line, field
        super().__init__(f"{path}, line {line}, field {field}: {problem}; {mend}")


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
    """A prompt of which only the length is known, and the hashes of its leading blocks of tokens.

    A hash stands for its block and all before it: prompts that begin with the same ids share that prefix.
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
    raise ValueError("is neither text nor a list of content parts")


Resent = Annotated[dict[str, Any] | None, BeforeValidator(wire)]
Content = Annotated[str | list[dict[str, Any]], BeforeValidator(_text_or_parts)]


class _Message(BaseModel):
    """A message as a request or a reply carried it (`wire`), and what was noted beside it."""

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
        """The wire, and what is noted where it is not the default."""
        notes = {name: getattr(self, name) for name in type(self).model_fields if name in self.noted}
        defaults = {name: type(self).model_fields[name].default for name in notes}
        kept = {name: value for name, value in notes.items() if value != defaults[name]}
        plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in kept.items()}
        return self._wire | plain

    @property
    def wire(self) -> dict[str, Any]:
        """OpenAI's part of the message, as it was written. Not to be changed."""
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
    """One recorded session, whole."""

    schema_version: Literal[1, 2]
    session_id: str = Field(min_length=1)
    source: str
    tools: list[dict[str, Any]] = []
    messages: list[Message] = Field(min_length=1)

    @property
    def turns(self) -> tuple[int, ...]:
        """Indices of the assistant messages that were asked for: what a replay asks for."""
        return tuple(i for i, message in enumerate(self.messages) if i and _was_asked(message))

    @property
    def changed(self) -> Counter[str]:
        """What was changed in its messages, and how often."""
        return Counter(change for message in self.messages for change in message.changed)

    @property
    def length_only(self) -> bool:
        """Whether prompts have to be made up (workloads/synthetic.py): such a session says nothing of acceptance."""
        return any(isinstance(message, UserMessage) and message.lengths for message in self.messages)

    @property
    def needs_live_history(self) -> bool:
        """Whether a reply is not known that stands in a later prompt, so that the server's own has to stand there."""
        return any(isinstance(m, AssistantMessage) and not m.reply_known for m in self.messages[:-1])


class Part(_Record):
    """The lines of one turn: what its request added to the session, and the reply."""

    schema_version: Literal[2]
    session_id: str = Field(min_length=1)
    part: int = Field(ge=0)
    source: str = "recorded"
    tools: list[dict[str, Any]] = []
    resent: Resent = None
    messages: list[Message] = Field(min_length=1)


def parse_session(record: object, path: Path | str, line: int, where: str = "") -> Session:
    """`record` as a session, or a TraceError for its first bad field, with `where` the record is put before it."""
    return parse(Session, record, path, line, where)


def parse(kind: type[R], record: object, path: Path | str, line: int, where: str = "") -> R:
    """`record` as a `kind`, or a TraceError."""
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
    return "mend the record"


def to_openai(message: Message) -> dict[str, Any]:
    """The message as a chat completion request carries it, byte for byte if it was recorded."""
    resent = message.resent if isinstance(message, AssistantMessage) else None
    return dict(resent or message.wire)


def _was_asked(message: Message) -> bool:
    return isinstance(message, AssistantMessage) and message.asked
