"""Layers of the trainable draft models in plain PyTorch, equivalent to SGLang's.

Attention takes an explicit mask, because training runs many chains or blocks of one text in parallel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Rope:
    """Rotary embedding (neox style: halves, not pairs)."""

    def __init__(self, head_dim: int, theta: float, device: torch.device):
        self.inverse = theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `x` [..., n, head_dim] to `positions` [n] (or broadcastable to x's leading dimensions)."""
        angle = positions[..., None].float() * self.inverse
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(x.dtype), torch.cat([angle.sin()] * 2, -1).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention; Q, K and V read `input_width` columns."""

    def __init__(self, input_width: int, hidden: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(input_width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(input_width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(input_width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        if qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.qk_norm = qk_norm

    def query(self, x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Q [rows, heads, n, head_dim] of x [rows, n, input_width]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        q = self.q_norm(q) if self.qk_norm else q
        return rope(q.transpose(1, 2), positions)

    def keys(self, x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [rows, kv_heads, n, head_dim] of x [rows, n, input_width]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        k = self.k_norm(k) if self.qk_norm else k
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return rope(k.transpose(1, 2), positions), v.transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention output [rows, n, hidden]. `mask` [rows or 1, 1, n, m] bool is True where allowed; None: causal."""
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A gated MLP with SiLU."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
