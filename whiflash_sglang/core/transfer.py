"""Copies between the host and the device.

Routing and counting run on the host, models on the device. The device runs asynchronously: reading one of its tensors
(`tolist`, `item`, `bool`, a mask as an index) waits for all queued work. So a round reads once, at its end (`to_host`),
and its copies to the device do not block (`to_device`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

_KEPT = 256  # small tensors


def to_device(
    values: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Copy numbers to a tensor on `device` without waiting for queued work.

    A copy from memory that is not pinned would wait for it.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy the tensors to the host in one transfer. Waits for the device.

    Shapes are kept. Integers and bools are returned as int64, floats as float64, without loss. Both have eight bytes,
    so one int64 tensor carries the bits of all.
    """
    bits = [_bits(tensor) for tensor in tensors]
    if tensors[0].device.type == "cpu":  # nothing to transfer
        return [_unpacked(part, tensor) for part, tensor in zip(bits, tensors, strict=True)]
    packed = torch.cat([part.reshape(-1) for part in bits]).cpu()
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [_unpacked(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.int64:
        return tensor
    return tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor.to(torch.int64)


def _unpacked(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return (part.view(torch.float64) if tensor.is_floating_point() else part).view(tensor.shape)


@lru_cache(maxsize=_KEPT)
def columns(count: int, device: torch.device) -> torch.Tensor:
    """The numbers 0 .. count - 1 as an int64 tensor. It is shared: do not write to it."""
    return torch.arange(count, device=device)


class Indices:
    """A cache of small tensors on a device, by value: row numbers and others that recur from round to round.

    Small batches have few distinct ones.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: dict[tuple[torch.dtype, tuple[float, ...]], torch.Tensor] = {}

    def of(self, numbers: tuple[float, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The numbers as a tensor [n]. It is shared: do not write to it."""
        key = (dtype, numbers)
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= _KEPT:
                self.kept.clear()
            found = self.kept[key] = to_device(numbers, self.device, dtype)
        return found
