"""Errors that the operator is meant to read. Each names the flag or field, the value and the mend.

WhiFlashError
├── ConfigError        a flag, or flags that contradict each other
├── CheckpointError    a drafter or target checkpoint that is missing, incomplete or does not fit
└── HintError          a request's hints; also a ValueError, which SGLang answers with HTTP 400
"""

from __future__ import annotations


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


class HintError(WhiFlashError, ValueError):
    pass
