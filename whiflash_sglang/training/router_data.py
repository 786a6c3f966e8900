"""Files of router data: every position of the target's replies, as a round start.

A folder has `manifest.json` and shards, each with the replies to some of the sessions, in order:

    shard-00000.safetensors    hidden [n, hidden] float16, entropy [n] float32, span, df, e3 [n] uint8, concatenated
                               over all replies; metadata per reply: session, message, start, length, context_kind, tool

See `replies.Positions` for the fields. Shards are written atomically, so an interrupted run resumes with the missing
ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.training.replies import Positions, Reply

FORMAT, FORMAT_VERSION = "whiflash-router-data", 1
_COLLECT = "collect it with `python -m whiflash_sglang.training.collect_router_data`"


class Record(NamedTuple):
    """One reply."""

    session: str
    message: int  # index of the recorded reply
    start: int  # tokens before the reply
    context_kind: str  # of the last message before it
    tool: str | None  # whose output that is
    positions: Positions

    @classmethod
    def of(cls, reply: Reply, positions: Positions) -> Record:
        """The record of a reply and its positions."""
        prompt = reply.prompt
        return cls(prompt.session, prompt.message, reply.start, prompt.context_kind, prompt.tool, positions)


class RouterData(NamedTuple):
    """The content of a folder."""

    manifest: dict[str, Any]
    records: list[Record]

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions, in order."""
        return list(dict.fromkeys(record.session for record in self.records))


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard, counted from 0."""
    return folder / f"shard-{number:05}.safetensors"


def write_shard(file: Path, records: Sequence[Record]) -> None:
    """Write the records of some sessions. May be empty, which marks the shard as done."""
    tensors = {}
    if records:
        tensors = {
            field: np.concatenate([getattr(record.positions, field) for record in records])
            for field in Positions._fields
        }
    replies = [{**r._asdict(), "positions": None, "length": len(r.positions.entropy)} for r in records]
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"replies": json.dumps(replies)})
    partial.replace(file)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest. Raises ConfigError if the folder has a different one."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    file = folder / "manifest.json"
    if file.exists() and json.loads(file.read_text()) != content:
        raise ConfigError("--out", folder, "contains data of other models, traces or options", "give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def load_router_data(folder: Path) -> RouterData:
    """Load all records of a folder. Raises ConfigError if there are none, or if shards are missing."""
    file = folder / "manifest.json"
    if not file.is_file():
        raise ConfigError("--data", folder, "has no manifest.json", _COLLECT)
    manifest = json.loads(file.read_text())
    if (manifest.get("format"), manifest.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ConfigError("--data", folder, f"is not {FORMAT} version {FORMAT_VERSION}", _COLLECT)
    records = []
    for number in range(manifest["shards"]):
        shard = shard_path(folder, number)
        if not shard.is_file():
            raise ConfigError("--data", folder, f"{shard.name} is missing", "run the same collection again")
        records += _read_shard(shard)
    if not records:
        raise ConfigError("--data", folder, "contains no positions", "collect from traces with assistant turns")
    return RouterData(manifest, records)


def _read_shard(file: Path) -> list[Record]:
    with safe_open(file, framework="numpy") as shard:
        replies = json.loads(shard.metadata()["replies"])
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (it is no dict)
    records, first = [], 0
    for reply in replies:
        last = first + reply.pop("length")
        fields = {name: tensor[first:last] for name, tensor in tensors.items()}
        records.append(Record(**{**reply, "positions": Positions(**fields)}))
        first = last
    return records
