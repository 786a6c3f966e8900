"""What is refused at start: each row of the table by SGLang's own parser, and docs that say the same."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from whiflash_sglang import launch_server
from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup import demo
from whiflash_sglang.startup.refused_flags import (
    CPU_REFUSALS,
    CUDA_REFUSALS,
    REFUSALS,
    Given,
    Refusal,
    markdown,
    refuse,
)

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    """SGLang's flags by each of their names."""
    parser = launch_server.sglang_parser()
    return {name: action for action in parser._actions for name in action.option_strings}


def example(action: argparse.Action, row: Refusal) -> list[str]:
    """A command line that gives the flag a value which is neither its default nor fine."""
    if action.nargs == 0:
        return [row.flag]
    if action.choices is not None:
        return [row.flag, next(str(c) for c in action.choices if c != action.default and c not in row.fine)]
    if isinstance(action.default, float):
        return [row.flag, "0.5"]  # a share
    return [row.flag, "2" if action.default != 2 else "3"]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.flag)
def test_each_row_refuses_its_flag_with_reason_and_mend(row: Refusal, actions: dict[str, argparse.Action]) -> None:
    given = example(actions[row.flag], row)
    with pytest.raises(ConfigError) as refusal:
        launch_server.refuse_unsupported(["--demo", *given])
    said = str(refusal.value)
    assert said.startswith(row.flag), "the first flag of the table that was given is named"
    assert row.reason in said and row.fix in said
    if row.flag not in {cpu.flag for cpu in CPU_REFUSALS}:
        launch_server.refuse_unsupported(["--demo", "--whiflash-router", "off", *given])


@pytest.mark.parametrize("row", CPU_REFUSALS, ids=lambda row: row.flag)
def test_a_cpu_refuses_with_and_without_speculation(
    row: Refusal, actions: dict[str, argparse.Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--demo", "--whiflash-router", "off", *example(actions[row.flag], row)]
    monkeypatch.setattr("whiflash_sglang.cpu.activate", lambda: "a platform")
    with pytest.raises(ConfigError, match=f"^{row.flag}.*: {re.escape(row.reason)}; {re.escape(row.fix)}$"):
        launch_server.refuse_unsupported(argv)
    monkeypatch.setattr("whiflash_sglang.cpu.activate", lambda: None)
    launch_server.refuse_unsupported(argv)


@pytest.mark.parametrize("row", CUDA_REFUSALS, ids=lambda row: row.flag)
def test_a_gpu_refuses_with_speculation_only(
    row: Refusal, actions: dict[str, argparse.Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whiflash_sglang.cpu.activate", lambda: None)
    given = example(actions[row.flag], row)
    with pytest.raises(ConfigError, match=f"^{row.flag}.*: {re.escape(row.reason)}; {re.escape(row.fix)}$"):
        launch_server.refuse_unsupported(["--demo", *given])
    launch_server.refuse_unsupported(["--demo", "--whiflash-router", "off", *given])
    for backend in row.fine:
        launch_server.refuse_unsupported(["--demo", row.flag, str(backend)])


@pytest.mark.parametrize(
    "fine",
    [
        [],
        ["--speculative-draft-model-quantization", "unquant"],
        ["--model-impl", "sglang"],
        ["--tokenizer-worker-num", "1"],
        ["--disaggregation-mode", "null"],
        ["--sampling-backend", "pytorch", "--attention-backend", "torch_native"],
    ],
    ids=" ".join,
)
def test_defaults_and_values_that_are_fine_pass(fine: list[str]) -> None:
    launch_server.refuse_unsupported(["--demo", *demo.DEMO_DEFAULTS, *fine])


def test_other_names_and_abbreviations_of_a_flag_are_the_same_flag() -> None:
    for given in (["--pp-size", "2"], ["--pp-s=2"], ["--pipeline-parallel", "2"]):
        with pytest.raises(ConfigError, match="--pipeline-parallel-size 2: the drafters need features"):
            launch_server.refuse_unsupported(["--demo", *given])


def test_a_flag_that_sglang_does_not_have_is_left_to_its_parser() -> None:
    refuse([Refusal("--gone", "reason", "fix")], {"--other": Given(1, None)})


@pytest.mark.slow  # it starts a program that imports SGLang
def test_a_refusal_is_one_line_and_nothing_is_loaded(tmp_path: Path) -> None:
    """Before anything is fetched: the model here does not even exist."""
    command = [sys.executable, "-m", "whiflash_sglang.launch_server", "--model-path", str(tmp_path / "none")]
    result = subprocess.run([*command, "--enable-lora"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --enable-lora: the drafters expect features of")
    assert "Traceback" not in result.stderr


def documented(heading: str) -> Iterator[str]:
    """Flags named between a heading of the docs and the next one."""
    text = LIMITS.read_text().partition(f"\n{heading}\n")[2]
    yield from re.findall(r"`(--[a-z0-9-]+)", re.split(r"\n##+ ", text)[0])


def test_the_docs_have_the_table_of_the_code() -> None:
    text = LIMITS.read_text()
    for table in (REFUSALS, CPU_REFUSALS, CUDA_REFUSALS):
        assert markdown(table) in text, "python -m whiflash_sglang.startup.refused_flags"


def test_every_flag_of_sglang_is_in_one_class(actions: dict[str, argparse.Action]) -> None:
    """A flag that SGLang gains has to be looked at, and one that it drops to be taken out."""
    refused = {row.flag for row in REFUSALS}
    tested, untested = (set(documented(f"### {heading}")) for heading in ("Work, and are tested", "Not tested here"))
    assert not refused & tested and not refused & untested and not tested & untested
    classed = {actions[flag].dest for flag in refused | tested | untested}
    # SGLang takes on the flags of its gateway's gRPC servicer where that is installed; --grpc-mode is refused.
    servicers = {"servicer_impl", "metrics_host", "metrics_port"}
    assert classed == {action.dest for action in actions.values()} - {"help"} - servicers
