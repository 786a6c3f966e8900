"""Router `neural`: the neural policy of WhiFlash (arXiv 2606.07710).

Two linear layers with a GELU in between take the target's final hidden state at the last verified position. They
predict the gain in acceptance length of one drafter, the "positive" one, over the other, in tokens. The router's file
names the positive drafter (`artefact.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from whiflash_sglang.routing.score import Score


class Network(NamedTuple):
    """Hidden states [n, hidden] -> gains [n] in tokens: linear, GELU, linear."""

    weight_in: torch.Tensor  # [width, hidden]
    bias_in: torch.Tensor  # [width]
    weight_out: torch.Tensor  # [1, width]
    bias_out: torch.Tensor  # [1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(F.linear(hidden.to(self.weight_in.dtype), self.weight_in, self.bias_in))
        return F.linear(inner, self.weight_out, self.bias_out).squeeze(-1)

    def negated(self) -> Network:
        """The network that predicts the negated gain."""
        return self._replace(weight_out=-self.weight_out, bias_out=-self.bias_out)


class Folded(NamedTuple):
    """The same function in fewer operations. For the few rows of a round, launches cost more than arithmetic.

    With u = x / sqrt(2), GELU(x) = (u + u * erf(u)) / sqrt(2). Both factors are folded into the weights. (On a CPU, the
    setup of torch's GELU takes longer than everything else.)
    """

    weight_in: torch.Tensor  # [hidden, width]
    bias_in: torch.Tensor  # [width]
    weight_out: torch.Tensor  # [width, 1]
    bias_out: torch.Tensor  # [1]

    @classmethod
    def of(cls, network: Network) -> Folded:
        scale = math.sqrt(0.5)
        weight_in, bias_in, weight_out, bias_out = network
        return cls((weight_in.t() * scale).contiguous(), bias_in * scale, weight_out.t() * scale, bias_out)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        u = torch.addmm(self.bias_in, hidden.to(self.weight_in.dtype), self.weight_in)
        return torch.addmm(self.bias_out, torch.addcmul(u, u, torch.erf(u)), self.weight_out)[:, 0]

    def to(self, device: torch.device) -> Folded:
        return Folded(*(tensor.to(device) for tensor in self))


class NeuralScore(Score):
    """Expected gain of `e3` over `df`, in tokens. The positive drafter of `network` is `e3`."""

    in_tokens = True

    def __init__(self, network: Network, num_slots: int):
        super().__init__(num_slots)
        self.network = Folded.of(network)

    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if self.network.weight_in.device != hidden.device:
            self.network = self.network.to(hidden.device)
        return self.network(hidden.flatten(0, -2).index_select(0, at))[:, None]

    def signals(self, slots: Sequence[int]) -> dict[str, list[float]]:
        return {"score": self.read(slots)}
