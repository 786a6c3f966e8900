"""The command line as it was typed: flags and their values, without SGLang's parser, whose import takes many seconds.

What is refused for the flags alone is refused from here; SGLang's own parser reads the same line later, and finds what
was abbreviated.
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
"""SGLang's second names of flags that our tables know by their first, and three that everybody abbreviates."""


def read(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag: none of a switch, and the last ones where a flag is given twice, as argparse has it."""
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
    """The value of a flag that takes one; None: not given."""
    values = given.get(flag)
    return values[-1] if values else None
