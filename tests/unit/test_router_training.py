"""Training a neural router: it learns what can be learned, is split by session, and its data survives interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.learned import HIDDEN, identity, record
from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.routing.artefact import load_router
from whiflash_sglang.training import train_router
from whiflash_sglang.training.router_data import (
    Record,
    RouterData,
    load_router_data,
    shard_path,
    write_manifest,
    write_shard,
)


def learnable(sessions: int = 24, positions: int = 60) -> list[Record]:
    """Records in which the sign of a hidden state's first number says which drafter is the better one."""
    rng = np.random.default_rng(3)
    records = []
    for number in range(sessions):
        hidden = rng.standard_normal((positions, HIDDEN)) * 5 + 2
        to_e3 = hidden[:, 0] > 2
        lengths = {"df": np.where(to_e3, 2, 6), "e3": np.where(to_e3, 5, 3)}
        records.append(record(lengths["df"], lengths["e3"], session=f"s{number}", hidden=hidden))
    return records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = learnable()
    write_manifest(tmp_path, {"models": identity().to_json(), "traces": ["t"], "sha256": "0", "shards": 2})
    write_shard(shard_path(tmp_path, 0), records[:10])
    write_shard(shard_path(tmp_path, 1), records[10:])
    return tmp_path


def test_positions_are_kept_as_they_were(folder: Path) -> None:
    data = load_router_data(folder)
    assert data.sessions == [f"s{n}" for n in range(24)]
    for found, expected in zip(data.records, learnable(), strict=True):
        assert found._replace(positions=None) == expected._replace(positions=None)
        assert all(np.array_equal(a, b) for a, b in zip(found.positions, expected.positions, strict=True))


@pytest.mark.parametrize("positive", ["e3", "df"])
def test_a_router_is_trained_that_parts_them(
    folder: Path, positive: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "router"
    options = ["--positive-drafter", positive, "--epochs", "300", "--patience", "30", "--width", "16"]
    train_router.main(["--data", str(folder), "--out", str(out), *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = report["metrics"]
    assert metrics["explained"] > 0.7
    lengths = metrics["acceptance_length"]
    assert lengths["neural"] > 1.1 * max(lengths["fixed:df"], lengths["fixed:e3"])
    assert (folder / "train_router.png").stat().st_size > 5000
    router = load_router(str(out), identity(), None, None)
    records = learnable(4)
    hidden, difference = train_router.tensors(records, "e3")
    predicted = router.e3_network(hidden)
    assert float(((predicted > 0) == (difference > 0)).float().mean()) > 0.9


def test_sessions_are_on_one_side_only() -> None:
    data = RouterData({}, learnable())
    training, validation = train_router.split(data, seed=0)
    assert not {r.session for r in training} & {r.session for r in validation}
    assert len(validation) == 4 and len(training) == 20


def test_too_few_sessions_says_how_many() -> None:
    with pytest.raises(ConfigError, match=f"3 sessions, but at least {train_router.MIN_SESSIONS} are needed"):
        train_router.split(RouterData({}, learnable(3)), seed=0)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard_path(folder, 1).unlink()
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors is missing; run the same collection again"):
        load_router_data(folder)


def test_a_folder_of_other_data_is_not_gone_on_with(folder: Path) -> None:
    with pytest.raises(ConfigError, match="contains data of other models"):
        write_manifest(folder, {"models": identity().to_json(), "traces": ["u"], "sha256": "0", "shards": 2})


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest\.json; collect it with"):
        load_router_data(tmp_path)
    write_manifest(tmp_path, {"shards": 1})
    write_shard(shard_path(tmp_path, 0), [])
    with pytest.raises(ConfigError, match="contains no positions"):
        load_router_data(tmp_path)
