"""Calibration: what is found from positions, and the file that a server reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learned import identity, record
from whiflash_sglang.calibrate import MIN_SESSIONS, gains_by_entropy, round_costs
from whiflash_sglang.calibrate import main as calibrate
from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.routing.calibration import Calibration, load_calibration, save_calibration

CALIBRATION = Calibration({"df": 5.5, "e3": 5.0}, 0.1, (0.01, 0.5), (-1.5, 0.1, 2.0), 0.25)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_calibration(tmp_path / "calibration.json", CALIBRATION, identity(), sessions=40)
    return tmp_path / "calibration.json"


def test_what_is_saved_is_loaded(file: Path) -> None:
    assert asdict(load_calibration(str(file), identity())) == asdict(CALIBRATION)
    assert json.loads(file.read_text())["sessions"] == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "is 'x' version 1"),
        ({"entropy": {"threshold": 0.1, "edges": [0.1], "gains": [1.0]}}, "one more gain than edges"),
        ({"entropy": {"threshold": 0.1, "edges": [0.5, 0.1], "gains": [1.0, 2.0, 3.0]}}, "ascending edges"),
        ({"entropy": {"threshold": "low", "edges": [], "gains": [1.0]}}, "ill-typed"),
        ({"entropy": None}, "ill-typed"),
        ({"entropy": {"threshold": 0.1, "edges": [0.1], "gains": [1.0, float("nan")]}}, "holds NaN"),
        ({"acceptance_length": {"df": 1.0}}, "missing or ill-typed field"),
        ({"models": {**identity().to_json(), "target": "other"}}, "made for another target"),
        ({"models": None}, "`models` must have exactly"),
    ],
)
def test_refused_by_name(file: Path, changes: dict[str, Any], message: str) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="--whiflash-calibration") as caught:
        load_calibration(str(file), identity())
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; create one with `python -m whiflash_sglang.calibrate`"):
        load_calibration(str(tmp_path / "nowhere.json"), identity())


def test_gains_are_the_means_between_edges() -> None:
    """Some replies are sure and df's, some are open and e3's; edges that part nothing are left out, and so are
    positions where no round begins (every other one of the sure replies)."""
    sure = record(df=[4, 1] * 100, e3=[2, 8] * 100)
    open_ = record(df=[2] * 100, e3=[5] * 100)
    open_ = open_._replace(positions=open_.positions._replace(entropy=np.full(100, 0.8, dtype=np.float32)))
    edges, gains = gains_by_entropy([sure, open_])
    assert edges == (0.001,)
    assert gains == (-2.0, 3.0)


def test_costs_are_read_at_the_mean_context() -> None:
    """A reply of 20 positions behind 10 tokens: its mean context is 20."""
    by_context = {"10": 5.0, "30": 9.0}
    assert round_costs([record(df=[1] * 20, e3=[1] * 20)], {"df": {"1": by_context, "4": {"10": 0.0}}}) == {"df": 7.0}


def test_too_few_sessions_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_models import build
    from whiflash_sglang.training.models import ModelPaths
    from whiflash_sglang.training.router_data import shard_path, write_manifest, write_shard

    tiny = build(tmp_path / "models")
    models = ModelPaths(tiny.target, tiny.dflash, tiny.eagle3, 5).identity().to_json()
    write_manifest(tmp_path / "data", {"models": models, "shards": 1})
    write_shard(shard_path(tmp_path / "data", 0), [record(df=[1, 2], e3=[2, 1])])
    paths = ["--model-path", tiny.target, "--speculative-draft-model-path", tiny.dflash]
    paths += ["--whiflash-eagle-draft", tiny.eagle3, "--data", tmp_path / "data", "--out", tmp_path / "out.json"]
    with pytest.raises(SystemExit, match=f"1 sessions, but calibration needs at least {MIN_SESSIONS}"):
        calibrate([str(part) for part in paths])


def test_neither_data_nor_traces(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give either --data or --traces"):
        calibrate(["--demo", "--out", str(tmp_path / "out.json")])
