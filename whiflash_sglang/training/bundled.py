"""The bundled models on paper: their replies to given sessions, and what their routers expect there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from whiflash_sglang.launch_server import DEMO_MODELS
from whiflash_sglang.routing.artefact import load_router
from whiflash_sglang.routing.calibration import load_calibration
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.training.models import ModelPaths, load_models
from whiflash_sglang.training.replies import positions, prompts_of, served_replies
from whiflash_sglang.training.router_data import Record
from whiflash_sglang.training.walk import gather
from whiflash_workloads.tokens import TokenIds

PATHS = ModelPaths(DEMO_MODELS / "target", DEMO_MODELS / "dflash", DEMO_MODELS / "eagle3", WhiFlashConfig.eagle_steps)
CALIBRATION, ROUTER, PRIORS = (str(DEMO_MODELS / name) for name in ("calibration.json", "router", "priors.json"))


def replies_to(
    base_url: str, sessions: Iterable[dict[str, Any]], max_tokens: int
) -> tuple[list[Record], list[TokenIds]]:
    """Every position of the target's replies to the sessions' recorded histories, which a server writes; and the
    prompts."""
    models = load_models(PATHS, torch.device("cpu"))
    prompts = [prompt for session in sessions for prompt in prompts_of(session, models.tokenizer)]
    records = []
    for reply in served_replies(base_url, models.tokenizer, prompts, max_tokens):
        found = positions(models.target, models.eagle3, models.dflash, reply, PATHS.eagle_steps)
        if found is not None:
            records.append(Record.of(reply, found))
    return records, [prompt.ids for prompt in prompts]


def gains(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """What the bundled routers expect `e3` to gain, at every position."""
    identity = PATHS.identity()
    calibration = load_calibration(CALIBRATION, identity)
    network = load_router(ROUTER, identity, None, None).e3_network
    return {
        "entropy": np.array(calibration.gains)[np.digitize(gather(records, "entropy"), calibration.edges)],
        "neural": network(torch.from_numpy(gather(records, "hidden")).float()).numpy(),
    }
