"""Process start method and thread counts on a CPU: fork instead of spawn where that is safe.

A spawned SGLang process imports the whole server, about ten seconds of CPU time; a forked one does not. SGLang spawns
because a CUDA context does not survive a fork. On a CPU the risk is threads: locks held by other threads and thread
pools are broken in the child. So we fork only from a single-threaded process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

# One folder per thread of this process; the main thread's is named after the process id.
TASKS = Path("/proc/self/task")

logger = logging.getLogger(__name__)

# Background threads of pyarrow's allocator, which handles forks.
HARMLESS_THREADS = ("jemalloc_bg_thd",)


def choose_start_method(result: object, *args: object, **kwargs: object) -> None:
    """Switch from spawn to fork if no other threads run. Hook after SGLang has set the start method."""
    if not TASKS.is_dir():  # not Linux: threads cannot be counted
        return
    others = other_threads()
    if others:
        logger.info("spawning processes instead of forking: other threads are running (%s)", ", ".join(others))
        return
    multiprocessing.set_start_method("fork", force=True)


def spawn_from_threads(controller: object, *args: object, **kwargs: object) -> None:
    """Switch back to spawn in the controller of replicas, which starts schedulers from threads."""
    multiprocessing.set_start_method("spawn", force=True)


def share_threads(original: Callable[..., object], *, tp_rank: int, tp_size: int) -> object:
    """Divide the cores among the ranks of one model, unless OMP_NUM_THREADS is set.

    Ranks synchronize in every layer, so more threads than cores would slow all of them down.
    """
    if tp_size == 1:
        return original(tp_rank=tp_rank, tp_size=tp_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // tp_size))
    return None


def other_threads() -> list[str]:
    """Names of this process's threads except the main one and harmless ones."""
    tasks = [task for task in TASKS.iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in tasks]
    return [name for name in names if name not in HARMLESS_THREADS]
