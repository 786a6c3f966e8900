"""A checkpoint's folder from what a flag says: a local folder as it is, a hub id through the hub's own cache.

Only configuration, tokenizer text and safetensors are fetched: nothing that could run code when it is loaded.
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
    """The local folder of checkpoint `path`, fetched if it is a hub id that is not in the cache yet."""
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
        problem = f"no such folder, and the hub did not give it ({type(error).__name__}: {reason})"
        mend = "check the name, download it where there is a network, or give a local folder"
        raise CheckpointError(flag, path, problem, mend) from error
    return str(folder)
