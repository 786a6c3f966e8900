"""Errors for the operator or client. Each names the flag or field, the value and the fix.

WhiFlashError
├── ConfigError        a flag, or flags that contradict each other
├── CheckpointError    a checkpoint or learned file that is missing, broken or does not fit the models
└── RequestError       a field of a request; also a ValueError, which SGLang reports as HTTP 400
    └── HintError      a request's hints
"""

from __future__ import annotations

MAX_SHOWN = 80  # characters


class WhiFlashError(Exception):
    """The message is one line, `FIELD VALUE: problem; fix`. `value` None is left out."""

    def __init__(self, field: str, value: object, problem: str, fix: str):
        self.field = field
        self.value = value
        self.problem = problem
        self.fix = fix
        named = field if value is None else f"{field} {value}"
        super().__init__(f"{named}: {problem}; {fix}")


class ConfigError(WhiFlashError):
    """A flag is invalid, or flags contradict each other."""


class CheckpointError(WhiFlashError):
    """A checkpoint or learned file cannot be used."""


class RequestError(WhiFlashError, ValueError):
    """A field of a request is invalid."""


class HintError(RequestError):
    """A hint in `custom_params` is invalid."""


def shown(value: object) -> str:
    """A client's value for an error text: one printable ASCII line, at most `MAX_SHOWN` characters."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
