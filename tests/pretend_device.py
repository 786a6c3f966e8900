"""A simulated device: tensors that compute on the CPU and record every time the host would have waited for them.

    with PretendDevice() as device:
        x = device.give(torch.arange(3))    # a device tensor
        y = x + 1                           # results are device tensors, too
        y.cpu()                             # device.copies: one, with its caller
        if y.sum() > 0: ...                 # device.waits: one; also for `y[y > 1]`, as a mask is counted first

The device is called `meta`, which torch supports on every machine. Mixing its tensors with CPU tensors raises, as on a
GPU. So do operations on results of `torch.tensor(..., device=...)`, for which the host would wait on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
# The host must wait for the results of these operations, or for their shapes.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "unique_consecutive",
    "unique_dim",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnDevice(torch.Tensor):
    """`held`: the data as a CPU tensor. Views hold views."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended device")


class PretendDevice(TorchDispatchMode):
    """`copies`, `waits` and `sent` list the callers of copies to the host, other waits, and copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[list[str]] = []
        self.waits: list[str] = []
        self.sent: list[list[str]] = []

    def forget(self) -> None:
        for told in (self.copies, self.waits, self.sent):
            told.clear()

    def give(self, tree: Any) -> Any:
        """Move the tensors in `tree` to the device, without a wait."""
        return tree_map_only(torch.Tensor, lambda one: one if isinstance(one, OnDevice) else OnDevice(one), tree)

    def take(self, tree: Any) -> Any:
        """Move the tensors in `tree` to the CPU, for code that simulates the device's own work."""
        return tree_map_only(OnDevice, lambda one: one.held, tree)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # composed of other operations: `cpu` of a copy, `item` of a read
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        ours = [one for one in tree_leaves((args, kwargs)) if isinstance(one, OnDevice)]
        if name == "_to_copy" and kwargs.get("device") not in (None, DEVICE) and ours:
            self.copies.append([*callers()])
            return func(*self.take(args), **kwargs)
        wanted = kwargs.get("device") == DEVICE
        if wanted:
            kwargs["device"] = torch.device("cpu")
            if name == "_to_copy" and not ours:
                self.sent.append([*callers()])
        elif ours:
            self.check(name, func, args, kwargs)
        result = func(*self.take(args), **self.take(kwargs))
        if name.endswith("_") and isinstance(args[0], OnDevice):
            return args[0]
        return self.give(result) if (ours or wanted) else result

    def check(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        """Record what the host would wait for, and raise for what a device rejects."""
        place = f"{name} in {' < '.join([*callers()][:4])}"
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or counted:
            self.waits.append(place)
        others = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.dim() > 0]
        others = [one for one in others if not isinstance(one, OnDevice)]
        if name in INDEXED:
            indices = [one for one in args[1] if one is not None]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                self.waits.append(place)  # counts its true elements
            if any(not isinstance(one, OnDevice) for one in indices):
                self.waits.append(place)  # is copied to the device first
            others = [one for one in others if not any(one is index for index in indices)]
        if name == "copy_" and isinstance(args[0], OnDevice) and others:
            self.sent.append([*callers()])
        elif others:
            raise RuntimeError(f"{place}: tensors on the device and on the host")


def callers(beside: str = __file__) -> Iterator[str]:
    """Functions on the stack, innermost first, without those of torch, this file and `beside`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename not in (__file__, beside) and "/torch/" not in frame.f_code.co_filename:
            yield frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
