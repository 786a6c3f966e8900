"""Costs of a quiet start, kept for a disturbed one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from whiflash_sglang.routing.cost_cache import cache_file, load_table, machine, save_table

TABLE = {name: {"1": {"256": ms}} for name, ms in {"none": 5.0, "df": 10.0}.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_was_saved_is_loaded_under_the_same_key_only(tmp_path: Path) -> None:
    key = {**machine(), "dtype": "float32"}
    save_table(cache_file(key), TABLE, key)
    assert load_table(cache_file(key)) == TABLE
    assert load_table(cache_file({**key, "dtype": "bfloat16"})) is None
    assert cache_file(key).is_relative_to(tmp_path)
    assert [file.suffix for file in cache_file(key).parent.iterdir()] == [".json"], "nothing half written is left"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"round_ms": 3}', json.dumps({"round_ms": {"none": {"1": {"2": -1}}}})]
)
def test_a_damaged_file_is_a_line_in_the_log(content: str, caplog: pytest.LogCaptureFixture) -> None:
    file = cache_file({})
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load_table(file) is None
    assert "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "whiflash").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        save_table(cache_file({}), TABLE, {})
    assert "cannot be cached" in caplog.text
