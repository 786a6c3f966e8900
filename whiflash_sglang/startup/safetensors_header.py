"""Read tensor names, shapes and offsets from safetensors headers, without torch and without tensor data.

Format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data; offsets are relative to it. Detects files truncated by an interrupted copy. Errors are CheckpointErrors.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.core.errors import CheckpointError

_MAX_HEADER = 100 * 2**20
_INTEGER_TYPES = {"I64": "q", "I32": "i"}
_COPY_AGAIN = "copy or download the file again"


class TensorInfo(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes, from the start of the file
    end: int


def read_headers(flag: str, folder: Path) -> dict[str, TensorInfo]:
    """Tensor name -> info over all safetensors files of the folder. Raises if there are none."""
    if not any(folder.glob("*.safetensors")):
        _refuse_missing_weights(flag, folder)
    return check_files(flag, folder)


def check_files(flag: str, folder: Path) -> dict[str, TensorInfo]:
    """Like `read_headers`, but the folder may have no files.

    Raises for truncated or corrupt files, and for files missing according to the index or to `-00002-of-00003` names.
    With an index, SGLang loads only the files it lists.
    """
    files = sorted(folder.glob("*.safetensors"))
    places = _read_index(flag, folder)
    needed = set(places.values()) or {name for file in files for name in _numbered_with(file.name)}
    if missing := sorted(needed - {file.name for file in files}):
        raise CheckpointError(flag, folder, f"lacks the weight file {missing[0]}", _COPY_AGAIN)
    headers = {file.name: _read_header(flag, file) for file in files if not places or file.name in needed}
    for tensor, name in places.items():
        if tensor not in headers[name]:
            raise CheckpointError(flag, folder / name, f"lacks {tensor}, which the index lists", _COPY_AGAIN)
    return {tensor: info for header in headers.values() for tensor, info in header.items()}


def weight_bytes(flag: str, folder: Path) -> int:
    """Total bytes of all tensors in the folder."""
    return sum(info.end - info.start for info in read_headers(flag, folder).values())


def check_file(flag: str, file: Path) -> None:
    """Raise if `file` is not a safetensors file or is truncated."""
    _read_header(flag, file)


def read_integers(flag: str, info: TensorInfo) -> Sequence[int]:
    """The values of an int32 or int64 tensor."""
    if info.dtype not in _INTEGER_TYPES:
        raise CheckpointError(flag, info.file, f"d2t has dtype {info.dtype}, not an integer", "store it as int64")
    with info.file.open("rb") as file:
        file.seek(info.start)
        values = array(_INTEGER_TYPES[info.dtype])
        values.frombytes(file.read(info.end - info.start))
    return values


def read_json(flag: str, file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(flag, file, f"is not JSON ({error})", _COPY_AGAIN) from error
    except OSError as error:
        raise _unreadable(flag, file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(flag, file, "is not a JSON object", _COPY_AGAIN)
    return content


def _read_index(flag: str, folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the folder's index; empty without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {}
    places = read_json(flag, index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(flag, index, "has no `weight_map` of tensors to files", _COPY_AGAIN)
    return places


def _numbered_with(name: str) -> list[str]:
    """All shard names, given one like `model-00002-of-00003.safetensors`; empty for other names."""
    part = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name)
    if part is None:
        return []
    before, number, of, count, after = part.groups()
    return [f"{before}{one:0{len(number)}}{of}{count}{after}" for one in range(1, int(count) + 1)]


def _unreadable(flag: str, file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(flag, file, f"cannot be read ({error.strerror})", _COPY_AGAIN)


def refuse_pickled(flag: str, folder: Path) -> None:
    """Raise if the folder has only pickled weights. If it also has safetensors, SGLang loads those."""
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        problem = f"its weights are pickled ({pickled[0]}), which can run code when loaded"
        raise CheckpointError(flag, folder, problem, "convert them with safetensors.torch.save_file")


def _refuse_missing_weights(flag: str, folder: Path) -> None:
    refuse_pickled(flag, folder)
    fix = "give the folder with the weights; pickled weights are not downloaded, convert them to safetensors first"
    raise CheckpointError(flag, folder, "has no *.safetensors file", fix)


def _read_header(flag: str, file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER
            if length >= min(size - 8, _MAX_HEADER):
                problem = f"is truncated or not a safetensors file ({size} bytes)"
                raise CheckpointError(flag, file, problem, _COPY_AGAIN)
            text = stream.read(length)
    except OSError as error:  # e.g. a dangling link into the hub's cache, or a directory
        raise _unreadable(flag, file, error) from error
    data = 8 + length
    try:
        tensors = {
            name: TensorInfo(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                data + entry["data_offsets"][0],
                data + entry["data_offsets"][1],
            )
            for name, entry in json.loads(text).items()
            if name != "__metadata__"
        }
        needed = max((info.end for info in tensors.values()), default=data)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"has a corrupt header ({type(error).__name__}: {error})"
        raise CheckpointError(flag, file, problem, _COPY_AGAIN) from error
    if size < needed:
        raise CheckpointError(flag, file, f"is truncated: {size} of {needed} bytes", _COPY_AGAIN)
    return tensors
