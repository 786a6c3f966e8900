"""EAGLE-3: an autoregressive chain of K steps of a one-layer model (checkpoint format: SafeAILab EAGLE-3).

Entry i of its KV cache is computed from the target's fused features at position i and the embedding of token i + 1; the
output of entry i predicts token i + 2. With L committed positions and the anchor at position L:

    step 1   entry L - 1: features of L - 1, anchor             -> draft for position L + 1
    step 2   entry L:     own hidden state of step 1, draft 1   -> draft for position L + 2
    ...

Entry i is in the KV slot of position i. With one layer, K and V of an entry need no attention, so all entries except
the one drafted from are ingested KV-only. An entry depends on the token after it, which may differ at the end of a
shared prefix. With this drafter, SGLang's radix tree is therefore keyed by bigrams (bridge/scheduler_hooks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from whiflash_sglang.core.types import Drafts, Entries, Rows
from whiflash_sglang.drafters.fused import KVProjection, write_entries
from whiflash_sglang.drafters.graphs import Begin, is_one_graph, runs
from whiflash_sglang.drafters.runner import DraftBlock, DraftRunner, Plan, columns_of, kv_rows, project, select_columns

if TYPE_CHECKING:
    from sglang.srt.models.llama_eagle3 import LlamaDecoderLayer, LlamaForCausalLMEagle3


class Eagle3Drafter:
    """See `core.round.Drafter`."""

    name = "e3"

    def __init__(self, runner: DraftRunner, captured: tuple[int, ...], num_drafts: int):
        self.runner = runner
        self.num_drafts = num_drafts
        columns = columns_of(runner.spec.layer_ids, captured, runner.spec.target_hidden_size)
        self.columns = None if columns is None else columns.to(runner.device)
        model: LlamaForCausalLMEagle3 = runner.model
        self.model = model.model
        layer: LlamaDecoderLayer = self.model.layers[0]
        self.layer = layer
        attention, norms = self.layer.self_attn, [self.layer.input_layernorm, self.layer.hidden_norm]
        weight, bias = kv_rows(runner.spec, attention.qkv_proj, attention.q_size)
        kv = KVProjection([attention], weight, bias, norms, self.layer.hidden_norm.variance_epsilon)
        self.write = write_entries(runner, kv) or partial(self.write_layer, kv)
        self.token_ids = None if model.hot_token_id is None else model.hot_token_id.to(runner.device)  # [draft vocab]
        # Drafts per `propose`: all of them, or one if attention must be planned on the host before each forward.
        self.link = num_drafts if is_one_graph(runner) else 1
        hidden_size = runner.spec.hidden_size
        self.chain = runs(runner, self.propose, num_queries=1, num_entries=self.link, hidden_size=hidden_size)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Reduce captured features [n, captures * hidden] to [n, hidden], with the norms that some checkpoints add."""
        model = self.model
        features = select_columns(features, self.columns).to(model.fc.weight.dtype)
        if model.input_norm is not None:
            features = model.input_norm(features)
        if model.fc_norm is not None:
            chunks = features.chunk(model.num_aux_hidden_states, dim=-1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(model.fc_norm, chunks, strict=True)], dim=-1)
        return model.fc(features)

    def ingest(self, entries: Entries) -> None:
        """Write K and V of `entries`."""
        embeds = self.model.embed_tokens(entries.next_tokens)
        self.write((embeds, self.fuse(entries.features)), entries.positions, entries.kv_slots)

    def write_layer(
        self, kv: KVProjection, parts: Sequence[torch.Tensor], positions: torch.Tensor, kv_slots: torch.Tensor
    ) -> None:
        """Fallback of the fused kernel: `parts` is (embeddings, features), [n, hidden] each."""
        layer, attention = self.layer, self.layer.self_attn
        embeds, features = parts
        x = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(features)], dim=-1)  # [n, 2 * hidden]
        k, v = project(x, kv.weight, kv.bias).split([attention.kv_size, attention.kv_size], dim=-1)
        k = k.contiguous()
        _, k = attention.rotary_emb(positions, torch.empty_like(k), k)
        self.runner.write_kv(attention.attn, kv_slots, k, v)

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        """Draft one chain per row, starting from the target's features `last` [rows, captures * hidden]."""
        tokens, hidden = rows.anchors, self.fuse(last)  # [rows], [rows, hidden]
        drafts = tokens.new_empty(len(tokens), self.num_drafts)
        for first in range(0, self.num_drafts, self.link):
            links = slice(first, first + self.link)
            begin = Begin(rows.slots, tokens, rows.prefix_lens - 1 + first, rows.kv_slots[:, links], hidden)
            lens = [length - 1 + first for length in rows.host.prefix_lens]
            drafts[:, links], hidden, finite = self.chain(begin, lens)
            tokens = drafts[:, links.stop - 1]
        # Each step depends on the one before, so a NaN in any step reaches the last logits.
        return Drafts(drafts, finite)

    def propose(self, begin: Begin, plan: Plan) -> tuple[torch.Tensor, ...]:
        """A chain of drafts [rows, n], one per entry; the last hidden state [rows, hidden]; and whether the last logits
        are finite, [rows] bool."""
        tokens, hidden = begin.tokens, begin.hidden
        drafts = []
        for step, kv_slots in enumerate(begin.kv_slots.unbind(dim=1)):
            entry = begin.cached + step  # [rows]; entries 0 .. entry - 1 are cached
            output = self.runner.forward(
                DraftBlock(
                    size=1,
                    slots=begin.slots,
                    input_ids=tokens,
                    positions=entry,
                    kv_slots=kv_slots.contiguous(),
                    prefix_lens=entry,
                    ahead=step,
                    hidden_states=hidden,
                ),
                plan,
            )
            hidden = output.hidden_states
            tokens = output.next_token_logits.argmax(dim=-1)
            if self.token_ids is not None:
                tokens = self.token_ids[tokens]
            drafts.append(tokens)
        return torch.stack(drafts, dim=1), hidden, output.next_token_logits.isfinite().all(dim=-1)
