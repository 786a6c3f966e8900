"""The launcher, with a scheduler that dumps every drafter's KV of each finished request, and a neural router's inputs.

    WHIFLASH_TEST_DUMPS=FOLDER python -m tests.e2e.dumping_server --demo ...

FOLDER/RID.npz has the part of the request that the radix tree is about to share: its `tokens` [n], and for every
drafter and layer the keys and values of positions 0 .. n - 1 as `NAME.LAYER.k` and `NAME.LAYER.v` [n, kv_heads,
head_dim]. With a neural router, `hidden` [rounds + 1, hidden] are its input states, starting with the prefill's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from whiflash_sglang import launch_server

FOLDER = "WHIFLASH_TEST_DUMPS"


def install() -> None:
    """Hook into SGLang's insertion of a request's KV slots into the tree. The forked scheduler inherits the hook."""
    from sglang.srt.mem_cache.radix_cache import RadixCache

    from whiflash_sglang.cpu.processes import other_threads
    from whiflash_sglang.routing.neural import NeuralScore
    from whiflash_sglang.serving.worker import WhiFlashWorker

    workers: list[WhiFlashWorker] = []
    seen: dict[int, list[np.ndarray]] = {}  # hidden states by request slot
    newest: list[np.ndarray] = []  # of the last forward, by row
    assemble, cache_finished = WhiFlashWorker.assemble, RadixCache.cache_finished_req
    observe, keep = NeuralScore.observe, NeuralScore.keep

    def assemble_and_keep(worker: WhiFlashWorker) -> None:
        assemble(worker)
        workers.append(worker)
        seen.clear()  # drop states of the measured rounds

    def observe_and_see(score: NeuralScore, logits: Any, hidden: Any, at: Any) -> Any:
        newest[:] = [state.copy() for state in hidden.flatten(0, -2)[at].float().numpy()]
        return observe(score, logits, hidden, at)

    def keep_and_see(score: NeuralScore, slots: Any, signals: Any) -> None:
        keep(score, slots, signals)
        for slot, state in zip(slots, newest, strict=True):
            seen.setdefault(slot, []).append(state)

    def dump_and_cache(tree: RadixCache, request: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        if is_insert:  # not for a retraction
            states = seen.pop(int(request.req_pool_idx), None)
            read = {} if states is None else {"hidden": np.array(states)}
            write(request.rid, shared(workers[0], request, kv_len_to_handle) | read)
        cache_finished(tree, request, is_insert, kv_len_to_handle=kv_len_to_handle)

    WhiFlashWorker.assemble = assemble_and_keep
    RadixCache.cache_finished_req = dump_and_cache
    NeuralScore.observe, NeuralScore.keep = observe_and_see, keep_and_see
    if others := other_threads():
        raise SystemExit(f"the scheduler would be spawned and write nothing, as other threads run ({others})")


def shared(worker: Any, request: Any, length: int) -> dict[str, np.ndarray]:
    """The first `length` positions of a request."""
    tokens = [*request.origin_input_ids, *request.output_ids][:length]
    slots = worker.req_to_token_pool.req_to_token[request.req_pool_idx, :length].long()
    arrays = {"tokens": np.array(tokens, dtype=np.int64)}
    for name, runner in worker.runners.items():
        pool = runner.worker.model_runner.token_to_kv_pool
        for layer in range(worker.specs[name].num_layers):
            for kind, buffer in zip("kv", pool.get_kv_buffer(layer), strict=True):
                arrays[f"{name}.{layer}.{kind}"] = buffer[slots].numpy()
    return arrays


def write(rid: str, arrays: dict[str, np.ndarray]) -> None:
    path = Path(os.environ[FOLDER]) / f"{rid}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.rename(path)  # atomic


if __name__ == "__main__":
    install()
    launch_server.main()
