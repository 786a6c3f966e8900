"""DFlash: one non-causal pass of a small diffusion model fills a whole block of drafts (checkpoint format: z-lab).

The block is [anchor, mask, mask, ...] at positions L .. L + block - 1 after L committed positions; row j of its output
predicts the token at position L + j. The context is the target's features: per layer, K and V of a committed position
are projections of hidden_norm(fc(features)). Ingestion therefore needs no query, attention or MLP, and an entry depends
on its own position only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm

from whiflash_sglang.core.types import Drafts, Entries, Rows
from whiflash_sglang.drafters.fused import KVProjection, write_entries
from whiflash_sglang.drafters.graphs import Begin, runs
from whiflash_sglang.drafters.runner import (
    DraftBlock,
    DraftRunner,
    Plan,
    TargetHead,
    columns_of,
    kv_rows,
    project,
    select_columns,
)

if TYPE_CHECKING:
    from sglang.srt.models.dflash import DFlashDecoderLayer, DFlashDraftModel


class DFlashDrafter:
    """See `core.round.Drafter`."""

    name = "df"

    def __init__(self, runner: DraftRunner, captured: tuple[int, ...], num_drafts: int):
        self.runner = runner
        self.num_drafts = runner.spec.block_size - 1
        columns = columns_of(runner.spec.layer_ids, captured, runner.spec.hidden_size)
        self.columns = None if columns is None else columns.to(runner.device)
        block = torch.full((1, runner.spec.block_size), runner.spec.mask_token_id, dtype=torch.int64)
        self.block = block.to(runner.device)  # [1, block]
        self.head = TargetHead(runner.target_model, runner.spec.vocab_size)
        model: DFlashDraftModel = runner.model
        blocks: Iterable[DFlashDecoderLayer] = model.layers
        layers = [layer.self_attn for layer in blocks]
        rows = [kv_rows(runner.spec, layer.qkv_proj, layer.q_size) for layer in layers]
        kv = KVProjection(
            layers,
            weight=by_kind([weight for weight, _ in rows]),
            bias=by_kind([bias for _, bias in rows if bias is not None]) if rows[0][1] is not None else None,
            norms=[model.hidden_norm],
            epsilon=layers[0].k_norm.variance_epsilon,
            k_norm=torch.stack([layer.k_norm.weight for layer in layers]),
        )
        fused = write_entries(runner, kv)
        # The kernel applies hidden_norm on read, so features are stored as `fc` outputs them.
        self.reduce = model.project_target_hidden if fused is None else model.fc
        self.write = fused or partial(self.write_layers, kv)
        block_size = self.block.shape[1]
        self.fill = runs(runner, self.propose, num_queries=block_size, num_entries=block_size)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Reduce captured features [n, captures * hidden] to [n, hidden]."""
        return self.reduce(select_columns(features, self.columns))

    def ingest(self, entries: Entries) -> None:
        """Write K and V of `entries` in every layer."""
        self.write((self.fuse(entries.features),), entries.positions, entries.kv_slots)

    def write_layers(
        self, kv: KVProjection, parts: Sequence[torch.Tensor], positions: torch.Tensor, kv_slots: torch.Tensor
    ) -> None:
        """Fallback of the fused kernel: `parts` is ([n, hidden] normed features,)."""
        # All layers project the same features, so one operation serves all.
        (features,) = parts
        shape = (len(positions), 2, len(kv.layers), -1)  # K or V, layer, kv_heads * head_dim
        k, v = project(features, kv.weight, kv.bias).view(shape).unbind(1)
        heads = k.reshape(*k.shape[:2], -1, kv.k_norm.shape[-1])
        k = (rms_norm(heads, heads.shape[-1:], eps=kv.epsilon) * kv.k_norm[:, None]).flatten(1)
        _, k = kv.layers[0].rotary_emb(positions, torch.empty_like(k), k)
        k = k.view(v.shape)
        for i, layer in enumerate(kv.layers):
            self.runner.write_kv(layer.attn, kv_slots, k[:, i], v[:, i])

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        """Draft one block per row; `last` is not used."""
        block_size = self.block.shape[1]
        begin = Begin(rows.slots, rows.anchors, rows.prefix_lens, rows.kv_slots[:, 1 : 1 + block_size])
        return Drafts(*self.fill(begin, rows.host.prefix_lens))

    def propose(self, begin: Begin, plan: Plan) -> tuple[torch.Tensor, ...]:
        """Drafts [rows, block - 1] of the block at `begin`, and whether their hidden states are finite, [rows] bool."""
        num_rows, block_size = begin.kv_slots.shape
        block = self.block.repeat(num_rows, 1)  # [rows, block]
        block[:, 0] = begin.tokens
        positions = begin.cached[:, None] + torch.arange(block_size, device=block.device)
        output = self.runner.forward(
            DraftBlock(
                size=block_size,
                slots=begin.slots,
                input_ids=block.reshape(-1),
                positions=positions.reshape(-1),
                kv_slots=begin.kv_slots.reshape(-1),
                prefix_lens=begin.cached,
                ahead=0,
                input_embeds=self.runner.target_model.get_input_embeddings()(block.reshape(-1)),
            ),
            plan,
        )
        hidden = output.hidden_states.view(num_rows, block_size, -1)[:, 1:]  # row 0 is the anchor
        return self.head.best(hidden), hidden.isfinite().flatten(1).all(dim=1)


def by_kind(kv: list[torch.Tensor]) -> torch.Tensor:
    """Reorder K and V rows of several layers, [2 * kv_size, ...] each, to all K followed by all V."""
    halves = [part.chunk(2) for part in kv]
    return torch.cat([half[kind] for kind in (0, 1) for half in halves])
