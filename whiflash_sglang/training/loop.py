"""The training loop of target and drafters: optimizer, schedule, checkpoints, progress.

Matrices use Muon, all other parameters AdamW; on models of a few million parameters this halves the number of steps.
Runs are seeded and resume exactly from their last checkpoint, with the next batch and random state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn

Batch = TypeVar("Batch")


class Settings(NamedTuple):
    """Options of a training run."""

    steps: int
    learning_rate: float = 3e-3  # AdamW; Muon's is scaled from it
    warmup: int = 40
    save_every: int = 25
    max_seconds: float = math.inf  # stop early; the schedule then ends by time


class Result(NamedTuple):
    """Figures of a training run."""

    steps: int
    loss: float  # mean of the last tenth of the steps
    seconds: float


def train(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    settings: Settings,
    checkpoint: Path,
) -> Result:
    """Minimize `loss_of(batch)` over the trainable parameters of `model`, in place, with one step per batch."""
    optimizers = _optimizers(model, settings)
    step, spent, losses = _resume(model, optimizers, checkpoint)
    batches = islice(batches, step, None)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    began = time.monotonic() - spent
    with Progress(*columns) as progress:
        task = progress.add_task(checkpoint.stem, total=settings.steps, completed=step, loss="")
        while step < settings.steps:
            seconds = time.monotonic() - began
            done = max(step / settings.steps, seconds / settings.max_seconds)
            if done >= 1:
                break
            _set_rate(optimizers, min(1.0, (step + 1) / settings.warmup) * min(1.0, 2.5 * (1 - done)))
            torch.manual_seed(step)
            loss = loss_of(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            step += 1
            progress.update(task, completed=step, loss=f"loss {sum(losses[-20:]) / len(losses[-20:]):.4f}")
            if step % settings.save_every == 0:
                _save(model, optimizers, checkpoint, step, time.monotonic() - began, losses)
                print(f"{checkpoint.stem} step {step} loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)
    last = losses[-max(1, len(losses) // 10) :]
    _save(model, optimizers, checkpoint, step, time.monotonic() - began, losses)
    return Result(step, sum(last) / len(last), time.monotonic() - began)


def _optimizers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tables = ("embed_tokens", "lm_head")
    matrices = [p for name, p in trainable.items() if p.ndim == 2 and not any(table in name for table in tables)]
    others = [p for p in trainable.values() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def _save(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    checkpoint: Path,
    step: int,
    seconds: float,
    losses: list[float],
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
        "losses": losses,
    }
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def _resume(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], checkpoint: Path
) -> tuple[int, float, list[float]]:
    if not checkpoint.exists():
        return 0, 0.0, []
    state = torch.load(checkpoint, weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["model"].items():
            parameters[name].copy_(value)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"], state["losses"]
