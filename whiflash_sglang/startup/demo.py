"""`--demo`: the bundled models, their router files, and the flags that they are served with."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup.config import SCORED, WhiFlashConfig

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

DEMO_MODELS = Path(__file__).parents[1] / "demo_models"
DEMO_REQUEST = DEMO_MODELS / "request.json"  # a request that the bundled models can answer
# Placed before the operator's flags, which override them: argparse takes a flag's last value.
DEMO_DEFAULTS = (
    "--served-model-name=whiflash-demo",
    "--host=127.0.0.1",
    "--dtype=float32",
    "--context-length=8192",
    "--max-total-tokens=65536",
    "--max-running-requests=16",
    "--sampling-backend=pytorch",
    "--reasoning-parser=qwen3",
    "--tool-call-parser=qwen",
    "--enable-cache-report",
    "--skip-server-warmup",
    "--sleep-on-idle",
)


def fill_defaults(flags: argparse.Namespace) -> None:
    """Fill in the bundled models, and their router files, for flags that were not given."""
    if not (DEMO_MODELS / "target" / "config.json").is_file():
        fix = "rebuild them with `python scripts/train_demo_models.py`, or give your own models without --demo"
        raise ConfigError("--demo", None, f"the bundled models are not in {DEMO_MODELS}", fix)
    flags.model_path = flags.model_path or str(DEMO_MODELS / "target")
    if flags.speculative_draft_model_path is None and flags.whiflash_drafters != "e3":
        flags.speculative_draft_model_path = str(DEMO_MODELS / "dflash")
    if flags.whiflash_eagle_draft is None and flags.whiflash_drafters != "df":
        flags.whiflash_eagle_draft = str(DEMO_MODELS / "eagle3")
    _fill_router(flags)


def _fill_router(flags: argparse.Namespace) -> None:
    """Fill in router, calibration and priors of the bundled models, if exactly these are served."""
    served = (flags.model_path, flags.speculative_draft_model_path, flags.whiflash_eagle_draft)
    if served != tuple(str(DEMO_MODELS / name) for name in ("target", "dflash", "eagle3")):
        return
    if flags.whiflash_eagle_steps is not None:
        return  # the bundled files were made with the default
    router = flags.whiflash_router or WhiFlashConfig.router
    if router == "neural" and flags.whiflash_neural_router_path is None:
        flags.whiflash_neural_router_path = str(DEMO_MODELS / "router")
    own_router = flags.whiflash_neural_router_path in (None, str(DEMO_MODELS / "router"))
    threshold = flags.whiflash_entropy_threshold or flags.whiflash_neural_router_threshold
    if router not in SCORED or threshold is not None or not own_router:
        return  # calibration and priors are for the bundled scores only
    if flags.whiflash_calibration is None:
        flags.whiflash_calibration = str(DEMO_MODELS / "calibration.json")
    if flags.whiflash_priors is None and flags.whiflash_objective != "acceptance":
        flags.whiflash_priors = str(DEMO_MODELS / "priors.json")


def curl(server_args: ServerArgs) -> str:
    """A shell command that sends an example request to this server."""
    if server_args.model_path == str(DEMO_MODELS / "target"):
        body = f"@{DEMO_REQUEST}"
    else:
        message = {"role": "user", "content": "Which numbers are prime?"}
        body = json.dumps({"model": server_args.served_model_name, "messages": [message], "max_tokens": 256})
    key = ' -H "Authorization: Bearer $API_KEY"' if server_args.api_key else ""
    url = f"{server_args.url()}/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
