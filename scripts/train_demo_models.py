"""Rebuild the bundled demo models: tokenizer, target, and both drafters distilled from it.

    python scripts/train_demo_models.py                       # everything, into whiflash_sglang/demo_models
    python scripts/train_demo_models.py --stage target        # one stage: target, eagle3, dflash or evaluate
    python scripts/train_demo_models.py --minutes 30          # time limit per training stage
    python scripts/train_demo_models.py --go-on               # continue training the models in --out
    python scripts/train_demo_models.py --out DIR --runs DIR --hidden 1024 --num-layers 12 ...   # larger ones

Seeded. An interrupted stage resumes from its last checkpoint in .runs/demo (delete it to start over). Takes about an
hour on two CPU cores, minutes on a GPU. Figures of each stage are stored in training.json and shown in the model card
(README.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from whiflash_sglang.training import card, evaluate, replies, text
from whiflash_sglang.training.distill import EAGLE3_STEPS, load_drafters
from whiflash_sglang.training.loop import Result, Settings
from whiflash_sglang.training.target import CONFIG, new_target, save_target, train_target
from whiflash_sglang.training.train_drafter import Recipe, fit_dflash, fit_eagle3
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.printing import to_readers

ROOT = Path(__file__).resolve().parents[1]
EAGLE3_LAYERS = (1, 3, 6)
DFLASH_LAYERS = (0, 2, 4, 6)
DFLASH_DEPTH = 2
DFLASH_BLOCK = 8
DRAFT_VOCAB = 1024
# Two drafters are useful only if each is better on some spans. For so small a target, a DFlash trained on everything
# beats any chain. So DFlash learns mostly calls and answers, EAGLE-3 everything.
DFLASH_REASONING = 0.1
# Config field -> our argument. The demo's sizes are in training/target.py.
SIZES = {
    "hidden_size": "hidden",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate",
}
STAGES = ("target", "eagle3", "dflash", "evaluate")


def prepare_data(args: argparse.Namespace, invented: float) -> list[text.Example]:
    """Train the tokenizer if it is missing, and render the training sessions. `invented`: share with made-up names."""
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
    rendered = [text.render(session, tokenizer) for session in train_sessions]
    return rendered + [text.document(found, tokenizer) for found in text.local_text(args.documents, args.seed)]


def run_target(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    """Stage `target`."""
    folder = args.out / "target"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.go_on:
        model = load_target(args).train().requires_grad_()
    else:
        model = new_target(args.seed, tokenizer.eos_token_id, args.device, **sizes_of(args))
    batches = text.batches(examples, args.batch_tokens, args.length, args.seed)
    result = train_target(model, batches, settings_of(args), args.runs / "target.pt")
    save_target(model, folder, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return result


def sizes_of(args: argparse.Namespace) -> dict[str, int]:
    """The target's sizes, as its config names them."""
    return {name: getattr(args, flag) for name, flag in SIZES.items()}


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings of the training loop."""
    return Settings(args.steps, learning_rate=args.learning_rate, max_seconds=60 * args.minutes)


def load_target(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """The trained target, frozen, in float32."""
    target = Qwen3ForCausalLM.from_pretrained(args.out / "target", dtype=torch.float32).to(args.device).eval()
    return target.requires_grad_(False)


def run_eagle3(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    """Stage `eagle3`."""
    target = load_target(args)
    recipe = recipe_of(args, args.eagle3_layers, args.seed + 1, "eagle3")
    return fit_eagle3(target, examples, recipe, DRAFT_VOCAB, args.out / "eagle3")


def run_dflash(args: argparse.Namespace, examples: list[text.Example]) -> Result:
    """Stage `dflash`."""
    target = load_target(args)
    mask_token = AutoTokenizer.from_pretrained(args.out / "target").mask_token_id
    recipe = recipe_of(args, args.dflash_layers, args.seed + 2, "dflash")._replace(reasoning=args.dflash_reasoning)
    return fit_dflash(target, examples, recipe, args.dflash_depth, args.dflash_block, mask_token, args.out / "dflash")


def recipe_of(args: argparse.Namespace, layers: Sequence[int], seed: int, name: str) -> Recipe:
    """Training options of a drafter."""
    start, checkpoint = args.out / name if args.go_on else None, args.runs / f"{name}.pt"
    return Recipe(tuple(layers), args.batch_tokens, args.length, seed, settings_of(args), checkpoint, start)


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Stage `evaluate`: tool calls and acceptance lengths on greedy replies to held-out histories."""
    target = load_target(args).to("cpu")  # for comparison with a CPU server in float32; takes a minute
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
    for name, argument in SIZES.items():
        flag = f"--{argument.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=CONFIG[name], help="size of the target (default: %(default)s)")
    parser.add_argument("--eagle3-layers", type=int, nargs="+", default=EAGLE3_LAYERS, help="captured layers")
    parser.add_argument("--dflash-layers", type=int, nargs="+", default=DFLASH_LAYERS, help="captured layers")
    parser.add_argument("--dflash-depth", type=int, default=DFLASH_DEPTH, help="layers of the DFlash drafter")
    parser.add_argument("--dflash-block", type=int, default=DFLASH_BLOCK, help="tokens per block")
    parser.add_argument("--documents", type=int, default=0, help="number of local Python files to train on as well")
    parser.add_argument("--sessions", type=int, default=12_000)
    parser.add_argument("--invented", type=float, default=0.5, help="share of the target's sessions with made-up names")
    parser.add_argument("--go-on", action="store_true", help="continue from the models in --out")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=Settings(0).learning_rate)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1408)
    parser.add_argument(
        "--dflash-reasoning",
        type=float,
        default=DFLASH_REASONING,
        metavar="WEIGHT",
        help="relative weight of rounds that begin in reasoning, for DFlash (default: %(default)s)",
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
            # Made-up names teach the target to copy names. Drafters train on the usual names.
            invented = args.invented if stage == "target" else 0.0
            if rendered != invented:  # both drafters use the same data
                examples, rendered = prepare_data(args, invented), invented
            result = run(args, examples)
            figures = {"steps": result.steps, "loss": result.loss, "minutes": round(result.seconds / 60, 1)}
            report(args, stage, {"sessions": len(examples), "batch_tokens": args.batch_tokens} | figures)
    if "evaluate" in stages:
        report(args, "evaluate", run_evaluate(args))


def report(args: argparse.Namespace, stage: str, figures: dict[str, Any]) -> None:
    """Print a stage's figures, and add them to the model card."""
    if sizes_of(args) == {name: CONFIG[name] for name in SIZES}:  # the card is for the demo models only
        card.note(args.out, stage, figures)
    with to_readers():
        print(json.dumps({stage: figures}))


if __name__ == "__main__":
    main()
