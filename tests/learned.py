"""Test data for learned artefacts: identities, cost tables, networks, collected positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from whiflash_sglang.routing.costs import NONE, RoundCosts
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.neural import Network
from whiflash_sglang.training.replies import Positions
from whiflash_sglang.training.router_data import Record

HIDDEN = 6


def identity(**changes: object) -> Identity:
    fields = {"target": "t" * 16, "hidden_size": HIDDEN, "drafters": {"df": "d" * 16, "e3": "e" * 16}, "eagle_steps": 5}
    return Identity(**{**fields, **changes})


def network(width: int = 4, seed: int = 0) -> Network:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((width, HIDDEN), (width,), (1, width), (1,))
    return Network(*(torch.randn(shape, generator=generator) for shape in shapes))


def cost_table(df: float = 10.0, e3: float = 12.0, none: float = 5.0, per_row: float = 0.0) -> RoundCosts:
    """A cost table with the given milliseconds per round, plus `per_row` for every row beyond the first."""
    costs = RoundCosts({"df": 8, "e3": 6}, (1, 4, 16), (256, 4096))
    for rows in costs.batch_sizes:
        for context in costs.contexts:
            more = per_row * (rows - 1)
            costs.set_round("df", rows, context, 2.0, df - 2.0 + more)
            costs.set_round("e3", rows, context, 4.0, e3 - 4.0 + more)
            costs.set_round(NONE, rows, context, 0.0, none)
    return costs


def record(
    df: Sequence[int], e3: Sequence[int], session: str = "s", span: int = 1, hidden: np.ndarray | None = None
) -> Record:
    """A reply with these acceptance lengths at its positions."""
    n = len(df)
    found = Positions(
        hidden=np.zeros((n, HIDDEN), dtype=np.float16) if hidden is None else hidden.astype(np.float16),
        entropy=np.zeros(n, dtype=np.float32),
        span=np.full(n, span, dtype=np.uint8),
        df=np.array(df, dtype=np.uint8),
        e3=np.array(e3, dtype=np.uint8),
    )
    return Record(session, 2, 10, "user", None, found)
