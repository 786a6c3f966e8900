"""The model card of the demo models: what each stage reported, kept as JSON and shown as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = "training.json"
CARD = "README.md"

HEAD = """# The demo models

A target and two drafters for the order desk of `workloads/demo/`: small enough to be bundled and to run on two CPU
cores, trained for that world only. They show the serving system; they are no assistants.
`scripts/train_demo_models.py` rebuilds them and writes this card from `training.json`.

| model | what it is |
|---|---|
| `target/` | Qwen3, 8 layers of width 256, byte-level BPE, ChatML with `<think>` and `<tool_call>` |
| `eagle3/` | EAGLE-3 (SafeAILab's format): one Llama layer on features of layers 1, 3, 6, an own draft vocabulary |
| `dflash/` | DFlash (z-lab's format): two Qwen3 layers on features of layers 0, 2, 4, 6, blocks of 8 |
| `router/` | neural router: two linear layers on the target's final hidden state; trained by `training.train_router` |
| `calibration.json` | what `whiflash_sglang.calibrate` found out about these models on a two-core CPU |
| `priors.json` | priors of both routers' scores, which `calibrate --priors` learned from 64 sessions |

Data: sessions that a scripted expert plays in generated worlds, split by seed into training and held-out ones; no data
of anyone. Both drafters are distilled from the target's own choices, each for the round starts that an entropy router
gives it: EAGLE-3 where the anchor was an open choice of the target, DFlash where it was a settled one. DFlash has seen
little of reasoning (`--dflash-reasoning`): trained on all of it, it is the better drafter nearly everywhere.
"""


def note(folder: Path, stage: str, figures: dict[str, Any]) -> None:
    """Keep what a stage reported, and write the card anew."""
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.exists() else {}
    record[stage] = figures
    path.write_text(json.dumps(record, indent=2) + "\n")
    (folder / CARD).write_text(card(record))


def card(record: dict[str, Any]) -> str:
    lines = [
        HEAD,
        "## Training\n",
        "| stage | sessions | steps | tokens a step | final loss | |",
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
        f"Greedy replies to {figures['replies']} recorded histories. Of {calls['calls']} tool calls "
        f"{parse:.1f}% parse as JSON with a name and arguments, and {equal:.1f}% equal the recorded call.",
        "",
        "Acceptance length (bonus token included) with seven drafts a round, "
        "every position of a reply taken as the start of one:",
        "",
        "| span | positions | EAGLE-3 | DFlash | mean entropy, nats |",
        "|---|---|---|---|---|",
    ]
    for span, row in figures["by_span"].items():
        lines.append(f"| {span} | {row['positions']} | {row['e3']} | {row['df']} | {row['entropy']} |")
    lines.append(f"| all | | {length['e3']} | {length['df']} | |")
    return lines
