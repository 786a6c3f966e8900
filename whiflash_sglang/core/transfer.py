"""Between the host and the models' device, each way in one place.

What decides and counts is on the host, what computes is on the device. A device works off what it was given while the
host goes on; a read of one of its tensors (`tolist`, `item`, `bool`, a mask as an index) waits until it has finished.
So a round reads once, when there is nothing more to give (`to_host`), and what it gives on the way waits for nothing
(`to_device`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_KEPT = 256  # small tensors


def to_device(
    values: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Numbers of the host as a tensor on `device`, without waiting for what the device was given before.

    A copy from memory that is not pinned would wait for it.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors on the host, by one copy; waits for the device. Shapes are kept.

    Integers and truth values come as int64, others as float64: both have eight bytes, so that one tensor of int64
    carries the bits of all. No value that either can hold is changed.
    """
    packed = torch.cat([_bits(tensor).reshape(-1) for tensor in tensors]).cpu()
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [_unpacked(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.int64:
        return tensor
    return tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor.to(torch.int64)


def _unpacked(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return (part.view(torch.float64) if tensor.is_floating_point() else part).view(tensor.shape)


class Indices:
    """Numbers of rows, and others that differ little from round to round, as small tensors on a device.

    They are remembered by their values, as small batches have few of them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: dict[tuple[torch.dtype, tuple[float, ...]], torch.Tensor] = {}

    def of(self, numbers: tuple[float, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The numbers as a tensor [n], which nobody may write to."""
        key = (dtype, numbers)
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= _KEPT:
                self.kept.clear()
            found = self.kept[key] = to_device(numbers, self.device, dtype)
        return found
