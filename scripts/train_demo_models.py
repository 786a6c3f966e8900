"""Rebuild the bundled demo models: tokenizer, target, and both drafters distilled from it.

    python scripts/train_demo_models.py                       # everything, into whiflash_sglang/demo_models
    python scripts/train_demo_models.py --stage target        # one stage: target, eagle3, dflash or evaluate
    python scripts/train_demo_models.py --minutes 30          # a bound on each training stage
    python scripts/train_demo_models.py --go-on               # train the models in --out further

Seeded; a stage that is interrupted goes on from its last checkpoint in .runs/demo (delete it to start anew). Takes
about an hour on two CPU cores, minutes on a GPU. What a stage reports is kept in training.json and shown in the model
card (README.md) beside the models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from whiflash_sglang.training import card, evaluate, replies, text
from whiflash_sglang.training.distill import EAGLE3_STEPS, load_drafters
from whiflash_sglang.training.loop import Result, Settings
from whiflash_sglang.training.target import new_target, save_target, train_target
from whiflash_sglang.training.train_drafter import Recipe, fit_dflash, fit_eagle3
from workloads.demo.generate import sessions

ROOT = Path(__file__).resolve().parents[1]
EAGLE3_LAYERS = (1, 3, 6)
DFLASH_LAYERS = (0, 2, 4, 6)
DFLASH_DEPTH = 2
DFLASH_BLOCK = 8
DRAFT_VOCAB = 1024
# Two drafters are worth having where each is better somewhere. So small a target is drafted for by a DFlash that has
# learned from everything better than by any chain: this one learns from calls and answers, EAGLE-3 from all of it.
DFLASH_REASONING = 0.1
STAGES = ("target", "eagle3", "dflash", "evaluate")


def prepare_data(args: argparse.Namespace, invented: float) -> list[text.Example]:
    """Train the tokenizer once, and render the training sessions with it; `invented`: share with made-up names."""
    from transformers import PreTrainedTokenizerFast

    folder = args.out / "target"
    train_sessions = list(sessions("train", args.sessions, invented))
    if not (folder / "tokenizer.json").exists():
        blank = PreTrainedTokenizerFast(tokenizer_object=text.Tokenizer(text.models.BPE()))
        blank.chat_template = text.CHAT_TEMPLATE
        texts = (
            blank.apply_chat_template(
                [text.parsed_arguments(m) for m in s["messages"]], tools=s["tools"], tokenize=False
            )
            for s in train_sessions[:2000]
        )
        text.save_tokenizer(text.train_tokenizer(texts), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [text.render(session, tokenizer) for session in train_sessions]


def run_target(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    folder = args.out / "target"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.go_on:
        model = load_target(args).train().requires_grad_()
    else:
        model = new_target(args.seed, tokenizer.eos_token_id, args.device)
    batches = text.batches(examples, args.batch_tokens, args.length, args.seed)
    settings = Settings(args.steps, max_seconds=60 * args.minutes)
    result = train_target(model, batches, settings, args.runs / "target.pt")
    save_target(model, folder, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return result


def load_target(args: argparse.Namespace) -> Qwen3ForCausalLM:
    target = Qwen3ForCausalLM.from_pretrained(args.out / "target", dtype=torch.float32).to(args.device).eval()
    return target.requires_grad_(False)


def run_eagle3(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    target = load_target(args)
    recipe = recipe_of(args, EAGLE3_LAYERS, args.seed + 1, "eagle3")
    return fit_eagle3(target, examples, recipe, DRAFT_VOCAB, args.out / "eagle3")


def run_dflash(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    target = load_target(args)
    mask_token = AutoTokenizer.from_pretrained(args.out / "target").mask_token_id
    recipe = recipe_of(args, DFLASH_LAYERS, args.seed + 2, "dflash")._replace(reasoning=args.dflash_reasoning)
    return fit_dflash(target, examples, recipe, DFLASH_DEPTH, DFLASH_BLOCK, mask_token, args.out / "dflash")


def recipe_of(args: argparse.Namespace, layers: tuple[int, ...], seed: int, name: str) -> Recipe:
    settings = Settings(args.steps, max_seconds=60 * args.minutes)
    start = args.out / name if args.go_on else None
    return Recipe(layers, args.batch_tokens, args.length, seed, settings, args.runs / f"{name}.pt", start)


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy replies to held-out histories, and what both drafters would have made of them."""
    target = load_target(args).to("cpu")  # it is compared with the server's float32 on a CPU, and takes a minute
    tokenizer = AutoTokenizer.from_pretrained(args.out / "target")
    heldout = list(sessions("heldout", args.heldout))
    prompts = [prompt for session in heldout for prompt in replies.prompts_of(session, tokenizer)]
    found = replies.greedy_replies(target, tokenizer, prompts)
    turns = {(s["session_id"], i): message for s in heldout for i, message in enumerate(s["messages"])}
    texts = []
    for reply in found:
        recorded = text.parsed_arguments(turns[reply.prompt.session, reply.prompt.message])
        texts.append(
            (
                tokenizer.apply_chat_template([recorded], tokenize=False),
                tokenizer.decode(reply.example.ids[reply.start :]),
            )
        )
    drafters = load_drafters(args.out)
    positions = [replies.positions(target, drafters["e3"], drafters["df"], reply, EAGLE3_STEPS) for reply in found]
    figures = evaluate.acceptance_figures([one for one in positions if one is not None])
    return {"replies": len(found), "tool_calls": evaluate.call_figures(texts)} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all, in order")
    parser.add_argument("--out", type=Path, default=ROOT / "whiflash_sglang" / "demo_models")
    parser.add_argument("--runs", type=Path, default=ROOT / ".runs" / "demo")
    parser.add_argument("--sessions", type=int, default=12_000)
    parser.add_argument("--invented", type=float, default=0.5, help="share of the target's sessions with made-up names")
    parser.add_argument("--go-on", action="store_true", help="start from the models in --out, not anew")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1408)
    parser.add_argument(
        "--dflash-reasoning",
        type=float,
        default=DFLASH_REASONING,
        metavar="WEIGHT",
        help="of rounds that begin in reasoning, for DFlash (default: %(default)s)",
    )
    parser.add_argument("--heldout", type=int, default=24, help="held-out sessions to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stages = args.stage or list(STAGES)
    runs = {"target": run_target, "eagle3": run_eagle3, "dflash": run_dflash}
    rendered: float | None = None  # share of made-up names in `examples`
    for stage, run in runs.items():
        if stage in stages:
            # Whoever has met made-up names has learned to copy them; what is drafted is the usual world's.
            invented = args.invented if stage == "target" else 0.0
            if rendered != invented:  # both drafters learn from the same
                examples, rendered = prepare_data(args, invented), invented
            result = run(args, examples)
            figures = {"steps": result.steps, "loss": result.loss, "minutes": round(result.seconds / 60, 1)}
            report(args, stage, {"sessions": len(examples), "batch_tokens": args.batch_tokens} | figures)
    if "evaluate" in stages:
        report(args, "evaluate", run_evaluate(args))


def report(args: argparse.Namespace, stage: str, figures: dict[str, Any]) -> None:
    card.note(args.out, stage, figures)
    print(json.dumps({stage: figures}), flush=True)


if __name__ == "__main__":
    main()
