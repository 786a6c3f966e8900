"""Numbers of SGLang's flags: every numeric flag of its parser has a bound, and what lies outside is one line."""

from __future__ import annotations

import argparse

import pytest

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup import bounds, command_line
from whiflash_sglang.startup.bounds import BOUNDS
from whiflash_sglang.startup.refused_flags import CPU_REFUSALS, CUDA_REFUSALS, DEFAULTS, REFUSALS


@pytest.mark.parametrize(
    ("flag", "bad"),
    [
        ("--max-total-tokens", ["0", "-5", "nan", "1.5", "", "many", "0k"]),
        ("--mem-fraction-static", ["0", "1", "1.5", "-1", "nan", "inf", "half"]),
        ("--port", ["0", "65536", "99999", "-1", "80.0", "http"]),
        ("--watchdog-timeout", ["0", "inf", "-inf", "nan", "-3"]),
        ("--schedule-conservativeness", ["-0.1", "nan", "inf"]),
        ("--chunked-prefill-size", ["-2", "1k"]),
        ("--random-seed", ["-1", "4294967296"]),
        ("--swa-full-tokens-ratio", ["-0.1", "1.1"]),
        ("--default-priority-value", ["first", "1.5", "inf"]),
    ],
)
def test_what_lies_outside_is_refused_with_flag_value_and_fix(flag: str, bad: list[str]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{flag} {value}: must be {BOUNDS[flag]}; correct"):
            bounds.check({flag: [value]})


@pytest.mark.parametrize(
    ("flag", "good"),
    [
        ("--max-total-tokens", ["1", "64k", "8Ki", "25.6k", "1M"]),
        ("--mem-fraction-static", ["0.01", "0.999"]),
        ("--port", ["1", "65535"]),
        ("--chunked-prefill-size", ["-1", "0", "8192"]),
        ("--random-seed", ["0", "4294967295"]),
        ("--default-priority-value", ["-7", "0"]),
        ("--swa-full-tokens-ratio", ["0", "1"]),
    ],
)
def test_what_lies_inside_passes(flag: str, good: list[str]) -> None:
    bounds.check({flag: good})


def test_each_of_several_values_is_looked_at() -> None:
    with pytest.raises(ConfigError, match="--cuda-graph-bs-decode 0: must be"):
        bounds.check({"--cuda-graph-bs-decode": ["1", "0", "4"]})


def test_a_flag_without_its_value_is_named() -> None:
    with pytest.raises(ConfigError, match="--port: has no value; give a whole number from 1 to 65535"):
        bounds.check(command_line.read(["--port", "--host", "127.0.0.1"]))


def test_a_node_is_one_of_the_nodes() -> None:
    bounds.check({"--node-rank": ["1"], "--nnodes": ["2"]})
    with pytest.raises(ConfigError, match="--node-rank 2: there are 2 nodes"):
        bounds.check({"--node-rank": ["2"], "--nnodes": ["2"]})


def test_flags_are_read_as_argparse_reads_them() -> None:
    read = command_line.read(["stray", "--port", "1", "--tp=2", "--enable-lora", "--port=2", "--numa-node", "0", "1"])
    assert read == {
        "--port": ["2"],
        "--tensor-parallel-size": ["2"],
        "--enable-lora": [],
        "--numa-node": ["0", "1"],
    }
    assert command_line.read(["--max-total-tokens", "-5"]) == {"--max-total-tokens": ["-5"]}


# ---- against SGLang's own parser


@pytest.fixture(scope="module")
def actions() -> list[argparse.Action]:
    pytest.importorskip("sglang")
    from whiflash_sglang.launch_server import sglang_parser

    return sglang_parser()._actions


KINDS = {"int": (True, False), "human_readable_int": (True, True), "float": (False, False)}
"""SGLang's types of numbers: whole, with suffixes."""


def test_every_numeric_flag_of_sglang_has_a_bound_that_its_default_is_in(actions: list[argparse.Action]) -> None:
    numeric = [action for action in actions if getattr(action.type, "__name__", None) in KINDS]
    assert len(numeric) > 100
    for action in numeric:
        known = [flag for flag in action.option_strings if flag in BOUNDS]
        assert len(known) == 1, f"{action.option_strings}: no bound, or two"
        bound = BOUNDS[known[0]]
        assert (bound.whole, bound.suffixes) == KINDS[action.type.__name__], known
        if action.default is not None:
            bound.number(action.default)
    names = {flag for action in numeric for flag in action.option_strings}
    names.add("--metrics-port")  # SGLang has it where its gateway's gRPC servicer is installed
    assert set(BOUNDS) <= names, "bounds of flags that SGLang does not have, or that take no number"


def test_second_names_and_defaults_are_those_of_sglang(actions: list[argparse.Action]) -> None:
    """What the first look knows without SGLang's parser is what the parser says."""
    refused = {row.flag for row in (*REFUSALS, *CPU_REFUSALS, *CUDA_REFUSALS)}
    defaults = {}
    for action in actions:
        for flag in {*refused, *BOUNDS}.intersection(action.option_strings):
            others = {other for other in action.option_strings if other != flag}
            assert {other: command_line.NAMES.get(other) for other in others} == dict.fromkeys(others, flag)
            if flag in refused and action.nargs != 0 and action.default is not None:
                defaults[flag] = action.default
    assert {flag: value for flag, value in defaults.items() if not isinstance(value, bool | list)} == DEFAULTS
