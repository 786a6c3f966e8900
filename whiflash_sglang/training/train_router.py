"""Train a neural router on data of `collect_router_data`.

    python -m whiflash_sglang.training.train_router --data DIR --out ROUTER [--plots DIR]

The router is two linear layers with a GELU. From the target's final hidden state it predicts how many more tokens the
positive drafter accepts than the other one (WhiFlash, arXiv 2606.07710). Trained with mean squared error, split by
session, with early stopping on the validation loss. `ROUTER` is for `--whiflash-neural-router-path`. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from whiflash_sglang.core.errors import ConfigError, WhiFlashError
from whiflash_sglang.routing.artefact import NeuralRouter, save_router
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.neural import Network
from whiflash_sglang.training.router_data import Record, RouterData, load_router_data
from whiflash_sglang.training.walk import EQUAL_COSTS, best_threshold, by_worth, gather, lengths_of, walk
from whiflash_workloads.printing import to_readers

MIN_SESSIONS = 16
VALIDATION_SHARE = 0.15
THRESHOLDS = tuple(round(0.25 * step - 2, 2) for step in range(17))  # tokens


class Fit(NamedTuple):
    """A trained network and its losses by epoch."""

    network: Network
    epochs: int
    train_losses: list[float]
    validation_losses: list[float]


def train(
    data: RouterData, positive: str, width: int, epochs: int, patience: int, seed: int
) -> tuple[Fit, list[Record]]:
    """Train; returns the network with the lowest validation loss, and the validation records. Raises ConfigError."""
    training, validation = split(data, seed)
    x, y = tensors(training, positive)
    x_validation, y_validation = tensors(validation, positive)
    torch.manual_seed(seed)
    # Input normalization is folded into the first layer after training.
    mean, scale = x.mean(0), x.std(0) + 1e-3
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], width), torch.nn.GELU(), torch.nn.Linear(width, 1))
    torch.nn.init.zeros_(model[2].weight)
    torch.nn.init.constant_(model[2].bias, float(y.mean()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    x, x_validation = (x - mean) / scale, (x_validation - mean) / scale
    best, best_state, losses, validation_losses = float("inf"), model.state_dict(), [], []
    for _ in track(range(epochs), description="epochs", disable=None):
        losses.append(_epoch(model, optimizer, x, y))
        with torch.no_grad():
            validation_losses.append(float((model(x_validation)[:, 0] - y_validation).square().mean()))
        if validation_losses[-1] < best:
            best, best_state = validation_losses[-1], copy.deepcopy(model.state_dict())
        elif len(validation_losses) - 1 - validation_losses.index(best) >= patience:
            break
    weight = best_state["0.weight"] / scale
    network = Network(weight, best_state["0.bias"] - weight @ mean, best_state["2.weight"], best_state["2.bias"])
    return Fit(network, len(losses), losses, validation_losses), validation


def _epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    total = 0.0
    for batch in torch.randperm(len(x)).split(512):
        loss = (model(x[batch])[:, 0] - y[batch]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(batch)
    return total / len(x)


def split(data: RouterData, seed: int) -> tuple[list[Record], list[Record]]:
    """Split the records by session into training and validation. Raises ConfigError for too few sessions."""
    sessions = data.sessions
    if len(sessions) < MIN_SESSIONS:
        problem = f"{len(sessions)} sessions, but at least {MIN_SESSIONS} are needed to train and validate"
        raise ConfigError("--data", None, problem, "collect from more sessions")
    shuffled = np.random.default_rng(seed).permutation(sessions)
    held_back = set(shuffled[: max(2, round(VALIDATION_SHARE * len(sessions)))].tolist())
    training = [record for record in data.records if record.session not in held_back]
    return training, [record for record in data.records if record.session in held_back]


def tensors(records: Sequence[Record], positive: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, hidden], and how many more tokens the positive drafter accepts [n]."""
    other = "df" if positive == "e3" else "e3"
    difference = gather(records, positive).astype(np.float32) - gather(records, other).astype(np.float32)
    return torch.from_numpy(gather(records, "hidden")).float(), torch.from_numpy(difference)


def metrics_of(fit: Fit, validation: list[Record], positive: str) -> dict[str, Any]:
    """Validation metrics: loss, explained variance, and simulated acceptance lengths."""
    x, y = tensors(validation, positive)
    predicted = fit.network(x)
    e3_gain = (predicted if positive == "e3" else -predicted).numpy()
    none, always = np.zeros(len(e3_gain), dtype=bool), np.ones(len(e3_gain), dtype=bool)
    policies = {"fixed:df": none, "fixed:e3": always, "neural": by_worth(validation, e3_gain, EQUAL_COSTS)}
    return {
        "validation_loss": round(min(fit.validation_losses), 4),
        "variance": round(float(y.var()), 4),
        "explained": round(1 - min(fit.validation_losses) / float(y.var()), 4),
        "acceptance_length": {
            name: round(walk(validation, choice, EQUAL_COSTS).acceptance_length, 3) for name, choice in policies.items()
        },
    }


def plot(fit: Fit, validation: list[Record], positive: str, table: dict[float, float], file: Path) -> None:
    """Plot loss by epoch, predicted vs. true difference, and acceptance length by threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = tensors(validation, positive)
    predicted = fit.network(x).numpy()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(fit.train_losses, label="training")
    left.plot(fit.validation_losses, label="validation", linestyle="--")
    left.set(title="Loss", xlabel="epoch", ylabel="squared error, tokens²")
    left.legend()
    edges = np.quantile(predicted, np.linspace(0, 1, 21))
    bins = np.clip(np.digitize(predicted, edges[1:-1]), 0, 19)
    centres = [predicted[bins == i].mean() for i in range(20) if (bins == i).any()]
    middle.plot(centres, [float(y[bins == i].mean()) for i in range(20) if (bins == i).any()], "o")
    middle.axline((0, 0), slope=1, color="0.6", linestyle=":")
    middle.set(title="Difference of acceptance lengths", xlabel="predicted (mean of a bin)", ylabel="true (mean)")
    right.plot(list(table), list(table.values()), marker=".")
    right.set(title="By threshold", xlabel="threshold, tokens", ylabel="acceptance length")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and write the router; returns its figures. Raises WhiFlashError."""
    data = load_router_data(args.data)
    kept = set(data.sessions[: args.sessions])
    data = RouterData(data.manifest, [record for record in data.records if record.session in kept])
    width = args.width or max(64, data.manifest["models"]["hidden_size"] // 8)
    fit, validation = train(data, args.positive_drafter, width, args.epochs, args.patience, args.seed)
    metrics = metrics_of(fit, validation, args.positive_drafter)
    x, _ = tensors(validation, args.positive_drafter)
    sign = 1 if args.positive_drafter == "e3" else -1
    threshold, table = best_threshold(validation, sign * fit.network(x).numpy(), THRESHOLDS, EQUAL_COSTS)
    router = NeuralRouter(fit.network, args.positive_drafter, sign * threshold, lengths_of(data.records))
    training = {
        "traces": data.manifest["traces"],
        "sha256": data.manifest["sha256"],
        "sessions": len(data.sessions),
        "positions": sum(len(record.positions.entropy) for record in data.records),
        "width": width,
        "epochs": fit.epochs,
        "seed": args.seed,
    }
    save_router(args.out, router, Identity(**data.manifest["models"]), training=training, metrics=metrics)
    plot(fit, validation, args.positive_drafter, table, args.plots / "train_router.png")
    return {"out": str(args.out), "threshold": router.threshold, "training": training, "metrics": metrics}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_sglang.training.train_router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="output of collect_router_data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the router's folder")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for plots (default: the data's)")
    parser.add_argument("--sessions", type=int, metavar="N", help="use only the first N; calibrate on the others")
    parser.add_argument("--positive-drafter", choices=("e3", "df"), default="e3")
    parser.add_argument(
        "--width", type=int, help="size of the inner layer (default: an eighth of the target's, at least 64)"
    )
    parser.add_argument("--epochs", type=int, default=60, help="maximum (default: %(default)s)")
    parser.add_argument("--patience", type=int, default=8, help="epochs without improvement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.plots = args.plots or args.data
    try:
        figures = run(args)
    except WhiFlashError as error:
        raise SystemExit(f"error: {error}") from error
    with to_readers():
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
