"""What `bench_gpu.py` measures on: models without weights, and models that it trains first."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from whiflash_sglang.routing.artefact import NeuralRouter, save_router
from whiflash_sglang.routing.neural import Network
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.demo import DEMO_DEFAULTS
from whiflash_sglang.training import bundled
from whiflash_sglang.training.dummy_models import QWEN3_8B, TINY, ModelShape
from whiflash_sglang.training.models import ModelPaths
from whiflash_sglang.training.train_drafter import default_layers
from whiflash_workloads.bench import LAUNCHER, Command, note, servers
from whiflash_workloads.gpu.judge import ROUTERS
from whiflash_workloads.stress.servers import WINDOW

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("--skip-server-warmup", "--sleep-on-idle")
START_SECONDS = 900  # for large models and kernel compilation

# Sizes of the trained target: 150M parameters in the layers.
SIZES = {"hidden": 1024, "num-layers": 12, "heads": 16, "kv-heads": 8, "head-dim": 64, "intermediate": 3072}
DFLASH_DEPTH, DFLASH_BLOCK = 5, 16
MINUTES = {"target": 0.5, "eagle3": 0.25, "dflash": 0.25}  # shares of --minutes
DOCUMENTS, SESSIONS, ROUTER_SESSIONS, CALIBRATION_SESSIONS = 20_000, 12_000, 256, 64


class Setting(NamedTuple):
    """Settings that differ between a GPU and the CPU smoke test."""

    shape: ModelShape
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int  # output tokens per request
    long_prompt: int
    flags: tuple[str, ...]


GPU = Setting(QWEN3_8B, (1, 4, 16, 64), (1024, 8192, 32768), 256, 8192, ("--dtype=bfloat16",))
CPU = Setting(TINY, (1, 4), (64, 512), 48, 1024, ("--dtype=float32", "--sampling-backend=pytorch"))


def upstream_flags(paths: ModelPaths, block: int) -> dict[str, tuple[str, ...]]:
    """Flags of SGLang's own algorithms, with the same drafters and draft lengths as ours."""
    return {
        "EAGLE3": (
            f"--model-path={paths.target}",
            "--speculative-algorithm=EAGLE3",
            f"--speculative-draft-model-path={paths.eagle3}",
            f"--speculative-num-steps={paths.eagle_steps}",
            "--speculative-eagle-topk=1",
            f"--speculative-num-draft-tokens={1 + paths.eagle_steps}",
        ),
        "DFLASH": (
            f"--model-path={paths.target}",
            "--speculative-algorithm=DFLASH",
            f"--speculative-draft-model-path={paths.dflash}",
            f"--speculative-num-draft-tokens={block}",
        ),
    }


def router_flags(router: str, path: Path | None = None, calibration: Path | None = None) -> tuple[str, ...]:
    """Flags of a router, with its router file and calibration if it uses them."""
    flags = [f"--whiflash-router={router}"]
    if router == "neural" and path is not None:
        flags.append(f"--whiflash-neural-router-path={path}")
    if router in ROUTERS and calibration is not None:
        flags.append(f"--whiflash-calibration={calibration}")
    return tuple(flags)


def random_router(folder: Path, paths: ModelPaths) -> None:
    """Write an untrained neural router for these models."""
    identity = paths.identity()
    hidden, width = identity.hidden_size, max(64, identity.hidden_size // 8)
    dice = torch.Generator().manual_seed(0)
    weights = torch.randn(width, hidden, generator=dice) / hidden**0.5, torch.randn(1, width, generator=dice) / width
    network = Network(weights[0], torch.zeros(width), weights[1], torch.zeros(1))
    save_router(folder, NeuralRouter(network, "e3", 0.0, {}), identity, training={}, metrics={})


class Trained(NamedTuple):
    """Models with weights, and their launcher flags."""

    title: str
    paths: ModelPaths
    block: int
    launcher_flags: tuple[str, ...]
    router: Path | None = None  # None: the bundled one
    calibration: Path | None = None  # None: the bundled one
    flags: tuple[str, ...] = ()  # for SGLang's own servers


def demo(args: argparse.Namespace) -> Trained:
    """The bundled models. SGLang's own servers get the flags that `--demo` implies, to run with the same dtype."""
    flags = tuple(args.server_flags)
    served, own = ("--demo", *flags), (*DEMO_DEFAULTS, *flags)
    return Trained("the bundled models", bundled.PATHS, WINDOW, served, flags=own)


def with_weights(args: argparse.Namespace, setting: Setting, logs: Path) -> Trained:
    """With --tiny the bundled models, else those in --models, trained first if missing."""
    if args.tiny:
        return demo(args)
    folder = args.models or logs / "models"
    paths = ModelPaths(*(folder / name for name in ("target", "dflash", "eagle3")), WhiFlashConfig.eagle_steps)
    sized = ("--context-length=8192", "--max-total-tokens=65536", "--max-running-requests=16", *QUIET)
    flags = (*sized, "--mem-fraction-static=0.1", *setting.flags, *args.server_flags)  # servers share one device
    calibration = folder / "calibration.json"
    if not calibration.exists():
        train_models(folder, args.minutes)
        train_router(folder, paths, flags, logs)
    title = f"{SIZES['num-layers']} layers of width {SIZES['hidden']}, trained {args.minutes:g} minutes"
    served = (*paths.server_flags(), *flags)
    return Trained(title, paths, DFLASH_BLOCK, served, folder / "router", calibration, flags)


def train_models(folder: Path, minutes: float) -> None:
    """Train target and drafters with scripts/train_demo_models.py."""
    layers = SIZES["num-layers"]
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    captured = {kind: default_layers(kind, layers) for kind in ("eagle3", "dflash")}
    for stage, share in MINUTES.items():
        run(
            *("scripts/train_demo_models.py", f"--stage={stage}", f"--out={folder}", f"--runs={folder / 'runs'}"),
            *(*sizes, "--batch-tokens=16384", "--learning-rate=1e-3", "--steps=1000000"),
            *(f"--sessions={SESSIONS}", f"--documents={DOCUMENTS}", f"--minutes={share * minutes}"),
            *("--eagle3-layers", *map(str, captured["eagle3"]), "--dflash-layers", *map(str, captured["dflash"])),
            *(f"--dflash-depth={DFLASH_DEPTH}", f"--dflash-block={DFLASH_BLOCK}"),
        )


def train_router(folder: Path, paths: ModelPaths, flags: Sequence[str], logs: Path) -> None:
    """Train router and calibration with the commands of docs/routers.md."""
    traces, data, router = folder / "router.jsonl", folder / "data", folder / "router"
    models = paths.server_flags()
    number = ROUTER_SESSIONS + CALIBRATION_SESSIONS
    run("-m", "whiflash_workloads.demo.generate", "--split=router", f"--sessions={number}", f"--out={traces}")
    off = Command(LAUNCHER, (*models, "--whiflash-router=off", *flags), {}, START_SECONDS)
    with servers({"off": off}, logs / "router") as urls:
        collect = ("-m", "whiflash_sglang.training.collect_router_data", *models, f"--traces={traces}", f"--out={data}")
        run(*collect, f"--base-url={urls['off']}")
    train = ("-m", "whiflash_sglang.training.train_router", f"--data={data}", f"--out={router}")
    run(*train, f"--sessions={ROUTER_SESSIONS}")
    calibrate = ("-m", "whiflash_sglang.calibrate", *models, f"--data={data}", f"--neural-router={router}")
    run(*calibrate, f"--out={folder / 'calibration.json'}", "--", *flags)


def run(*arguments: str) -> None:
    """Run a Python command of this repository, with output to stderr. Raises CalledProcessError."""
    note(f"python {' '.join(arguments[:3])} ...")
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=sys.stderr) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # not kill, as `subprocess.run` does: it must stop its own servers
            raise
    if status:
        raise subprocess.CalledProcessError(status, process.args)
