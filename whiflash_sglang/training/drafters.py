"""Both drafters as trainable PyTorch modules, and the target's view of recorded texts (`Verdict`).

A drafter learns to predict the target's greedy choices. The label at a position is the target's own choice after the
recorded text before it. It counts only while the recorded text since the anchor follows the target's choices, because a
real chain ends at the first mismatch. Features are captured as in SGLang: the output of layer id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from whiflash_sglang.training.layers import MLP, Attention, Rope


@dataclass(frozen=True)
class DrafterShape:
    """Sizes of a drafter's layers."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    theta: float

    @classmethod
    def of(cls, config: Qwen3Config) -> DrafterShape:
        """The same sizes as the target's layers."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            float(config.rope_parameters["rope_theta"]),
        )


class Verdict(NamedTuple):
    """The target's outputs for a batch of recorded texts, under teacher forcing."""

    ids: torch.Tensor  # [rows, n] int64, padding -1
    spans: torch.Tensor  # [rows, n] uint8
    features: torch.Tensor  # [rows, n, layers, hidden], outputs of all layers
    choices: torch.Tensor  # [rows, n] int64; the target's greedy token after position i
    entropy: torch.Tensor  # [rows, n] of the distribution after position i, nats
    hidden: torch.Tensor  # [rows, n, hidden], final hidden states (input of the head)

    @property
    def follows(self) -> torch.Tensor:
        """[rows, n] bool: whether the recorded token at i is the target's choice after i - 1."""
        same = torch.zeros_like(self.ids, dtype=torch.bool)
        same[:, 1:] = self.ids[:, 1:] == self.choices[:, :-1]
        return same


@torch.no_grad()
def judge(target: Qwen3ForCausalLM, ids: np.ndarray, spans: np.ndarray, autocast: bool = True) -> Verdict:
    """Run the target on texts `ids` [rows, n] (padding -1) with `spans` [rows, n].

    `autocast`: compute in bfloat16, for training; switch it off to compare with a float32 server.
    """
    tokens = torch.from_numpy(ids).to(target.device)
    with torch.autocast(target.device.type, torch.bfloat16, enabled=autocast):
        output = target.model(input_ids=tokens.clamp(min=0), output_hidden_states=True)
        logits = F.linear(output.last_hidden_state, target.lm_head.weight).float()
    features = torch.stack([hidden.float() for hidden in output.hidden_states[1:]], dim=2)
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    hidden = output.last_hidden_state.float()
    return Verdict(tokens, torch.from_numpy(spans).to(target.device), features, logits.argmax(-1), entropy, hidden)


class Eagle3(nn.Module):
    """One layer over pairs of (fused feature of position i, embedding of token i + 1); see drafters/eagle3.py."""

    def __init__(self, shape: DrafterShape, layer_ids: tuple[int, ...], draft_tokens: torch.Tensor):
        super().__init__()
        self.shape, self.layer_ids = shape, layer_ids
        self.register_buffer("draft_tokens", draft_tokens)  # [draft vocab] int64, target ids
        hidden = shape.hidden
        self.fc = nn.Linear(len(layer_ids) * hidden, hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.hidden_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.self_attn = Attention(2 * hidden, hidden, shape.heads, shape.kv_heads, shape.head_dim, qk_norm=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = MLP(hidden, shape.intermediate)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.lm_head = nn.Linear(hidden, len(draft_tokens), bias=False)

    def start_from(self, target: Qwen3ForCausalLM) -> None:
        """Initialize to read the last captured layer through the target's head, which saves most training steps."""
        hidden = self.shape.hidden
        with torch.no_grad():
            self.lm_head.weight.copy_(target.lm_head.weight[self.draft_tokens])
            self.norm.weight.copy_(target.model.norm.weight)
            self.fc.weight.mul_(0.2)
            self.fc.weight[:, -hidden:] += torch.eye(hidden, device=self.fc.weight.device)
            self.self_attn.o_proj.weight.mul_(0.1)
            self.mlp.down_proj.weight.mul_(0.1)

    def chains(self, embed: nn.Module, verdict: Verdict, steps: int, entries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the logits [rows, chains, draft vocab] of each step of the chains from `entries` [rows, chains].

        Step k (from 0) of the chain at entry i predicts token i + 2 + k. Recorded tokens are used as drafts (teacher
        forcing). The chain at entry i sees the true entries 0 .. i and its own later ones; other entries need only K
        and V.
        """
        n, num = verdict.ids.shape[1], entries.shape[1]
        device = verdict.ids.device
        rope = Rope(self.shape.head_dim, self.shape.theta, device)
        ids = verdict.ids.clamp(min=0)
        fused = self.fc(verdict.features[:, :, list(self.layer_ids)].flatten(2))  # [rows, n, hidden]
        index = torch.arange(n, device=device)
        k, v = self.self_attn.keys(self.join(embed(ids.roll(-1, dims=1)), fused), index, rope)
        mask = (index <= entries[:, :, None])[:, None]  # [rows, 1, chains, n]
        own = torch.eye(num, dtype=torch.bool, device=device).expand(len(ids), 1, -1, -1)
        state = fused.gather(1, entries[:, :, None].expand(-1, -1, fused.shape[2]))
        for step in range(steps):
            # Entry i + step reads token i + step + 1.
            tokens = ids.gather(1, (entries + step + 1).clamp(max=n - 1))
            x, positions = self.join(embed(tokens), state), (entries + step)[:, None]
            if step:
                own_k, own_v = self.self_attn.keys(x, positions, rope)
                k, v, mask = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), torch.cat([mask, own], 3)
            middle = state + self.self_attn.attend(self.self_attn.query(x, positions, rope), k, v, mask)
            state = middle + self.mlp(self.post_attention_layernorm(middle))
            yield self.lm_head(self.norm(state))

    def join(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The attention's input [..., 2 * hidden] from embeddings and features [..., hidden]."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(features)], dim=-1)


class DFlash(nn.Module):
    """A few layers that fill a block of mask tokens in one pass; see drafters/dflash.py."""

    def __init__(self, shape: DrafterShape, layer_ids: tuple[int, ...], layers: int, block: int, mask_token: int):
        super().__init__()
        self.shape, self.layer_ids, self.block, self.mask_token = shape, layer_ids, block, mask_token
        hidden = shape.hidden
        self.fc = nn.Linear(len(layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.layers = nn.ModuleList(DFlashLayer(shape) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)

    def start_from(self, target: Qwen3ForCausalLM) -> None:
        """Initialize with the target's last layers on its last captured features, which saves most training steps."""
        hidden = self.shape.hidden
        with torch.no_grad():
            self.fc.weight.mul_(0.2)
            self.fc.weight[:, -hidden:] += torch.eye(hidden, device=self.fc.weight.device)
            self.norm.weight.copy_(target.model.norm.weight)
            for layer, source in zip(self.layers, target.model.layers[-len(self.layers) :], strict=True):
                layer.load_state_dict(source.state_dict())

    def blocks(self, embed: nn.Module, head: torch.Tensor, verdict: Verdict, anchors: torch.Tensor) -> torch.Tensor:
        """Logits [rows, anchors, block - 1, vocab] of the blocks at positions `anchors` [rows, anchors].

        Entry j predicts the token at anchor + 1 + j. A block sees the positions before its anchor.
        """
        rows, n = verdict.ids.shape
        device = verdict.ids.device
        rope = Rope(self.shape.head_dim, self.shape.theta, device)
        context = self.hidden_norm(self.fc(verdict.features[:, :, list(self.layer_ids)].flatten(2)))
        num = anchors.shape[1]
        tokens = torch.full((rows, num, self.block), self.mask_token, device=device)
        tokens[:, :, 0] = verdict.ids.clamp(min=0).gather(1, anchors)
        offsets = torch.arange(self.block, device=device)
        positions = (anchors[:, :, None] + offsets).flatten(1)  # [rows, num * block]
        number = torch.arange(num, device=device).repeat_interleave(self.block)
        own = (number[:, None] == number[None, :]).expand(rows, 1, -1, -1)
        before = (torch.arange(n, device=device) < anchors.repeat_interleave(self.block, dim=1)[:, :, None])[:, None]
        mask = torch.cat([before, own], dim=3)  # [rows, 1, num * block, n + num * block]
        x = embed(tokens).flatten(1, 2)
        for layer in self.layers:
            x = layer(x, context, positions[:, None], torch.arange(n, device=device), mask, rope)
        hidden = self.norm(x).unflatten(1, (num, self.block))[:, :, 1:]
        return F.linear(hidden, head)


class DFlashLayer(nn.Module):
    """A decoder layer whose attention also reads the context."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        hidden = shape.hidden
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.self_attn = Attention(hidden, hidden, shape.heads, shape.kv_heads, shape.head_dim, qk_norm=True)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = MLP(hidden, shape.intermediate)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        positions: torch.Tensor,
        context_positions: torch.Tensor,
        mask: torch.Tensor,
        rope: Rope,
    ) -> torch.Tensor:
        """`x` [rows, queries, hidden] attends to `context` [rows, n, hidden] and itself, as `mask` allows."""
        normed = self.input_layernorm(x)
        k, v = self.self_attn.keys(normed, positions, rope)
        context_k, context_v = self.self_attn.keys(context, context_positions, rope)
        q = self.self_attn.query(normed, positions, rope)
        x = x + self.self_attn.attend(q, torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2), mask)
        return x + self.mlp(self.post_attention_layernorm(x))
