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


def to_device(values: Sequence[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Integers of the host as an int64 tensor on `device`, without waiting for what the device was given before.

    A copy from memory that is not pinned would wait for it.
    """
    tensor = torch.as_tensor(values, dtype=torch.int64)
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
    """Numbers of rows as int64 tensors on a device; remembered, as small batches have few of them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """The numbers as a tensor [n], which nobody may write to."""
        index = self.kept.get(numbers)
        if index is None:
            if len(self.kept) >= _KEPT:
                self.kept.clear()
            index = self.kept[numbers] = to_device(numbers, self.device)
        return index
