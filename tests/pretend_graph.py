"""Simulated CUDA graphs: record a function's tensor operations, and replay them on the same memory.

    x = torch.zeros(4)
    graph = PretendGraph()
    with graph.recording():
        y = model(x)
    x.copy_(new)
    graph.replay()          # y has the result for `new`; no Python code of the model has run

As with a CUDA graph,

- Python numbers, shapes and branches are fixed at recording; random numbers are drawn again;
- recording has no side effects: existing memory is restored, and float tensors created by it are NaN until the first
  replay;
- a graph keeps the memory that it created, but not its inputs: if an input is freed, a replay raises, where CUDA would
  read whatever is there;
- operations that a capture forbids raise during recording: host reads, data-dependent shapes, and tensors created from
  host data.

Unlike CUDA graphs, it does not see writes to an address that a kernel got as a number: these are replayed, but not
undone after recording. Copies between device and host are ordinary copies here.

Triton kernels are recorded if Triton runs in its interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.pretend_device import INDEXED, WAITING, callers

# Created from host data: a synchronous copy on a GPU.
FRESH = {"lift_fresh", "lift_fresh_copy"}
WAITS = WAITING | {"allclose"}
# Uninitialized memory: nothing to replay.
EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# Host reads without a visible operation.
READS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.__array__: "__array__"}


class CaptureError(RuntimeError):
    """An operation that CUDA forbids during capture, or a replay that reads freed memory."""


@dataclass
class Step:
    """One operation or launch. A replay calls `act` and copies its results to the recording's tensors.

    `results` matches the leaves of `act`'s result; None for aliases of arguments and non-tensors.
    """

    name: str
    act: Callable[[], Any]
    results: list[torch.Tensor | None] = field(default_factory=list)

    def again(self) -> None:
        fresh = self.act()
        if any(result is not None for result in self.results):
            for kept, new in zip(self.results, tree_leaves(fresh), strict=True):
                if kept is not None:
                    kept.copy_(new)


class PretendGraph:
    """The `steps` of one recording, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.made: dict[int, torch.Tensor] = {}  # by storage: memory created by the recording
        self.given: dict[int, list[Any]] = {}  # by input storage: our references to it, and the caller
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by input storage: bytes and their old value
        self.is_filling = False  # `x[...] = 1.0` is running

    @contextmanager
    def recording(self) -> Iterator[None]:
        if self.steps:
            raise CaptureError("a graph is recorded once")
        with ExitStack() as stack:
            stack.callback(self.undo)
            stack.enter_context(launches_recorded(self))
            stack.enter_context(Calls(self))
            stack.enter_context(Recorder(self))
            yield

    def replay(self) -> None:
        self.check_given()
        with torch.inference_mode():
            for step in self.steps:
                step.again()

    def undo(self) -> None:
        """Restore memory to its state before the recording, like a capture."""
        with torch.inference_mode():
            for data, was in self.before.values():
                data.copy_(was)
            self.before.clear()
            for result in self.made.values():
                if result.is_floating_point():
                    result.fill_(torch.nan)

    def check_given(self) -> None:
        for key, (tensors, who) in self.given.items():
            if torch._C._storage_Use_Count(key) <= len(tensors) + 1:  # one is Python's own reference to the storage
                raise CaptureError(f"replay: the memory that {who} was given is not kept by anybody else any more")

    # ------------------------------------------------------------------------------------------ while recording

    def keep(self, tree: Any, name: str) -> Any:
        """`tree` with new references to its tensors' memory, independent of later changes to the tensor objects."""
        return tree_map_only(torch.Tensor, lambda one: self.keep_one(one, name), tree)

    def keep_one(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        kept, key = same_memory(tensor), storage_key(tensor)
        if key not in self.made and tensor.dim() > 0:  # numbers are wrapped in temporary tensors
            self.given.setdefault(key, [[], name])[0].append(kept)
        return kept

    def remember(self, tensors: list[torch.Tensor]) -> None:
        """Save the content of input memory that is about to be written."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self.made and key not in self.before and tensor.numel():
                data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[key] = data, data.clone()

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = operation_name(func)
        place = f"{name} in {place_of_call()}"
        arguments = tensors_in((args, kwargs))
        with torch.inference_mode():
            kept_args, kept_kwargs = self.keep((args, kwargs), place)
            if func._schema.is_mutable:
                self.remember(written(func, args, kwargs))
        result = func(*args, **kwargs)
        shared = {storage_key(one) for one in arguments}
        with torch.inference_mode():
            results = [self.result(one, shared) for one in tree_leaves(result)]
        if name not in EMPTY:
            self.steps.append(Step(name, lambda: func(*kept_args, **kept_kwargs), results))
        return result

    def result(self, leaf: Any, shared: set[int]) -> torch.Tensor | None:
        if not isinstance(leaf, torch.Tensor) or storage_key(leaf) in shared:
            return None
        kept = same_memory(leaf)
        self.made[storage_key(leaf)] = kept
        return kept

    def launch(self, executor: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a Triton kernel launch with its current grid."""
        name = executor.fn.__name__
        with torch.inference_mode(), _disable_current_modes(), torch._C.DisableTorchFunction():
            frozen = copy.copy(executor)
            kept_args, kept_kwargs = self.keep((args, kwargs), f"{name} in {place_of_call()}")
            self.remember(tensors_in((args, kwargs)))
            if callable(executor.grid):
                grids: list[Any] = []
                frozen.grid = lambda meta: grids.append(executor.grid(meta)) or grids[-1]
            call(frozen, *args, **kwargs)
            if callable(executor.grid):
                frozen.grid = grids[-1]
        self.steps.append(Step(name, lambda: call(frozen, *kept_args, **kept_kwargs)))


class Recorder(TorchDispatchMode):
    def __init__(self, graph: PretendGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # composed of other operations, which are recorded
                return func.decompose(*args, **kwargs)
        check(operation_name(func), args, kwargs, self.graph.is_filling)
        return self.graph.operation(func, args, kwargs)


class Calls(TorchFunctionMode):
    """Detects what operations do not show: host reads, and fills with a number."""

    def __init__(self, graph: PretendGraph):
        super().__init__()
        self.graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            refuse(READS[func], "the host would read what is not computed yet")
        self.graph.is_filling = func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.graph.is_filling = False


def check(name: str, args: Any, kwargs: Any, is_filling: bool) -> None:
    """Raise for operations that CUDA cannot capture.

    `x[2:] = 1.0` and `x[mask] = 1.0` can be captured: the number is a kernel argument. For `x[indices] = 1.0`, and
    `x[indices]` with a list, it would be copied to the device, as for `torch.tensor`.
    """
    is_masked = name in INDEXED and any(is_mask(one) for one in args[1])
    is_copied = name in FRESH and not (is_filling and args[0].dim() == 0)
    if is_copied or (is_filling and name in INDEXED and not is_masked):
        refuse(name, "something of the host would be copied to the device")
    is_counted = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITS or is_counted or (is_masked and not is_filling):
        refuse(name, "the host would wait for the device")


def is_mask(index: torch.Tensor | None) -> bool:
    """Whether an index is a boolean mask, whose true elements are counted first."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def refuse(name: str, why: str) -> None:
    raise CaptureError(f"{name} in {place_of_call()}: {why}, which a CUDA graph cannot capture")


def place_of_call() -> str:
    return " < ".join([*callers(beside=__file__)][:4])


def operation_name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor on the same memory that, unlike a view, does not refer to the original."""
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Arguments that the operation writes to, according to its schema."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    names = [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return tensors_in([given.get(name) for name in names])


@contextmanager
def launches_recorded(graph: PretendGraph) -> Iterator[None]:
    """Record launches of Triton's interpreter, which are not torch operations."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def record(executor: Any, *args: Any, **kwargs: Any) -> None:
        graph.launch(executor, call, args, kwargs)

    with mock.patch.object(GridExecutor, "__call__", record):
        yield


class PretendGraphs:
    """SGLang's graph backend interface (`BaseCudaGraphBackend`) with simulated graphs. `replays`: replayed keys."""

    def __init__(self, cuda_graph_runner: Any = None):
        self.graphs: dict[Hashable, PretendGraph] = {}
        self.outputs: dict[Hashable, Any] = {}
        self.replays: list[Hashable] = []

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Hashable,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        for _ in range(2):
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        graph = PretendGraph()
        with graph.recording():
            output = forward_fn()
        self.graphs[shape_key], self.outputs[shape_key] = graph, output

    def can_run(self, forward_batch: Any, shape_key: Hashable) -> bool:
        return shape_key in self.graphs

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Hashable, static_forward_batch: Any, **kwargs: Any) -> Any:
        self.graphs[shape_key].replay()
        self.replays.append(shape_key)
        return self.outputs[shape_key]

    def cleanup(self) -> None:
        self.graphs.clear()
        self.outputs.clear()
