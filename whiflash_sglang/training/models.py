"""Target and drafters as PyTorch modules, for router training and calibration; and their flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.startup.checkpoints import FLAG_TARGET, load_drafter_spec, load_target_spec
from whiflash_sglang.startup.config import FLAG_DFLASH, FLAG_EAGLE, FLAG_STEPS, WhiFlashConfig
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.distill import load_dflash, load_eagle3
from whiflash_sglang.training.drafters import DFlash, Eagle3


class ModelPaths(NamedTuple):
    """Local folders, and EAGLE-3's chain length in tokens."""

    target: Path
    dflash: Path
    eagle3: Path
    eagle_steps: int

    def identity(self) -> Identity:
        """Identity of these models, for files that belong to them."""
        drafters = {"df": str(self.dflash), "e3": str(self.eagle3)}
        return Identity.of(str(self.target), drafters, self.eagle_steps)

    def server_flags(self) -> tuple[str, ...]:
        """Launcher flags for these models."""
        named = ((FLAG_TARGET, self.target), (FLAG_DFLASH, self.dflash), (FLAG_EAGLE, self.eagle3))
        return (*(f"{flag}={path}" for flag, path in named), f"{FLAG_STEPS}={self.eagle_steps}")


class Models(NamedTuple):
    """Target, tokenizer and drafters, loaded by `load_models`."""

    target: PreTrainedModel
    tokenizer: Any
    eagle3: Eagle3
    dflash: DFlash


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the launcher's flags for the three models."""
    parser.add_argument("--demo", action="store_true", help="use the bundled models unless others are given")
    parser.add_argument(FLAG_TARGET, type=Path, help="target, a local folder")
    parser.add_argument(FLAG_DFLASH, type=Path, help="DFlash drafter, a local folder")
    parser.add_argument(FLAG_EAGLE, type=Path, help="EAGLE-3 drafter, a local folder")
    parser.add_argument(FLAG_STEPS, type=int, default=WhiFlashConfig.eagle_steps, help="default: %(default)s")


def paths_of(args: argparse.Namespace) -> ModelPaths:
    """The given folders. Raises ConfigError if one is missing, CheckpointError if they do not fit together."""
    named = {
        FLAG_TARGET: (args.model_path, "target"),
        FLAG_DFLASH: (args.speculative_draft_model_path, "dflash"),
        FLAG_EAGLE: (args.whiflash_eagle_draft, "eagle3"),
    }
    found = {}
    for flag, (path, bundled) in named.items():
        if path is None and not args.demo:
            raise ConfigError(flag, None, "missing", "give a local folder, or --demo for the bundled models")
        found[flag] = path or DEMO_MODELS / bundled
    paths = ModelPaths(*found.values(), args.whiflash_eagle_steps)
    target = load_target_spec(str(paths.target))
    load_drafter_spec(str(paths.dflash), "df", target)
    load_drafter_spec(str(paths.eagle3), "e3", target)
    return paths


def load_models(paths: ModelPaths, device: torch.device) -> Models:
    """Load all three models, frozen, in float32."""
    target = AutoModelForCausalLM.from_pretrained(paths.target, dtype=torch.float32).to(device).eval()
    return Models(
        target.requires_grad_(False),
        AutoTokenizer.from_pretrained(paths.target),
        load_eagle3(paths.eagle3).to(device).requires_grad_(False),
        load_dflash(paths.dflash).to(device).requires_grad_(False),
    )
