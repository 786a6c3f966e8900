"""Flags in, a valid frozen config out, or an error that names flag, value and fix."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from whiflash_sglang.core.errors import ConfigError
from whiflash_sglang.startup.config import ENVIRONMENT_VARIABLE, WhiFlashConfig, add_arguments

BOTH = ["--speculative-draft-model-path", "models/df", "--whiflash-eagle-draft", "models/e3"]


def parse(*argv: str) -> WhiFlashConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return WhiFlashConfig.from_namespace(parser.parse_args(argv))


def test_defaults_route_by_entropy_between_both_drafters() -> None:
    config = parse(*BOTH)
    assert config == WhiFlashConfig("df-e3", "models/df", "models/e3", "entropy", eagle_steps=5)
    assert config.drafter_names == ("df", "e3")
    assert config.draft_paths == {"df": "models/df", "e3": "models/e3"}


@pytest.mark.parametrize("router", ["entropy", "fixed:e3", "fixed:df", "alternate", "random:7", "off"])
def test_every_router_is_accepted_with_both_drafters(router: str) -> None:
    assert parse(*BOTH, "--whiflash-router", router).router == router


def test_one_drafter_is_always_chosen_by_default() -> None:
    assert parse("--whiflash-drafters", "df", *BOTH[:2]).router == "fixed:df"
    only_eagle = parse("--whiflash-drafters", "e3", *BOTH[2:])
    assert (only_eagle.router, only_eagle.drafter_names) == ("fixed:e3", ("e3",))


def test_router_off_needs_no_drafter_and_loads_none() -> None:
    assert parse("--whiflash-router", "off").drafter_names == ()
    assert parse("--whiflash-router", "off", *BOTH).draft_paths == {}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([*BOTH, "--whiflash-drafters", "ddt-e3"], ["--whiflash-drafters", "ddt-e3", "df-e3"]),
        ([*BOTH, "--whiflash-router", "neutral"], ["--whiflash-router", "neutral", "entropy", "random:SEED"]),
        ([*BOTH, "--whiflash-router", ""], ["--whiflash-router", "unknown router"]),
        ([*BOTH, "--whiflash-router", "fixed:ddt"], ["fixed:ddt", "fixed:df or fixed:e3"]),
        ([*BOTH, "--whiflash-router", "fixed"], ["--whiflash-router", "fixed:df or fixed:e3"]),
        ([*BOTH, "--whiflash-router", "entropy:1"], ["entropy:1", "takes no argument"]),
        ([*BOTH, "--whiflash-router", "random:"], ["random:", "random:0"]),
        ([*BOTH, "--whiflash-router", "random:-1"], ["random:-1", "random:0"]),
        ([*BOTH, "--whiflash-router", "random:x"], ["random:x", "random:0"]),
        (
            BOTH[:2],
            ["--whiflash-eagle-draft", "missing", "df-e3", "give the EAGLE-3", "--whiflash-drafters df to draft"],
        ),
        (BOTH[2:], ["--speculative-draft-model-path", "missing", "give the DFlash", "--whiflash-drafters e3 to draft"]),
        (
            [],
            ["--speculative-draft-model-path", "missing", "--whiflash-router off to serve without", "docs/routers.md"],
        ),
        (["--whiflash-drafters", "e3"], ["--whiflash-eagle-draft", "missing"]),
        (["--whiflash-drafters", "df", *BOTH], ["--whiflash-eagle-draft", "models/e3", "drop it"]),
        (["--whiflash-drafters", "e3", *BOTH], ["--speculative-draft-model-path", "models/df", "drop it"]),
        (["--whiflash-drafters", "df", *BOTH[:2], "--whiflash-router", "entropy"], ["entropy", "use fixed:df"]),
        (["--whiflash-drafters", "e3", *BOTH[2:], "--whiflash-router", "alternate"], ["alternate", "use fixed:e3"]),
        ([*BOTH, "--whiflash-entropy-threshold", "much"], ["--whiflash-entropy-threshold", "much", "0.5"]),
        ([*BOTH, "--whiflash-entropy-threshold", "-0.1"], ["--whiflash-entropy-threshold", "-0.1", ">= 0"]),
        ([*BOTH, "--whiflash-entropy-threshold", "nan"], ["--whiflash-entropy-threshold", "nan", "finite"]),
        ([*BOTH, "--whiflash-entropy-threshold", "inf"], ["inf", "fixed:df or fixed:e3"]),
        ([*BOTH, "--whiflash-eagle-steps", "0"], ["--whiflash-eagle-steps", "0", "1 to 15"]),
        ([*BOTH, "--whiflash-eagle-steps", "16"], ["--whiflash-eagle-steps", "16", "1 to 15"]),
        ([*BOTH, "--whiflash-eagle-steps", "2.5"], ["--whiflash-eagle-steps", "2.5", "whole number"]),
        ([*BOTH, "--whiflash-max-backlog", "5"], ["--whiflash-max-backlog", "5", "below the verify width", "128"]),
        ([*BOTH, "--whiflash-max-backlog", "-1"], ["--whiflash-max-backlog", "-1", "below the verify width"]),
        (
            [*BOTH, "--whiflash-eagle-steps", "12", "--whiflash-max-backlog", "12"],
            ["--whiflash-max-backlog", "12", "--whiflash-eagle-steps 12 makes 13"],
        ),
        ([*BOTH, "--whiflash-max-backlog", "many"], ["--whiflash-max-backlog", "many", "whole number"]),
        ([*BOTH, "--whiflash-max-backlog", "64.5"], ["--whiflash-max-backlog", "64.5", "whole number"]),
    ],
)
def test_bad_flags_are_refused_with_flag_value_and_mend(argv: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(*argv)
    for part in named:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_backlog_is_bounded() -> None:
    assert parse(*BOTH).max_backlog == 128
    assert parse(*BOTH, "--whiflash-max-backlog", "6").max_backlog == 6


def test_a_config_is_frozen_and_checked_wherever_it_is_made() -> None:
    config = parse(*BOTH)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.router = "off"  # type: ignore[misc]
    with pytest.raises(ConfigError, match="--whiflash-eagle-steps 99"):
        dataclasses.replace(config, eagle_steps=99)


def test_the_environment_carries_the_config_unchanged() -> None:
    config = parse(*BOTH, "--whiflash-router", "entropy", "--whiflash-entropy-threshold", "0.1")
    environ: dict[str, str] = {}
    config.to_environ(environ)
    assert list(environ) == [ENVIRONMENT_VARIABLE]
    assert WhiFlashConfig.from_environ(environ) == config


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"router": "off"}', '{"routr": "off"}'])
def test_a_broken_environment_names_the_variable_and_the_launcher(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{ENVIRONMENT_VARIABLE}.*whiflash_sglang\.launch_server"):
        WhiFlashConfig.from_environ({ENVIRONMENT_VARIABLE: text})
    with pytest.raises(ConfigError, match="not set"):
        WhiFlashConfig.from_environ({})
