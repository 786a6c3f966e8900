"""The JSON result of a replay, written by `--json-out` and read by reports.

It is the replay's JSON line plus `detail`: percentiles 0 to 100 of every latency, and the traced turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from whiflash_workloads.figures import latencies, quantiles
from whiflash_workloads.report import Report, Turn
from whiflash_workloads.schema import Session
from whiflash_workloads.speculation import RequestFigures

MAX_ASKED = 600  # characters kept of the message that a traced turn answers


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Asked(_Part):
    """The message that a turn answers."""

    role: str
    text: str


class View(_Part):
    """A traced turn."""

    session_id: str
    index: int
    depth: int
    asked: Asked
    completion_tokens: int
    ttft_ms: float | None
    e2e_ms: float | None
    figures: RequestFigures


class Arguments(BaseModel):
    """The replay's flags, which decide whether two results are comparable."""

    model_config = ConfigDict(frozen=True, extra="allow")

    label: str
    traces: list[str]
    limit: int | None
    max_tokens: int
    temperature: float
    history: str
    concurrency: int | None
    arrivals: str | None
    seed: int
    tool_time: str
    warm_up: int
    cache_bust: bool


class Detail(_Part):
    """Data for reports only."""

    quantiles: dict[str, list[float]]
    views: list[View]


class Result(_Part):
    """The content of a result file."""

    benchmark: Literal["replay"]
    arguments: Arguments
    figures: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    hardware: dict[str, Any]
    detail: Detail

    @field_validator("figures")
    @classmethod
    def _are_all_there(cls, figures: dict[str, Any]) -> dict[str, Any]:
        needed = {"sessions", *Report("", (), 0.0, None).figures()}
        if lacking := sorted(needed - figures.keys()):
            raise ValueError(f"`{lacking[0]}` is missing: the result is from another version")
        return figures


class ResultError(ValueError):
    """A file that is not a result of a replay."""


def detail(report: Report, sessions: Sequence[Session]) -> Detail:
    """The `detail` of a report; `sessions`: the counted ones."""
    times = latencies([turn for turn in report.turns if turn.error is None])
    traced = [turn for turn in report.turns if turn.speculation is not None and turn.speculation.trace]
    return Detail(
        quantiles={name: quantiles(values) for name, values in times.items()},
        views=[view(turn, sessions[turn.session]) for turn in traced],
    )


def view(turn: Turn, session: Session) -> View:
    """The token view of a traced turn. Raises ValueError if it has no figures."""
    if turn.speculation is None:
        raise ValueError("a view needs the figures of its turn")
    before = session.messages[turn.index - 1]
    text = before.content or ""
    return View(
        session_id=turn.session_id,
        index=turn.index,
        depth=turn.depth,
        asked=Asked(role=before.role, text=text if len(text) <= MAX_ASKED else text[:MAX_ASKED] + " ..."),
        completion_tokens=turn.completion_tokens,
        ttft_ms=_milliseconds(turn.ttft_s),
        e2e_ms=_milliseconds(turn.e2e_s),
        figures=turn.speculation,
    )


def read(path: Path) -> Result:
    """Read a result. Raises ResultError, which names file, field and fix."""
    fix = "create it with `python -m whiflash_workloads.replay ... --json-out FILE`"
    try:
        result = Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResultError(f"RESULT {path}: cannot be read ({error.strerror}); {fix}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(file)"
        raise ResultError(f"RESULT {path}: field {field}: {first['msg']}; {fix}") from error
    return result


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
