"""A training run that was interrupted ends like one that was not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from whiflash_sglang.training.loop import Result, Settings, train

SETTINGS = Settings(steps=6, save_every=1)


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randn(4, 8, generator=generator)


def run(checkpoint: Path, stop_after: int | None = None) -> tuple[Result, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    steps = 0

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        if steps == stop_after:
            raise KeyboardInterrupt
        steps += 1
        return (model(batch + torch.randn(4, 8)) ** 2).mean()  # random as the anchors of a drafter's step are

    result = train(model, batches(), loss_of, SETTINGS, checkpoint)
    return result, model[0].weight.detach()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, weights = run(tmp_path / "whole.pt")
    for steps in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.pt", stop_after=steps)
    parts, found = run(tmp_path / "parts.pt")
    assert (parts.steps, parts.loss) == (whole.steps, whole.loss)
    assert torch.equal(weights, found)


def test_a_run_that_has_ended_takes_no_step(tmp_path: Path) -> None:
    _, weights = run(tmp_path / "whole.pt")
    again, found = run(tmp_path / "whole.pt", stop_after=0)
    assert again.steps == SETTINGS.steps
    assert torch.equal(weights, found)
