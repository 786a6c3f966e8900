"""A copy of a bundled drafter that produces NaN, like a damaged checkpoint or a wrong dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

# A weight of each drafter that KV-only ingestion does not use, so that only drafts are spoiled.
WEIGHTS = {"e3": ("eagle3", "midlayer.mlp.down_proj.weight"), "df": ("dflash", "layers.1.mlp.down_proj.weight")}
FLAGS = {"e3": "--whiflash-eagle-draft", "df": "--speculative-draft-model-path"}


def with_nan(name: str, demo_models: Path, folder: Path) -> Path:
    """A copy of the drafter `name` (e3, df) in `folder`, with one weight NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint, weight = WEIGHTS[name]
    copy = folder / checkpoint
    shutil.copytree(demo_models / checkpoint, copy, dirs_exist_ok=True)
    tensors = load_file(copy / "model.safetensors")
    tensors[weight][0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
