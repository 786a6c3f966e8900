"""Read flags and values from the raw command line, without SGLang's parser, which takes many seconds to import.

Checks that need only the flags run on this. SGLang's parser reads the same line later and resolves abbreviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMES: Mapping[str, str] = {
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--dp": "--data-parallel-size",
    "--dp-size": "--data-parallel-size",
    "--pp": "--pipeline-parallel-size",
    "--pp-size": "--pipeline-parallel-size",
    "--ep": "--expert-parallel-size",
    "--ep-size": "--expert-parallel-size",
    "--dcp-size": "--decode-context-parallel-size",
    "--attn-cp-size": "--attention-context-parallel-size",
    "--moe-dp-size": "--moe-data-parallel-size",
    "--grpc-http-sidecar-port": "--smg-http-sidecar-port",
}
"""Aliases that SGLang accepts -> the names that our tables use."""


def read(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> values: empty for a switch, the last occurrence for a repeated flag (as argparse does)."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            values = given[NAMES.get(name, name)] = [value] if equals else []
        else:
            values.append(token)
    return given


def last(given: Mapping[str, Sequence[str]], flag: str) -> str | None:
    """The value of a flag that takes one, or None if it was not given."""
    values = given.get(flag)
    return values[-1] if values else None
