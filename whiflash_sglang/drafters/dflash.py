"""DFlash: one non-causal pass of a small diffusion model fills a whole block of drafts (published format: z-lab).

The block is [anchor, mask, mask, ...] at positions L .. L + block - 1 behind L committed positions; row j of its output
predicts the token at position L + j. The context is not the drafter's own text but the target's features: K and V of a
committed position are, per layer, projections of hidden_norm(fc(features)), so that ingestion needs no query, attention
or MLP, and an entry depends on its own position only.
"""

from __future__ import annotations

import torch

from whiflash_sglang.drafters.runner import (
    DraftBlock,
    DraftRunner,
    columns_of,
    project,
    select_columns,
)
from whiflash_sglang.types import Context, Rows


class DFlashDrafter:
    name = "df"

    def __init__(self, runner: DraftRunner, captured: tuple[int, ...], num_slots: int, num_drafts: int):
        self.runner = runner
        self.num_drafts = runner.spec.block_size - 1
        columns = columns_of(runner.spec.layer_ids, captured, runner.spec.hidden_size)
        self.columns = None if columns is None else columns.to(runner.device)
        block = torch.full((1, runner.spec.block_size), runner.spec.mask_token_id, dtype=torch.int64)
        self.block = block.to(runner.device)  # [1, block]

    def ingest(self, context: Context) -> None:
        model = self.runner.model
        fused = model.project_target_hidden(select_columns(context.features, self.columns))  # [n, hidden]
        for layer in model.layers:
            attention = layer.self_attn
            k, v = attention.kv_proj_only(model.prepare_context_hidden_for_kv(layer, fused))
            k = attention.apply_k_rope(context.positions, attention.apply_k_norm(k))
            self.runner.write_kv(attention.attn, context.kv_slots, k, v)

    def draft(self, rows: Rows) -> torch.Tensor:
        num_rows, block_size = len(rows.slots), self.block.shape[1]
        block = self.block.repeat(num_rows, 1)  # [rows, block]
        block[:, 0] = rows.anchors
        positions = rows.prefix_lens[:, None] + torch.arange(block_size, device=block.device)
        output = self.runner.forward(
            rows,
            DraftBlock(
                size=block_size,
                input_ids=block.reshape(-1),
                positions=positions.reshape(-1),
                kv_slots=rows.kv_slots[:, 1 : 1 + block_size].reshape(-1),
                prefix_lens=rows.prefix_lens,
                input_embeds=self.runner.target_model.get_input_embeddings()(block.reshape(-1)),
            ),
        )
        hidden = output.hidden_states.view(num_rows, block_size, -1)[:, 1:]  # row 0 stands for the anchor itself
        head = self.runner.target_model.lm_head.weight[: self.runner.spec.vocab_size]
        return project(hidden.to(head.dtype), head).argmax(dim=-1)  # [rows, block - 1]
