"""Trace formats, one per module, detected from a record's fields, not from the file name.

    ours              {schema_version, session_id, ...}: our own JSON lines (workloads/schema.py)
    openai            {messages, tools}: OpenAI chat messages, also a plain list of messages
    tau-bench         a list of {task_id, trial, traj}
    swe-agent         {history, trajectory}: a `.traj` file
    agentic-trace     {conversations}: SGLang's `bench_serving --dataset-name agentic-trace`
    mooncake          {input_length, ...} or {messages, timestamp, ...}: Mooncake's, AIPerf's `mooncake_trace`

A reader converts the records of one file to sessions, and invalid records to TraceErrors. Readers are imported lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_workloads.schema import Session, TraceError


class Record(NamedTuple):
    """A JSON value of a file. `where` prefixes its field names in errors."""

    line: int
    where: str
    value: Any


Item = Record | TraceError
Reader = Callable[[Path, Iterable[Item]], Iterator[Session | TraceError]]

MOONCAKE_KEYS = {
    *("input_length", "text_input", "payload", "hash_ids", "output_length", "timestamp", "delay", "message_mode")
}


def format_of(record: dict[str, Any]) -> str | None:
    """The format of `record`, the first of a file; None if unknown."""
    keys = record.keys()
    if "schema_version" in keys or {"session_id", "source"} <= keys:
        return "ours"
    if "conversations" in keys:
        return "agentic-trace"
    if "history" in keys:
        return "swe-agent"
    if "traj" in keys or "task_id" in keys:
        return "tau-bench"
    if record.get("type") == "mooncake_trace" or keys & MOONCAKE_KEYS:
        return "mooncake"
    return "openai" if "messages" in keys else None


def reader(name: str) -> Reader:
    """The reader of a format."""
    return _FACTORIES[name]()


def _ours() -> Reader:
    from whiflash_workloads.formats import ours

    return ours.read


def _openai() -> Reader:
    from whiflash_workloads.formats import openai_messages

    return openai_messages.read


def _tau_bench() -> Reader:
    from whiflash_workloads.formats import tau_bench

    return tau_bench.read


def _swe_agent() -> Reader:
    from whiflash_workloads.formats import swe_agent

    return swe_agent.read


def _agentic_trace() -> Reader:
    from whiflash_workloads.formats import agentic_trace

    return agentic_trace.read


def _mooncake() -> Reader:
    from whiflash_workloads.formats import mooncake

    return mooncake.read


_FACTORIES: dict[str, Callable[[], Reader]] = {
    "ours": _ours,
    "openai": _openai,
    "tau-bench": _tau_bench,
    "swe-agent": _swe_agent,
    "agentic-trace": _agentic_trace,
    "mooncake": _mooncake,
}
