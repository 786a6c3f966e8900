"""Torch fallbacks for SGLang functions that need an accelerator or are slow on a CPU.

    from whiflash_sglang.cpu import fallbacks
    fallbacks.install()         # from the plugin entry point, if our CPU platform is active

They are installed through SGLang's `HookRegistry`, which also rebinds names that other modules have imported. Every
entry of `FALLBACKS` has a comment with its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import xgrammar
from sglang.srt.mem_cache.allocation import get_last_loc_torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from whiflash_sglang.cpu import layers, processes
from whiflash_sglang.cpu.platform import DISPATCH_KEY

LINEAR = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"
XGRAMMAR = "sglang.srt.constrained.xgrammar_backend"
CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
WEIGHT_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


def install() -> None:
    """Register all fallbacks; SGLang applies them after loading all plugins."""
    layers.register(DISPATCH_KEY)
    for target, fallback, hook_type in FALLBACKS:
        HookRegistry.register(target, fallback, hook_type)


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write each request's new slots, concatenated in `out_cache_loc`, to positions start..end of its table row.

    Example: starts [2, 5], ends [4, 6], slots [7, 8, 9] put 7, 8 at 2, 3 of the first row and 9 at 5 of the second.
    """
    rows, positions = expand_ranges(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, positions] = out_cache_loc[: rows.shape[0]].to(req_to_token.dtype)


def assign_extend_cache_locs(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: torch.device | str,
) -> torch.Tensor:
    """The reverse: read the slots at positions start..end of each request's row, concatenated, as int64.

    Like SGLang's, the result has `batch_size * draft_token_num` entries, zero-padded if ranges are shorter.
    """
    rows, positions = expand_ranges(req_pool_indices, start_offset, end_offset)
    slots = torch.zeros(batch_size * draft_token_num, dtype=torch.int64)
    slots[: rows.shape[0]] = req_to_token[rows, positions].to(torch.int64)
    return slots


def expand_ranges(row_ids: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ids and positions of all range entries: ids [4, 9] with 2..4 and 5..6 give [4, 4, 9] and [2, 3, 5]."""
    lengths = (ends - starts).to(torch.int64)
    firsts = lengths.cumsum(0) - lengths  # where each range begins in the output
    offsets = torch.arange(int(lengths.sum())) - firsts.repeat_interleave(lengths)
    positions = starts.to(torch.int64).repeat_interleave(lengths) + offsets
    return row_ids.to(torch.int64).repeat_interleave(lengths), positions


def record_stream(original: Callable, tensor: torch.Tensor, stream: torch.Stream) -> None:
    """A no-op for CPU tensors, which have no streams."""
    if tensor.device.type != "cpu":
        original(tensor, stream)


def allocate_token_bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """xgrammar's bitmask, one bit per token and row, all set. SGLang's needs pinned memory, and so a driver."""
    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def apply_vocab_mask(grammar: object, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set logits of disallowed tokens to minus infinity, in place, with xgrammar's CPU kernel."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column) as 16 bytes: uint32 [rows, columns] for seeds and positions [rows].

    This is the noise for sampling seeded requests. The column is hashed last, so all columns of a row share the state
    before it.
    """
    words = (seed.to(torch.int64) & 0xFFFFFFFF, (seed.to(torch.int64) >> 32) & 0xFFFFFFFF, positions.to(torch.int64))
    state = torch.zeros(len(positions), dtype=torch.int64)
    for word in words:
        state = _mixed_in(state, word)
    state = _mixed_in(state[:, None], col_indices.to(torch.int64)[None, :]) ^ 16  # the length in bytes
    state = (state ^ (state >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return (state ^ (state >> 16)).to(torch.uint32)


def _mixed_in(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Mix one word into a MurmurHash3 state. Words are int64 below 2**32; overflow keeps the correct lower half."""
    word = _rotated(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF


def _rotated(word: torch.Tensor, by: int) -> torch.Tensor:
    return (word << by | word >> (32 - by)) & 0xFFFFFFFF


def sample_filtered(
    original: Callable,
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Sample tokens [rows] int32 from `probs` [rows, vocab] with top-k, top-p and min-p; with seeds, noise by token id.

    SGLang assigns noise by sorted rank if any request of the batch filters, and by token id otherwise. A seeded text
    would then depend on the rest of the batch. SGLang also crashes the scheduler if seeds and min-p are combined.
    """
    from sglang.srt.layers import sampler

    if sampling_seed is None:
        return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)
    best, tokens = probs.sort(dim=-1, descending=True)
    left_out = torch.arange(probs.shape[-1]) >= top_ks[:, None]
    left_out |= best.cumsum(-1) - best > top_ps[:, None]
    if need_min_p_sampling:
        left_out |= best < best[:, :1] * min_ps[:, None]
    kept = torch.zeros_like(probs).scatter_(-1, tokens, best.masked_fill(left_out, 0.0))
    return sampler.multinomial_with_seed(kept.log(), sampling_seed, positions).view(-1).to(torch.int32)


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """A no-op: SGLang's batch-invariant matmuls are Triton kernels. On a CPU the last digits may depend on the batch,
    which changes a seeded text only if two tokens are almost equally likely."""


def group_over_gloo(original: Callable, *args: object, **kwargs: object) -> object:
    """Create a process group with torch's communicator only: SGLang's own (NCCL, custom all-reduce) need a GPU."""
    return original(*args, **{**kwargs, "use_pynccl": False, "use_custom_allreduce": False})


FALLBACKS: tuple[tuple[str, Callable, HookType], ...] = (
    # Requires one NUMA node per rank, though only SGLang's CPU kernels bind threads to cores.
    ("sglang.srt.utils.numa_utils.init_threads_binding", processes.share_threads, HookType.AROUND),
    # Creates an NCCL communicator for device "cpu".
    ("sglang.srt.distributed.parallel_state.init_model_parallel_group", group_over_gloo, HookType.AROUND),
    # Triton kernels: reserve a request's next slots, and read them back for a verify or a draft block.
    ("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", assign_req_to_token_pool, HookType.REPLACE),
    (
        "sglang.kernels.ops.speculative.cache_locs.assign_extend_cache_locs_func",
        assign_extend_cache_locs,
        HookType.REPLACE,
    ),
    # Triton kernel: the end of a request's open page (see `pages.py`). SGLang uses its torch version only for other
    # backend names.
    ("sglang.srt.mem_cache.allocation.get_last_loc", get_last_loc_torch, HookType.REPLACE),
    # Raises for a CPU tensor; the overlapped scheduler calls it on request indices.
    ("torch.Tensor.record_stream", record_stream, HookType.AROUND),
    # Grammars: pinned memory and Triton kernels. A request with a JSON schema would crash the scheduler.
    (f"{XGRAMMAR}._allocate_token_bitmask", allocate_token_bitmask, HookType.REPLACE),
    (f"{XGRAMMAR}.XGrammarGrammar.apply_vocab_mask", apply_vocab_mask, HookType.REPLACE),
    # Seeded requests (--enable-deterministic-inference): Triton kernels.
    ("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32, HookType.REPLACE),
    (
        "sglang.srt.batch_invariant_ops.batch_invariant_ops.enable_batch_invariant_mode",
        enable_batch_invariant_mode,
        HookType.REPLACE,
    ),
    (
        "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch",
        sample_filtered,
        HookType.AROUND,
    ),
    # Linear layers would pack their weights in every call.
    (f"{LINEAR}.process_weights_after_loading", layers.pack_weight, HookType.AFTER),
    (f"{LINEAR}.apply", layers.linear_forward, HookType.REPLACE),
    (f"{WEIGHT_UPDATER}.update_weights_from_tensor", layers.pack_again, HookType.AFTER),
    (f"{WEIGHT_UPDATER}.update_weights_from_distributed", layers.pack_again, HookType.AFTER),
    (f"{WEIGHT_UPDATER}.update_weights_from_ipc", layers.pack_again, HookType.AFTER),
    # Each spawned process would import the whole server again.
    ("sglang.srt.entrypoints.engine._set_envs_and_config", processes.choose_start_method, HookType.AFTER),
    # The controller of replicas (--dp-size) starts each one from a separate thread.
    (f"{CONTROLLER}.launch_dp_schedulers", processes.spawn_from_threads, HookType.BEFORE),
)
