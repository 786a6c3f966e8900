"""Train a drafter for your own target, on traces of your own agent.

    python -m whiflash_sglang.training.train_drafter --kind eagle3 --model-path TARGET --traces TRACE... --out DIR
    python -m whiflash_sglang.training.train_drafter --kind dflash --model-path TARGET --traces TRACE... --out DIR

The drafter is distilled from the target's choices on the recorded sessions (`distill.py`) and initialized from the
target's layers. The output folder has the published EAGLE-3 or DFlash format, for `--whiflash-eagle-draft` or
`--speculative-draft-model-path`. Runs are seeded and resume from their last checkpoint. Traces may have any format of
`whiflash_workloads.replay`; a useful drafter needs thousands of sessions, the same ones for both drafters. The target
needs a plain or tied LM head; DFlash needs a Qwen3 target (with q and k norms). Evaluate the result with
`collect_router_data` and `calibrate`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from whiflash_sglang.core.errors import ConfigError, WhiFlashError
from whiflash_sglang.startup.checkpoints import FLAG_TARGET, load_target_spec
from whiflash_sglang.training import text
from whiflash_sglang.training.collect_router_data import plain
from whiflash_sglang.training.distill import (
    load_dflash,
    load_eagle3,
    new_dflash,
    new_eagle3,
    save_dflash,
    save_eagle3,
    train_dflash,
    train_eagle3,
)
from whiflash_sglang.training.loop import Result, Settings
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.printing import to_readers
from whiflash_workloads.schema import TraceError


class Recipe(NamedTuple):
    """Training options of a drafter."""

    layers: tuple[int, ...]  # captured layers of the target
    batch_tokens: int
    length: int  # max tokens per session
    seed: int
    settings: Settings
    checkpoint: Path
    start: Path | None = None  # folder of a drafter to continue from
    reasoning: float = 1.0  # relative weight of rounds that begin in reasoning


def fit_eagle3(
    target: PreTrainedModel, examples: list[text.Example], recipe: Recipe, draft_vocab: int, out: Path
) -> Result:
    """Train and write an EAGLE-3 drafter. Its vocabulary is the `draft_vocab` most frequent tokens of replies, or that
    of the drafter it continues from."""
    if recipe.start is not None:
        model = load_eagle3(recipe.start).to(target.device)
    else:
        replies = torch.from_numpy(np.concatenate([e.ids[e.spans > text.CONTEXT] for e in examples]))
        counts = torch.bincount(replies, minlength=1)
        draft_tokens = counts.topk(min(draft_vocab, int((counts > 0).sum()))).indices.sort().values
        model = new_eagle3(target, recipe.layers, draft_tokens)
    batches = text.batches(examples, recipe.batch_tokens, recipe.length, recipe.seed)
    result = train_eagle3(model, target, batches, recipe.settings, recipe.checkpoint, recipe.reasoning)
    save_eagle3(model, target, out)
    return result


def fit_dflash(
    target: PreTrainedModel,
    examples: list[text.Example],
    recipe: Recipe,
    depth: int,
    block: int,
    mask_token: int,
    out: Path,
) -> Result:
    """Train and write a DFlash drafter of `depth` layers for blocks of `block` tokens, including the anchor."""
    if recipe.start is not None:
        model = load_dflash(recipe.start).to(target.device)
    else:
        model = new_dflash(target, recipe.layers, depth, block, mask_token)
    batches = text.batches(examples, recipe.batch_tokens, recipe.length, recipe.seed)
    result = train_dflash(model, target, batches, recipe.settings, recipe.checkpoint, recipe.reasoning)
    save_dflash(model, target, out)
    return result


def default_layers(kind: str, num_layers: int) -> tuple[int, ...]:
    """An early, a middle and a late layer for EAGLE-3, five evenly spaced ones for DFlash, as in published drafters."""
    if kind == "eagle3":
        return tuple(sorted({1, num_layers // 2 - 1, num_layers - 4}))
    return tuple(sorted({round(value) for value in np.linspace(1, num_layers - 3, 5)}))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the drafter; returns its figures. Raises WhiFlashError or TraceError."""
    if args.model_path is None:
        raise ConfigError(FLAG_TARGET, None, "missing", "give the target's folder")
    spec = load_target_spec(str(args.model_path))
    layers = tuple(args.layers) if args.layers else default_layers(args.kind, spec.num_layers)
    if min(layers) < 0 or max(layers) > spec.num_layers - 2:
        problem = f"the target's {spec.num_layers} layers allow 0 to {spec.num_layers - 2}"
        raise ConfigError("--layers", " ".join(map(str, layers)), problem, "give layers within these bounds")
    sessions = [session for session in load_traces(args.traces).sessions if session.turns]
    if not sessions:
        raise ConfigError("--traces", None, "contain no recorded assistant turn", "give traces of an agent's sessions")
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    mask_token = tokenizer.mask_token_id if args.mask_token is None else args.mask_token
    if args.kind == "dflash" and mask_token is None:
        fix = "give the id of a token that the target never generates"
        raise ConfigError("--mask-token", None, "the tokenizer has no mask token", fix)
    examples = [text.render(plain(session), tokenizer) for session in sessions]
    dtype: torch.dtype | str = torch.float32 if args.device.type == "cpu" else "auto"
    target = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=dtype).to(args.device).eval()
    target.requires_grad_(False)
    settings = Settings(args.steps, learning_rate=args.learning_rate, max_seconds=60 * args.minutes)
    checkpoint = args.out / "checkpoint.pt"
    recipe = Recipe(layers, args.batch_tokens, args.length, args.seed, settings, checkpoint, reasoning=args.reasoning)
    if args.kind == "eagle3":
        result = fit_eagle3(target, examples, recipe, args.draft_vocab, args.out)
    else:
        result = fit_dflash(target, examples, recipe, args.depth, args.block, mask_token, args.out)
    return {"out": str(args.out), "sessions": len(sessions), "layers": layers, **result._asdict()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_sglang.training.train_drafter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=("eagle3", "dflash"), required=True)
    parser.add_argument(FLAG_TARGET, type=Path, help="target, a local folder")
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="TRACE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the drafter's folder")
    parser.add_argument("--layers", type=int, nargs="+", metavar="ID", help="captured layers of the target")
    parser.add_argument("--draft-vocab", type=int, default=32_000, help="EAGLE-3's vocabulary (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=5, help="layers of a DFlash drafter (default: %(default)s)")
    parser.add_argument("--block", type=int, default=16, help="tokens per DFlash block (default: %(default)s)")
    parser.add_argument("--mask-token", type=int, metavar="ID", help="default: the tokenizer's mask token")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit; the schedule ends with it")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=4096, help="max tokens per session (default: %(default)s)")
    parser.add_argument(
        "--reasoning",
        type=float,
        default=1.0,
        metavar="WEIGHT",
        help="relative weight of rounds that begin in reasoning (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        figures = run(parser.parse_args(argv))
    except (WhiFlashError, TraceError) as error:
        raise SystemExit(f"error: {error}") from error
    with to_readers():
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
