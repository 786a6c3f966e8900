"""Set-up of the whole test run."""

import os
import signal
from collections.abc import Iterator

import pytest

from whiflash_sglang.config import ENVIRONMENT_VARIABLE

# A shell without job control starts background commands with Ctrl-C ignored, and children inherit that: the tests that
# interrupt a process would wait for ever when the run itself stands in the background.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def launcher_forgets() -> Iterator[None]:
    """What a test of the launcher leaves in the environment would make a WHIFLASH server of any that is started
    later."""
    yield
    os.environ.pop(ENVIRONMENT_VARIABLE, None)
