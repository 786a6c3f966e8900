"""Resolve a checkpoint flag to a local folder: hub ids are downloaded into the hub's cache.

Downloads configs, tokenizer files and safetensors only, nothing that could run code when loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from whiflash_sglang.core.errors import CheckpointError

WHOLE_DRAFTER = ("*.json", "*.safetensors")
WHOLE_TARGET = (*WHOLE_DRAFTER, "*.txt", "*.model", "*.jinja")  # tokenizers and chat templates too

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve(
    flag: str, path: str, *, revision: str | None = None, cache_dir: str | None = None, patterns: Sequence[str]
) -> str:
    """Return the local folder of `path`, downloading a hub id that is not cached. Raises CheckpointError."""
    if path and Path(path).is_dir():
        return path
    if not _HUB_ID.fullmatch(path):
        raise CheckpointError(flag, path, "no such folder", "give a folder that holds a checkpoint, or a hub id")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        problem = f"no such folder, and the hub download failed ({type(error).__name__}: {reason})"
        fix = "check the name and the network, or give a local folder"
        raise CheckpointError(flag, path, problem, fix) from error
    return str(folder)
