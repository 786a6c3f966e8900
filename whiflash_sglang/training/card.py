"""The model card of the demo models: figures of each training stage, stored as JSON and rendered as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = "training.json"
CARD = "README.md"

HEAD = """# The demo models

A target and two drafters for the order desk of `workloads/demo/`: small enough to bundle and to run on two CPU cores,
trained for this task only. They demonstrate the serving system and are not general assistants.
`scripts/train_demo_models.py` rebuilds them and writes this card from `training.json`.

| model | description |
|---|---|
| `target/` | Qwen3, 8 layers of width 256, byte-level BPE, ChatML with `<think>` and `<tool_call>` |
| `eagle3/` | EAGLE-3 (SafeAILab's format): one Llama layer on features of layers 1, 3, 6, its own draft vocabulary |
| `dflash/` | DFlash (z-lab's format): two Qwen3 layers on features of layers 0, 2, 4, 6, blocks of 8 |
| `router/` | neural router: two linear layers on the target's final hidden state; trained by `training.train_router` |
| `calibration.json` | output of `whiflash_sglang.calibrate` for these models on a two-core CPU |
| `priors.json` | priors of both routers' scores, learned by `calibrate --priors` from 64 sessions |

Data: sessions of a scripted expert in generated worlds, split by seed into training and held-out sets; no personal
data. Both drafters are distilled from the target's own choices, each for the round starts that an entropy router
assigns to it: EAGLE-3 where the target was uncertain about the anchor, DFlash where it was certain. DFlash was trained
on little reasoning (`--dflash-reasoning`): trained on all of it, it would be the better drafter nearly everywhere.
"""


def note(folder: Path, stage: str, figures: dict[str, Any]) -> None:
    """Store the figures of a stage and rewrite the card."""
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.exists() else {}
    record[stage] = figures
    path.write_text(json.dumps(record, indent=2) + "\n")
    (folder / CARD).write_text(card(record))


def card(record: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = [
        HEAD,
        "## Training\n",
        "| stage | sessions | steps | tokens per step | final loss | |",
        "|---|---|---|---|---|---|",
    ]
    for stage in ("target", "eagle3", "dflash"):
        if stage in record:
            figures = record[stage]
            loss = f"{figures['loss']:.3f}" if "loss" in figures else "-"
            row = (stage, figures["sessions"], figures.get("steps", "-"), figures["batch_tokens"], loss)
            lines.append("| " + " | ".join(map(str, (*row, figures.get("note", "")))) + " |")
    if "evaluate" in record:
        lines += ["", *_evaluation(record["evaluate"])]
    return "\n".join(lines) + "\n"


def _evaluation(figures: dict[str, Any]) -> list[str]:
    calls, length = figures["tool_calls"], figures["acceptance_length"]
    parse, equal = 100 * calls["parse"], 100 * calls["equal_to_recorded"]
    lines = [
        "## On held-out sessions",
        "",
        f"Greedy replies to {figures['replies']} recorded histories. Of {calls['calls']} tool calls, "
        f"{parse:.1f}% parse as JSON with a name and arguments, and {equal:.1f}% equal the recorded call.",
        "",
        "Acceptance length (including the bonus token) with seven drafts per round, "
        "with every position of a reply as a round start:",
        "",
        "| span | positions | EAGLE-3 | DFlash | mean entropy, nats |",
        "|---|---|---|---|---|",
    ]
    for span, row in figures["by_span"].items():
        lines.append(f"| {span} | {row['positions']} | {row['e3']} | {row['df']} | {row['entropy']} |")
    lines.append(f"| all | | {length['e3']} | {length['df']} | |")
    return lines
