"""Checks that a learned file (neural router, calibration, priors) was created for the served models.

A checkpoint is identified by a fingerprint of its weights: a hash of the beginning of every tensor. Two fine-tunes of
one architecture have different fingerprints. A copy, a rename or a resharding of the files does not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.startup.checkpoints import DRAFTER_FLAGS, FLAG_TARGET, load_target_spec
from whiflash_sglang.startup.config import FLAG_STEPS
from whiflash_sglang.startup.safetensors_header import read_headers, read_json

_BYTES = 1024  # hashed per tensor


@dataclass(frozen=True)
class Identity:
    """The properties of the served models that learned files depend on."""

    target: str  # fingerprint
    hidden_size: int
    drafters: Mapping[str, str]  # name -> fingerprint
    eagle_steps: int

    @classmethod
    def of(cls, target_path: str, draft_paths: Mapping[str, str], eagle_steps: int) -> Identity:
        """Read the checkpoints' configs and weights. `draft_paths`: folder by drafter."""
        return cls(
            target=fingerprint(FLAG_TARGET, target_path),
            hidden_size=load_target_spec(target_path).hidden_size,
            drafters={name: fingerprint(DRAFTER_FLAGS[name], path) for name, path in draft_paths.items()},
            eagle_steps=eagle_steps,
        )

    def to_json(self) -> dict[str, Any]:
        """The `models` field of learned files."""
        return asdict(self)

    def read(self, flag: str, path: str, file_format: str, version: int, fix: str) -> dict[str, Any]:
        """Read the JSON object of a learned file and check its format and models.

        Raises CheckpointError. `fix`: how to fix a missing file.
        """
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(flag, path, "no such file", fix)
        content = read_json(flag, file)
        if content.get("format") != file_format or content.get("format_version") != version:
            found = f"{content.get('format')!r} version {content.get('format_version')!r}"
            problem = f"is {found}, not {file_format!r} version {version}"
            raise CheckpointError(flag, file, problem, "create it again with this version")
        self.check(flag, file, content.get("models"))
        return content

    def check(self, flag: str, path: Path, recorded: object) -> None:
        """Raise CheckpointError if `recorded`, the `models` field of a file, does not match these models."""
        again = "create it again for these models, or serve the models it was made for"
        if not isinstance(recorded, dict) or set(recorded) != set(self.to_json()):
            problem = f"`models` must have exactly {sorted(self.to_json())}"
            raise CheckpointError(flag, path, problem, "create it again")
        if recorded["hidden_size"] != self.hidden_size:
            problem = (
                f"made for a target of hidden size {recorded['hidden_size']}, but this one's is {self.hidden_size}"
            )
            raise CheckpointError(flag, path, problem, again)
        if recorded["target"] != self.target:
            raise CheckpointError(flag, path, "made for another target", again)
        if recorded["drafters"] != dict(self.drafters):
            served = ", ".join(f"{name} {value}" for name, value in self.drafters.items())
            problem = f"made for other drafters ({recorded['drafters']}, but {served} are served)"
            raise CheckpointError(flag, path, problem, again)
        if recorded["eagle_steps"] != self.eagle_steps:
            problem = f"made with {FLAG_STEPS} {recorded['eagle_steps']}, but {self.eagle_steps} are served"
            raise CheckpointError(
                flag, path, problem, f"use {FLAG_STEPS} {recorded['eagle_steps']}, or create it again"
            )


@contextmanager
def parsing(flag: str, file: str) -> Iterator[None]:
    """Raise CheckpointError for `file` if the block finds a field missing or ill-typed."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        problem = f"has a missing or ill-typed field ({type(error).__name__}: {error})"
        raise CheckpointError(flag, file, problem, "create it again") from error


def fingerprint(flag: str, path: str) -> str:
    """The fingerprint of the checkpoint in the folder `path`, 16 hexadecimal digits. Raises CheckpointError."""
    digest = hashlib.sha256()
    for name, info in sorted(read_headers(flag, Path(path)).items()):
        with info.file.open("rb") as file:
            file.seek(info.start)
            beginning = file.read(min(_BYTES, info.end - info.start))
        digest.update(f"{name} {info.dtype} {info.shape}".encode() + beginning)
    return digest.hexdigest()[:16]
