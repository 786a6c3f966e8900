"""The WHIFLASH speculative worker: translates SGLang's calls into rounds. Contains no algorithm.

SGLang's scheduler calls `forward_batch_generation` with a prefill batch (whole prompts or chunks) or a decode batch
(one round). Bonus tokens and lengths survive between calls in `batch.spec_info`. Features and routing state belong to
drafters and router, by request slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from whiflash_sglang.bridge.algorithm import draft_input
from whiflash_sglang.bridge.builders import (
    asked,
    build_draft_runner,
    capture_final_hidden_states,
    captured_layers,
    drafter_specs,
    dummy_batch,
    metric_labels,
    prompt_token,
)
from whiflash_sglang.bridge.logit_adjustments import penalize_next
from whiflash_sglang.bridge.markers import span_reader
from whiflash_sglang.bridge.memory_checks import check_memory
from whiflash_sglang.bridge.scheduler_hooks import raw_logits
from whiflash_sglang.bridge.start_block import kv_tokens_lost, print_start_block
from whiflash_sglang.core.backlog import Backlog
from whiflash_sglang.core.round import DecodeRound, Router
from whiflash_sglang.core.stop_conditions import tokens_to_end
from whiflash_sglang.core.types import Rows
from whiflash_sglang.drafters import DRAFTERS
from whiflash_sglang.routing import Learned, create_router
from whiflash_sglang.routing.cost_cache import cache_file, load_table, machine, save_table
from whiflash_sglang.routing.costs import BATCH_SIZES, CONTEXTS, Measured, RoundCosts, measure, places
from whiflash_sglang.routing.exploration import TrialRouter
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.priors import document
from whiflash_sglang.routing.probe import RoundProbe
from whiflash_sglang.routing.threshold import ThresholdRouter
from whiflash_sglang.serving.batches import batch_result, decode_rows, prefill_positions
from whiflash_sglang.serving.metrics import Metrics
from whiflash_sglang.serving.ranks import tp_ranks
from whiflash_sglang.serving.totals import RequestFigures, Totals
from whiflash_sglang.serving.verifier import SGLangTarget, all_as_tensors
from whiflash_sglang.serving.verify_graphs import graph_sizes, made_for, verify_widths
from whiflash_sglang.startup import progress
from whiflash_sglang.startup.config import WhiFlashConfig, active_config

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class WhiFlashWorker(BaseSpecWorker):
    """Holds the target worker and one draft worker per drafter. Created by SGLang's scheduler."""

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, ps: ParallelState, nccl_port: int, target_worker: TpModelWorker
    ):
        super().__init__()
        self.config: WhiFlashConfig = active_config()
        self.specs = drafter_specs(self.config, server_args)
        self.learned = Learned.load(self.config, server_args.model_path)
        self._target_worker = target_worker
        if self.config.router == "neural":  # before CUDA graphs are captured
            capture_final_hidden_states(target_worker.model_runner.model)
        self.show_start_block = ps.tp_rank == 0
        self.runners = {}
        for name, spec in self.specs.items():
            self.say(f"loading drafter {name} {spec.path}")
            self.runners[name] = build_draft_runner(spec, server_args, gpu_id, ps, nccl_port, target_worker)
        # SGLang's memory report needs a single draft worker; use the first.
        self._draft_worker = next(iter(self.runners.values())).worker
        self.server_args = server_args
        self.ranks = tp_ranks()
        self.thirds_shown = 0
        self.shows_metrics = server_args.enable_metrics and ps.tp_rank == 0

    def say(self, doing: str) -> None:
        """Print progress, on rank 0 only."""
        if self.show_start_block:
            progress.say(doing)

    def alloc_memory_pool(
        self, memory_pool_config: Any = None, req_to_token_pool: Any = None, token_to_kv_pool_allocator: Any = None
    ) -> None:
        """Allocate the drafters' KV pools. Raises ConfigError if memory is short."""
        check_memory(self.config, self.specs, self._target_worker.model_runner, req_to_token_pool)
        for runner in self.runners.values():
            runner.worker.alloc_memory_pool(
                memory_pool_config=memory_pool_config,
                req_to_token_pool=req_to_token_pool,
                token_to_kv_pool_allocator=token_to_kv_pool_allocator,
            )
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator

    def init_attention_backends(self) -> None:
        """Create each drafter's attention backend for its number of queries."""
        for runner in self.runners.values():
            with made_for(runner.spec.num_queries):
                runner.worker.init_attention_backends()

    def init_cuda_graphs(self) -> None:
        """Initialize graph capture, then assemble the round. SGLang's last call before serving."""
        target_runner = self._target_worker.model_runner
        sizes = graph_sizes(target_runner)
        if sizes:
            self.say("capturing CUDA graphs")
        for name, runner in self.runners.items():
            # SGLang would capture a single draft forward; ours are captured as a whole (drafters/graphs.py).
            runner.worker.init_cuda_graphs(capture_decode_cuda_graph=False)
            self.runners[name] = runner._replace(graph_sizes=sizes)
        self.assemble()

    def assemble(self) -> None:
        """Build the round, once everything is allocated."""
        kv_table = self.req_to_token_pool.req_to_token
        captured = captured_layers(self.specs.values())
        reader = span_reader(self.server_args, self._target_worker)
        self.totals = Totals(self.config.drafter_names, reader, self.learned.priors)
        tokens, lost = kv_tokens_lost(self._target_worker.model_runner, self.runners.values())
        self.totals.pool = {"tokens": tokens, "lost_to_draft_pools": lost}
        self.metrics = Metrics(self.totals, metric_labels(self.server_args)) if self.shows_metrics else None
        hidden_size = next(iter(self.specs.values())).target_hidden_size
        drafters = {
            name: DRAFTERS[name](runner, captured=captured, num_drafts=self.config.eagle_steps)
            for name, runner in self.runners.items()
        }
        widths = {name: 1 + drafter.num_drafts for name, drafter in drafters.items()}
        self.max_width = max(widths.values())
        verify = verify_widths(self._target_worker.model_runner, {1, *widths.values()})
        self.target = SGLangTarget(self._target_worker, len(captured) * hidden_size, verify)
        costs = self.cost_table(widths) if self.config.weighs_costs else None
        dtype = self._target_worker.model_runner.dtype
        backlog = Backlog(drafters, self.target.feature_size, dtype, kv_table, self.config.max_backlog)
        self.round = DecodeRound(
            create_router(self.config, kv_table.shape[0], self.learned, costs),
            drafters,
            self.target,
            backlog,
            timed=self.totals.timed,
        )
        self.totals.health = self.round.health
        router = describe_router(self.config, self.round.router)
        if isinstance(self.round.router, TrialRouter):
            self.totals.prior_share = self.round.router.inner.share
        self.ranks.share(self.round)
        if costs is not None:
            router += f", {self.measure_costs(costs)}"
            self.totals.costs = costs
        if self.show_start_block:
            print_start_block(self.config, self.specs, self._target_worker, self.runners, self.target.widths, router)

    def cost_table(self, widths: dict[str, int]) -> RoundCosts:
        """An empty cost table, with batch sizes and contexts limited to what fits into the pool."""
        pool = self._target_worker.model_runner.max_total_num_tokens
        max_rows = self.server_args.max_running_requests or self.req_to_token_pool.size
        rows = max(1, min(max_rows, BATCH_SIZES[-1], pool // (2 * self.max_width)))
        longest = min(self.req_to_token_pool.req_to_token.shape[1], pool - rows * self.max_width) - self.max_width
        contexts = tuple(context for context in CONTEXTS if context < longest) or (longest,)
        return RoundCosts(widths, places(rows, BATCH_SIZES), contexts)

    def measure_costs(self, costs: RoundCosts) -> str:
        """Fill the cost table by running rounds on free KV slots. Returns a summary for the start block."""
        kv_table = self.req_to_token_pool.req_to_token

        def make_rows(num_rows: int, context: int) -> Rows:
            batch = dummy_batch(self._target_worker, kv_table, num_rows, context, self.max_width)
            self.target.bind(batch)
            return decode_rows(batch, kv_table, self.max_width)

        touched = kv_table[: costs.batch_sizes[-1]]
        untouched = touched.clone()
        synchronize = torch.cuda.synchronize if kv_table.is_cuda else lambda: None
        began = time.perf_counter()
        with torch.inference_mode(), RoundProbe(self.round, make_rows, synchronize).attached() as probe:
            measured = measure(costs, self.ranks.first(probe.run), self.show_progress)
        touched.copy_(untouched)
        doubt = self.check_costs(costs, measured)
        return f"costs of rounds measured in {time.perf_counter() - began:.1f} s{doubt}"

    def show_progress(self, share: float) -> None:
        """Print a line for each third of the cost measurement."""
        thirds = int(3 * share)
        if thirds > self.thirds_shown:
            self.thirds_shown = thirds
            self.say(f"measuring round costs: {100 * thirds // 3}%")

    def check_costs(self, costs: RoundCosts, measured: Measured) -> str:
        """Cache costs measured on an idle machine. On a busy one, adopt cached costs or the calibration's.

        Returns a note for the start block, empty if the measurement was undisturbed.
        """
        identity = self.learned.identity or Identity.of(
            self.server_args.model_path, self.config.draft_paths, self.config.eagle_steps
        )
        model = self._target_worker.model_runner
        key = {
            **machine(),
            "models": identity.to_json(),
            "dtype": str(model.dtype),
            "attention": self.server_args.attention_backend,
            "graphs": graph_sizes(model),
            "ranks": self.ranks.size,
            "widths": costs.widths,
        }
        if measured.disturbed is None:
            if self.ranks.is_first:
                save_table(cache_file(key), costs.snapshot(), key)
            return ""
        calibration = self.learned.calibration
        tables = {
            "an earlier start": load_table(cache_file(key)),
            "the calibration": None if calibration is None else calibration.costs_ms,
        }
        source, table = next(((name, table) for name, table in tables.items() if table), (None, None))
        if table is not None:
            costs.adopt(table)
        costs.disturbed = measured.disturbed
        used = "the disturbed measurement" if source is None else f"the shape of {source}"
        logger.warning(
            "WHIFLASH: round costs were measured on a busy machine: %s. Starting with %s; serving corrects them.",
            measured.disturbed,
            used,
        )
        return f" on a busy machine, using {used}"

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        """Attention backends of target and drafters."""
        workers = [self._target_worker, *(runner.worker for runner in self.runners.values())]
        return tuple(worker.model_runner.attn_backend for worker in workers)

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish: Any = None, grammar_barrier: Any = None
    ) -> GenerationBatchResult:
        """Run one scheduler step: a prefill, an idle step or a decode round."""
        with torch.inference_mode():
            if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
                return self.prefill(batch)
            if batch.forward_mode.is_idle():
                return self.idle(batch)
            return self.decode(batch)

    def prefill(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Run the target over the prompts and let every drafter ingest them, so that the radix tree may share them."""
        penalize_next(batch)
        with self.totals.timed("prefill"):
            result = self._target_worker.forward_batch_generation(batch, capture_hidden_mode=CaptureHiddenMode.FULL)
        logits_output = result.logits_output
        result.next_token_ids = self.ranks.same(result.next_token_ids)
        features, hidden = self.target.split(logits_output.hidden_states)
        prefill = prefill_positions(batch, features, hidden, result.next_token_ids)
        sampled = self.round.prefill(prefill, raw_logits.pop())
        self.begin_records(batch, sampled)
        all_as_tensors(logits_output)
        logits_output.hidden_states = None  # large, and unused on the host
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = draft_input(bonus_tokens=result.next_token_ids, new_seq_lens=batch.seq_lens)
        result.next_token_ids = torch.tensor(sampled)  # already on the host, where SGLang reads it
        return result

    def begin_records(self, batch: ScheduleBatch, sampled: list[int]) -> None:
        """Start the record of each prefilled request, which ends up in its meta_info."""
        for row, request in enumerate(batch.reqs):
            if request.customized_info is None:  # else this is a later chunk, or follows a retraction
                figures = RequestFigures(self.totals, request, asked(request, self.config))
                request.customized_info = {"whiflash": figures}
            is_whole = prompt_token(request, batch.prefix_lens[row] + batch.extend_lens[row]) is None
            request.customized_info["whiflash"].begin(sampled[row] if is_whole else None)

    def decode(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Run one round for the batch."""
        began = time.perf_counter()
        with self.totals.timed_round():
            self.target.bind(batch)
            rows = decode_rows(batch, self.req_to_token_pool.req_to_token, self.max_width)
            with self.totals.timed("spans"):
                rows = rows._replace(host=self.totals.with_states(rows.host))
                signals = self.totals.signals(rows.host, self.round.router)
            result = self.round.run(rows)
        with self.totals.timed("route"):
            self.round.router.learn(rows.host, result, 1000 * (time.perf_counter() - began))
        self.totals.count(rows.host, result, signals)
        if self.totals.not_drafted.is_due():
            logger.warning("WHIFLASH: %s", self.totals.not_drafted)
        for name in self.round.health.judge(result, rows.host.slots, [request.rid for request in batch.reqs]):
            self.tell_switched_off(name)
        kept = [tokens_to_end(*text) for text in zip(batch.reqs, result.committed, strict=True)]
        ending = [row for row, text in enumerate(kept) if text.ends or batch.reqs[row].to_finish]
        known = rows.host
        self.finish(
            [known.slots[row] for row in ending], [known.prefix_lens[row] + kept[row].num_tokens for row in ending]
        )
        if self.metrics is not None:
            self.metrics.update(at_once=len(ending) == len(kept))
        return batch_result(rows, result, [text.num_tokens for text in kept], self.target.logprobs)

    def tell_switched_off(self, name: str) -> None:
        """Log that a drafter was switched off because of NaN or infinite values."""
        off = self.round.health.tried_at
        logger.error(
            "WHIFLASH: drafter %s (%s) produced NaN or infinite values for several requests and is switched off; "
            "requests continue with %s. The text is not affected. The drafter is retried after %d rounds. "
            "Check the checkpoint and its dtype.",
            name,
            self.specs[name].path,
            " and ".join(other for other in self.round.drafters if other not in off) or "no drafter",
            self.round.health.wait[name],
        )

    def prepare_for_kv_cache_release(self, request: Req) -> None:
        """Called by SGLang when a request has ended, just before its KV slots go into the radix tree.

        Cuts off tokens that were accepted after a stop or the last allowed token: no later prompt would match them.
        """
        length = len(request.origin_input_ids) + len(request.output_ids_through_stop)
        request.kv_committed_len = min(request.kv_committed_len, length)
        slot = int(request.req_pool_idx)
        if self.round.lags(slot, request.kv_committed_len):  # its end was not foreseen in `decode`
            self.finish([slot], [request.kv_committed_len])
        self.totals.end(slot)

    def finish(self, slots: Sequence[int], lens: Sequence[int]) -> None:
        """Let the drafters catch up with ending requests, in one pass. `lens`: committed positions by slot."""
        if not slots:
            return
        with self.totals.timed("catch_up"):
            catch_ups = self.round.finish(slots, lens)
        self.totals.count_catch_ups(catch_ups)

    def priors_document(self) -> dict[str, Any] | None:
        """This server's learned priors in the format of a priors file (`priors.py`); None without priors."""
        priors, identity = self.learned.priors, self.learned.identity
        if priors is None or identity is None:
            return None
        return document({self.config.router: priors}, identity)

    def update_weights_from_disk(self, recv_req: UpdateWeightFromDiskReqInput) -> tuple[bool, str]:
        """Keep the drafters' weights when the target's change. Output stays exact, but acceptance may drop."""
        return True, "The target's weights were updated; WHIFLASH's drafters keep theirs, so acceptance may drop."

    update_weights_from_ipc = update_weights_from_disk

    def idle(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Step of a data-parallel rank without requests."""
        empty = torch.empty(0, dtype=torch.int64, device=batch.device)
        return GenerationBatchResult(
            next_token_ids=empty,
            accept_lens=empty.to(torch.int32),
            next_draft_input=draft_input(bonus_tokens=empty, new_seq_lens=empty),
            speculative_num_draft_tokens=self.max_width,
            new_seq_lens=empty,
        )


def describe_router(config: WhiFlashConfig, router: Router) -> str:
    """The router's line in the start block."""
    if isinstance(router, TrialRouter):
        return f"{describe_router(config, router.inner)}, priors {config.priors}"
    if isinstance(router, ThresholdRouter):
        return f"{config.router}, e3 above {router.threshold:g} {'nats' if config.router == 'entropy' else 'tokens'}"
    return f"{config.router}, by tokens per millisecond" if config.weighs_costs else config.router
