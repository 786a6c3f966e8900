"""How the server's processes are started on a CPU: forked, where that is safe, instead of spawned. And their threads.

Each of SGLang's processes imports the whole server, some ten seconds of a core; a forked one has it already. SGLang
spawns because a CUDA context does not survive a fork. On a CPU threads are what does not: a lock that another thread
holds, or a pool of workers, is broken in the child. So this process must be the only thread of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

# One folder for each thread of this process; the main thread's is named after the process.
TASKS = Path("/proc/self/task")

logger = logging.getLogger(__name__)

# Background threads of the allocator inside pyarrow, which prepares itself for a fork.
HARMLESS_THREADS = ("jemalloc_bg_thd",)


def choose_start_method(result: object, *args: object, **kwargs: object) -> None:
    """After SGLang has set its own method (spawn), before it starts the first process."""
    if not TASKS.is_dir():  # not Linux: threads cannot be counted
        return
    others = other_threads()
    if others:
        logger.info("processes are spawned, not forked: other threads are running (%s)", ", ".join(others))
        return
    multiprocessing.set_start_method("fork", force=True)


def spawn_from_threads(controller: object, *args: object, **kwargs: object) -> None:
    """Before the controller of replicas, itself forked, starts their schedulers from threads of its own."""
    multiprocessing.set_start_method("spawn", force=True)


def share_threads(original: Callable[..., object], *, tp_rank: int, tp_size: int) -> object:
    """Ranks of one model share the cores, where the operator has not said how many threads each may have.

    Ranks wait for each other in every layer, so that more threads than cores cost each of them the time of all.
    """
    if tp_size == 1:
        return original(tp_rank=tp_rank, tp_size=tp_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // tp_size))
    return None


def other_threads() -> list[str]:
    """Names of this process's threads beside the main one, of whatever library."""
    tasks = [task for task in TASKS.iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in tasks]
    return [name for name in names if name not in HARMLESS_THREADS]
