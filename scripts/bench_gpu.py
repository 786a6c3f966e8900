"""Benchmark drafting with two models on a GPU, compared with SGLang's own EAGLE3 and DFLASH.

    python scripts/bench_gpu.py --results benchmarks/results/gpu.json [-- SGLang's flags for every server]
    python scripts/bench_gpu.py --tiny --only shapes      # smoke test on a CPU, with tiny models

Three parts with criteria; see docs/gpu.md for their duration. The last line is JSON. With --results, tables (.md) and
a plot (.png) are written next to it.

    shapes       models of Qwen3-8B's shape without weights, with recorded acceptance and routing: milliseconds of a
                 round by part, for every router, batch size and context; time to first token of a long prompt, with
                 and without drafters; tokens/s compared with SGLang's own algorithms at equal acceptance
    acceptance   a target of 150M parameters and both drafters, trained here on the order desk and local Python files,
                 then held-out histories under every policy: tokens/s, by span, and texts compared with `off`
    soak         the same models with a KV pool that is too small, alternating drafters (so both verify widths), several
                 clients, aborts and retractions (scripts/soak.py); and the ingestion kernel's tests under
                 compute-sanitizer, if it is on PATH

SGLang's own EAGLE3 and DFLASH need an accelerator; on a CPU they and their criteria are skipped. Parts of a round are
timed with device synchronization; speeds are measured on servers without it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import httpx
from bench_gpu_models import (
    CPU,
    GPU,
    QUIET,
    ROOT,
    START_SECONDS,
    Setting,
    random_router,
    router_flags,
    run,
    upstream_flags,
    with_weights,
)
from transformers import AutoTokenizer

from whiflash_sglang import cpu
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.training.dummy_models import write_models
from whiflash_sglang.training.forced_server import Recording
from whiflash_sglang.training.models import ModelPaths
from whiflash_sglang.training.replies import Prompt, prompts_of, reply_of
from whiflash_sglang.training.text import SPANS
from whiflash_workloads import server
from whiflash_workloads.bench import LAUNCHER, Command, finish, in_turns, note, servers
from whiflash_workloads.demo.generate import sessions
from whiflash_workloads.gpu.judge import (
    LIMITS,
    UPSTREAM,
    acceptance_length,
    by_span,
    criteria,
    histogram,
    markdown,
    round_figures,
    speeds,
)
from whiflash_workloads.gpu.picture import picture
from whiflash_workloads.lossless import compare
from whiflash_workloads.provenance import provenance
from whiflash_workloads.report import difference
from whiflash_workloads.tokens import Streamed, TokenIds, ask, stream, totals

RECORDED = ROOT / "workloads" / "gpu" / "acceptance.json"
FORCED, UPSTREAM_LAUNCHER = "whiflash_sglang.training.forced_server", "sglang.launch_server"
POLICIES = ("off", "fixed:e3", "fixed:df", "entropy", "neural")
PARTS_RUN = ("shapes", "acceptance", "soak")
SHAPE_ROUTERS = ("fixed:e3", "fixed:df", "alternate", "entropy", "neural")
MAX_TOKENS = 220
BLOCKS = 8
WARM_TOKENS = 8
TTFT_REPEATS = 8
SOAK_MINUTES, TINY_SOAK_MINUTES, SOAK_CLIENTS = 5.0, 0.5, 8
SANITIZER = "compute-sanitizer"
SANITIZED = "any_head or any_number"  # kernel tests with each block size and head, but few launches
SANITIZER_SECONDS, SANITIZER_FAILED = 900, 86
NEAR_TIE = 1e-2  # largest gap of the two best logits that counts as rounding in bfloat16
ORDINARY = range(300, 1200)  # ordinary token ids of the bundled tokenizer


def has_accelerator() -> bool:
    """Whether SGLang would use an accelerator."""
    return cpu.activate() is None


# ------------------------------------------------------------------------------------------------------------- shapes


def shapes(args: argparse.Namespace, setting: Setting, logs: Path) -> dict[str, Any]:
    """The part `shapes`."""
    folders = write_models(logs / "shapes", setting.shape)
    paths = ModelPaths(*folders, WhiFlashConfig.eagle_steps)
    router = logs / "shapes" / "router"
    random_router(router, paths)
    sized = (f"--max-running-requests={max(setting.batches)}", f"--context-length={setting.shape.context_length}")
    common = ("--load-format=dummy", *QUIET, *sized, *setting.flags, *args.server_flags)
    recording = recorded(args.acceptance, paths.eagle_steps, setting.shape.block_size - 1)
    timed = replace(recording, synchronize=True).to_environ()
    rounds = {}
    for name in args.routers:
        flags = (*paths.server_flags(), *router_flags(name, router), *common)
        with servers({name: Command(FORCED, flags, timed, START_SECONDS)}, logs) as urls:
            rounds[name] = {
                f"{batch} x {context}": cell(urls[name], batch, context, setting)
                for batch in setting.batches
                for context in setting.contexts
            }
        note(f"shapes, {name}: measured")
    speed = same_acceptance(paths, common, recording, setting, logs / "speed") if has_accelerator() else {}
    ttft = time_to_first_token(paths, common, setting, logs / "ttft")
    sizes = f"{setting.shape.num_layers} layers of width {setting.shape.hidden_size}, no weights"
    return {"models": sizes, "rounds": rounds, "tokens_per_s": speed, "ttft": ttft}


def same_acceptance(
    paths: ModelPaths, common: Sequence[str], recording: Recording, setting: Setting, logs: Path
) -> dict[str, float]:
    """Tokens/s of one request at equal acceptance: forced in ours, simulated in SGLang's own algorithms."""
    commands = {}
    simulated = upstream_flags(paths, setting.shape.block_size)
    for ours, drafts in (("fixed:e3", paths.eagle_steps), ("fixed:df", setting.shape.block_size - 1)):
        flags = (*paths.server_flags(), *router_flags(ours), *common)
        commands[ours] = Command(FORCED, flags, recording.to_environ(), START_SECONDS)
        length, theirs = mean_length(recording, drafts), UPSTREAM[ours]
        variables = {"SGLANG_SIMULATE_ACC_LEN": f"{length:.3f}", "SGLANG_SIMULATE_ACC_METHOD": "match-expected"}
        commands[theirs] = Command(UPSTREAM_LAUNCHER, (*simulated[theirs], *common), variables, START_SECONDS)
    speed = {}
    for name, command in commands.items():
        with servers({name: command}, logs) as urls:
            speed[name] = cell_speed(urls[name], setting)
    return speed


def recorded(file: Path, *drafts: int) -> Recording:
    """Load a recording of acceptance, for chains of `drafts` drafts (EAGLE-3's first)."""
    content = json.loads(file.read_text())
    content = (content.get("acceptance") or {}).get("recording", content)  # of this benchmark's own results
    acceptance = dict(zip(drafts, (content["e3"], content["df"]), strict=True))
    if len(acceptance) < len(drafts):
        raise SystemExit("error: both drafters have the same draft length and cannot be distinguished; use other sizes")
    return Recording(acceptance, content["e3_share"], content["switch_rate"])


def mean_length(recording: Recording, drafts: int) -> float:
    """Mean acceptance length, including the bonus token, of chains of `drafts` drafts."""
    weights = recording.table()[drafts]
    return 1 + sum(accepted * weight for accepted, weight in enumerate(weights)) / sum(weights)


def noise(dice: random.Random, length: int) -> TokenIds:
    """Random token ids."""
    return dice.choices(ORDINARY, k=length)


def cell(base_url: str, batch: int, context: int, setting: Setting) -> dict[str, Any]:
    """Measure rounds of `batch` requests with `context` prompt tokens; `skipped` with a reason if they do not fit."""
    counted = totals(base_url)
    assert counted is not None
    each = context + setting.tokens + setting.shape.block_size
    pool = counted["kv_pool"]["tokens"]
    if each > setting.shape.context_length:
        return {"skipped": f"longer than the context of {setting.shape.context_length}"}
    if batch * each > pool:
        return {"skipped": f"needs {batch * each} KV tokens, but the pool has {pool}"}
    dice = random.Random(f"{batch} {context}")
    prompts = [noise(dice, context) for _ in range(batch)]
    endless = {"ignore_eos": True}
    ask(base_url, prompts, WARM_TOKENS, batch, endless)  # cache the prompts, so all requests start decoding at once
    answers = ask(base_url, prompts, setting.tokens, batch, endless)
    assert answers.totals is not None
    return round_figures(answers.totals)


def cell_speed(base_url: str, setting: Setting) -> float:
    """Tokens/s of one request."""
    prompts = [noise(random.Random(1), setting.contexts[0])]
    ask(base_url, prompts, WARM_TOKENS, 1, {"ignore_eos": True})
    answers = ask(base_url, prompts, 4 * setting.tokens, 1, {"ignore_eos": True})
    return round(answers.tokens / answers.wall_s, 2)


def time_to_first_token(paths: ModelPaths, common: Sequence[str], setting: Setting, logs: Path) -> dict[str, Any]:
    """Median time to first token of uncached prompts, measured on both servers in turns."""
    pool = f"--max-total-tokens={4 * setting.long_prompt}"  # both servers share one device
    commands = {
        name: Command(LAUNCHER, (*paths.server_flags(), *router_flags(name), *common, pool), {}, START_SECONDS)
        for name in ("off", "entropy")
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with servers(commands, logs) as urls:
        for repeat, name in in_turns(list(urls), 1 + TTFT_REPEATS):
            prompt = noise(random.Random(repeat), setting.long_prompt)
            seconds[name].append(stream(urls[name], prompt, 1).arrivals_s[0])
    note("shapes, first tokens: measured")
    ms = {name: 1000 * statistics.median(found[1:]) for name, found in seconds.items()}  # the first is warm-up
    return {
        "prompt_tokens": setting.long_prompt,
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "over_off": round(ms["entropy"] / ms["off"], 4),
    }


# --------------------------------------------------------------------------------------------------------- acceptance


def acceptance(args: argparse.Namespace, setting: Setting, logs: Path) -> dict[str, Any]:
    """The part `acceptance`: every policy on the same held-out histories, in one run."""
    models = with_weights(args, setting, logs)
    learned = {name: router_flags(name, models.router, models.calibration) for name in POLICIES}
    commands = {
        name: Command(LAUNCHER, (*models.launcher_flags, *flags), {}, START_SECONDS) for name, flags in learned.items()
    }
    notes = []
    if has_accelerator():
        for name, own in upstream_flags(models.paths, models.block).items():
            commands[name] = Command(UPSTREAM_LAUNCHER, (*own, *models.flags), {}, START_SECONDS)
    else:
        notes.append("SGLang's own EAGLE3 and DFLASH need an accelerator and are skipped here.")
    tokenizer = AutoTokenizer.from_pretrained(models.paths.target)
    replayed = (prompts_of(session, tokenizer) for session in sessions("heldout", args.prompts))
    prompts = list(islice(chain.from_iterable(replayed), args.prompts))
    with servers(commands, logs / "acceptance") as urls:
        for url in urls.values():
            ask(url, [prompts[-1].ids], MAX_TOKENS)  # warm
        before = totals(urls["entropy"])
        texts = replay(urls, prompts)
        after = totals(urls["entropy"])
        assert before is not None and after is not None
        found = {name: text_figures(own, prompts, tokenizer) for name, own in texts.items()}
        reference = [text.tokens for text in texts["off"]]
        for name, own in texts.items():
            if name != "off":
                found[name]["texts"] = against_off(urls["off"], prompts, reference, [text.tokens for text in own])
    counted = difference(after, before)
    recording = {
        "e3": histogram(texts["fixed:e3"]),
        "df": histogram(texts["fixed:df"]),
        "e3_share": round(counted["rounds_by_drafter"].get("e3", 0) / counted["rounds"], 4),
        "switch_rate": round(counted["switches"] / counted["rounds"], 4),
    }
    return {"models": models.title, "policies": found, "recording": recording, "notes": notes}


def replay(urls: Mapping[str, str], prompts: Sequence[Prompt]) -> dict[str, list[Streamed]]:
    """One text per prompt from every server, one request at a time, in interleaved blocks."""
    texts: dict[str, dict[int, Streamed]] = {name: {} for name in urls}
    for block, name in in_turns(list(urls), BLOCKS):
        for number in range(block, len(prompts), BLOCKS):
            texts[name][number] = stream(urls[name], prompts[number].ids, MAX_TOKENS)
    return {name: [found[number] for number in sorted(found)] for name, found in texts.items()}


def text_figures(texts: Sequence[Streamed], prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, Any]:
    """Tokens/s, in total and by span, and acceptance length."""
    spent = []
    for text, prompt in zip(texts, prompts, strict=True):
        labels = reply_of(prompt, text.tokens, tokenizer).example.spans[len(prompt.ids) :]
        spent.append(by_span(text, [SPANS[label] for label in labels]))
    return {
        "tokens_per_s": round(sum(len(t.tokens) for t in texts) / sum(t.arrivals_s[-1] for t in texts), 2),
        "acceptance_length": acceptance_length(texts),
        "by_span": speeds(spent),
    }


def against_off(
    off_url: str, prompts: Sequence[Prompt], reference: Sequence[TokenIds], found: Sequence[TokenIds]
) -> dict[str, Any]:
    """The number of equal texts, and the differences that are not near ties."""
    comparison = compare(off_url, [prompt.ids for prompt in prompts], reference, found)
    unexplained = [d for d in comparison.differences if not d.is_tie_within(NEAR_TIE)]
    return {
        "prompts": comparison.prompts,
        "equal": comparison.prompts - len(comparison.differences),
        "unexplained": [{"prompt": d.prompt, "position": d.position, "gap": d.gap} for d in unexplained],
    }


# --------------------------------------------------------------------------------------------------------------- soak


def soak(args: argparse.Namespace, setting: Setting, logs: Path) -> dict[str, Any]:
    """The part `soak`: scripts/soak.py with alternating drafters, and the sanitizer."""
    models = with_weights(args, setting, logs)
    minutes = args.soak_minutes or (TINY_SOAK_MINUTES if args.tiny else SOAK_MINUTES)
    results = logs / "soak.json"
    sized = (f"--minutes={minutes}", f"--concurrency={SOAK_CLIENTS}", f"--window={models.block}")
    about = ("--router=alternate", f"--start-seconds={START_SECONDS}", f"--results={results}")
    try:
        run("scripts/soak.py", *sized, *about, "--", *models.launcher_flags)
    except subprocess.CalledProcessError as error:
        note(f"soak: {error}")  # failures are in the results, if any were written
    found = json.loads(results.read_text()) if results.exists() else {}
    return {
        "models": models.title,
        "minutes": minutes,
        "checks": found.get("checks"),
        "failures": found.get("failures", []),
        "requests": found.get("requests", 0),
        "rounds_by_drafter": found.get("whiflash", {}).get("rounds_by_drafter", {}),
        "sanitizer": sanitize() if has_accelerator() else None,
    }


def sanitize() -> int | None:
    """Exit status of the ingestion kernel's tests under compute-sanitizer; None if it is missing or timed out."""
    tool = shutil.which(SANITIZER)
    if tool is None:
        note(f"{SANITIZER} is not on PATH")
        return None
    tests = ("-m", "pytest", "-q", "tests/kernels/test_ingest.py", "-k", SANITIZED)
    command = [tool, f"--error-exitcode={SANITIZER_FAILED}", sys.executable, *tests]
    try:
        return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=SANITIZER_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        note(f"{SANITIZER}: timed out after {SANITIZER_SECONDS} s")
        return None


# --------------------------------------------------------------------------------------------------------------- run


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use tiny and bundled models, for a CPU")
    parser.add_argument("--only", choices=PARTS_RUN, help="run one part (default: all)")
    parser.add_argument("--routers", nargs="+", choices=SHAPE_ROUTERS, default=SHAPE_ROUTERS, help="for `shapes`")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="batch sizes for `shapes`")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS", help="for `shapes`")
    parser.add_argument(
        "--acceptance", type=Path, default=RECORDED, metavar="FILE", help="recording or results to force in `shapes`"
    )
    parser.add_argument("--prompts", type=int, default=200, help="for `acceptance` (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=40, help="training time (default: %(default)s)")
    parser.add_argument("--soak-minutes", type=float, help=f"default: {SOAK_MINUTES:g}; --tiny: {TINY_SOAK_MINUTES:g}")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder to store and reuse trained models")
    parser.add_argument("--results", type=Path, metavar="FILE", help="also write the JSON line, .md and .png")
    own, server_flags = server.split_flags(argv)
    args = parser.parse_args(own)
    args.server_flags = server_flags
    if args.prompts < BLOCKS:
        parser.error(f"argument --prompts: give {BLOCKS} or more")
    if not args.tiny and not has_accelerator():
        parser.error("this machine has no accelerator; give --tiny to try the benchmark on a CPU")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    setting = CPU if args.tiny else GPU
    setting = setting._replace(
        batches=tuple(args.batches or setting.batches), contexts=tuple(args.contexts or setting.contexts)
    )
    server.stop_on_signals()
    logs = Path(tempfile.mkdtemp(prefix="whiflash-gpu-"))
    note(f"logs in {logs}")
    parts = {"shapes": shapes, "acceptance": acceptance, "soak": soak}
    found = {name: part(args, setting, logs) if args.only in (None, name) else None for name, part in parts.items()}
    judged = criteria(**found)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    arguments = {name: value for name, value in arguments.items() if name != "results"}
    line = {"benchmark": "gpu", "arguments": arguments, "criteria": judged, **found, **provenance()}
    if args.results:
        args.results.with_suffix(".md").write_text(markdown(line))
        if args.only != "soak":
            picture(line, args.results.with_suffix(".png"))
    # With tiny models speed is meaningless; only texts and faults count.
    binding = [name for name in LIMITS if not args.tiny or "text" in name or "faults" in name]
    failed = [name for name in binding if judged[name]["holds"] is False]
    finish(line, args.results, f"failed: {'; '.join(failed)}; see the logs in {logs}" if failed else None)


if __name__ == "__main__":
    try:
        main()
    except (server.ServerError, httpx.HTTPError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from error
