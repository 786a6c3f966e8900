"""Names, shapes and places of the tensors in a folder of safetensors files, without torch and without their data.

A safetensors file is: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape,
data_offsets}}, then the data that the offsets count from. Files cut short by an interrupted copy are found here.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.errors import CheckpointError

_MAX_HEADER = 100 * 2**20
_INTEGER_TYPES = {"I64": "q", "I32": "i"}
_COPY_AGAIN = "copy or download the file again"


class TensorInfo(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes, from the start of the file
    end: int


def read_headers(flag: str, folder: Path) -> dict[str, TensorInfo]:
    """Tensor name -> info, over all safetensors files of the folder."""
    files = sorted(folder.glob("*.safetensors"))
    _check_index(flag, folder, files)
    if not files:
        _refuse_missing_weights(flag, folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= _read_header(flag, file)
    return tensors


def weight_bytes(flag: str, folder: Path) -> int:
    """Bytes of all tensors in the folder."""
    return sum(info.end - info.start for info in read_headers(flag, folder).values())


def check_file(flag: str, file: Path) -> None:
    """Refuse a file that is no safetensors file or was cut short."""
    _read_header(flag, file)


def read_integers(flag: str, info: TensorInfo) -> Sequence[int]:
    """The values of an integer tensor."""
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
        raise CheckpointError(flag, file, f"is no JSON ({error})", _COPY_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(flag, file, "is no JSON object", _COPY_AGAIN)
    return content


def _check_index(flag: str, folder: Path, files: Sequence[Path]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    named = set(read_json(flag, index).get("weight_map", {}).values())
    if missing := sorted(named - {file.name for file in files}):
        raise CheckpointError(flag, folder, f"lacks the weight file {missing[0]}", _COPY_AGAIN)


def refuse_pickled(flag: str, folder: Path) -> None:
    """Refuse a folder whose weights are pickles only. With safetensors beside them, SGLang loads those."""
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        problem = f"its weights are pickled ({pickled[0]}), which can run code when loaded"
        raise CheckpointError(flag, folder, problem, "convert them with safetensors.torch.save_file")


def _refuse_missing_weights(flag: str, folder: Path) -> None:
    refuse_pickled(flag, folder)
    mend = "give the folder that holds the weights; pickled ones are not fetched from a hub, convert them first"
    raise CheckpointError(flag, folder, "has no *.safetensors file", mend)


def _read_header(flag: str, file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER
        if length >= min(size - 8, _MAX_HEADER):
            raise CheckpointError(flag, file, f"is no safetensors file or cut short ({size} bytes)", _COPY_AGAIN)
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(flag, file, f"has a broken header ({error})", _COPY_AGAIN) from error
    data = 8 + length
    tensors = {
        name: TensorInfo(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            data + entry["data_offsets"][0],
            data + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    needed = max((info.end for info in tensors.values()), default=data)
    if size < needed:
        raise CheckpointError(flag, file, f"is cut short: {size} of {needed} bytes", _COPY_AGAIN)
    return tensors
