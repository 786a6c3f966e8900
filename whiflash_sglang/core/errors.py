"""Errors that the operator is meant to read. Each names the flag or field, the value and the mend.

WhiFlashError
├── ConfigError        a flag, or flags that contradict each other
├── CheckpointError    a drafter or target checkpoint that is missing, incomplete or does not fit
└── RequestError       a field of a request; also a ValueError, which SGLang answers with HTTP 400
    └── HintError      a request's hints
"""

from __future__ import annotations

MAX_SHOWN = 80  # characters


class WhiFlashError(Exception):
    """Reads `FIELD VALUE: problem; mend`, one line."""

    def __init__(self, field: str, value: object, problem: str, mend: str):
        self.field = field
        self.value = value
        self.problem = problem
        self.mend = mend
        named = field if value is None else f"{field} {value}"
        super().__init__(f"{named}: {problem}; {mend}")


class ConfigError(WhiFlashError):
    pass


class CheckpointError(WhiFlashError):
    pass


class RequestError(WhiFlashError, ValueError):
    pass


class HintError(RequestError):
    pass


def shown(value: object) -> str:
    """What a client has sent, as an error shows it: on one line, printable, and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
