"""Configuration of the test run: shared fixtures, time limits, file order, and the summary."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import zygote
from whiflash_sglang.startup.config import ENVIRONMENT_VARIABLE
from whiflash_workloads import server

UNIT_SECONDS = 5  # CPU time on an idle machine
SECONDS = Path(__file__).parent / "seconds.json"  # per file, from a full run on two idle cores
UNKNOWN_SECONDS = 10.0
ZYGOTES = pytest.StashKey[ExitStack]()

# Packed and plain weights differ in the last bit, and the choice is measured. Fix it for all test servers.
os.environ["WHIFLASH_PACK_WEIGHTS"] = "1"
server.spawn = zygote.spawn
server.START_SECONDS = 1200  # a start on a busy machine is slow; `timeout` finds one that hangs

# A shell without job control starts background commands with SIGINT ignored, and children inherit that. Tests that
# interrupt a process would then never return.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def launcher_forgets() -> Iterator[None]:
    """Remove the launcher's config from the environment, so that servers of later tests do not inherit it."""
    yield
    os.environ.pop(ENVIRONMENT_VARIABLE, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run tests marked `nightly`")
    parser.addoption("--record-seconds", action="store_true", help=f"write {SECONDS.name}, which determines file order")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ZYGOTES] = ExitStack()
    if not hasattr(config, "workerinput"):  # once, for all workers
        config.stash[ZYGOTES].enter_context(zygote.zygotes())


def pytest_unconfigure(config: pytest.Config) -> None:
    if (started := config.stash.get(ZYGOTES, None)) is not None:
        started.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest files first, to balance the workers, and set skips."""
    seconds = json.loads(SECONDS.read_text())
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), UNKNOWN_SECONDS))
    for item in items:
        nightly = item.get_closest_marker("nightly")
        if nightly and not config.getoption("--nightly"):
            item.add_marker(pytest.mark.skip(reason=f"{nightly.kwargs['reason']}: make test-all"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail slow unit tests that are not marked `slow`."""
    before, num_modules = processor_seconds(), len(sys.modules)
    result = yield
    spent = processor_seconds() - before
    # The first test pays for importing SGLang; do not count that.
    imports = len(sys.modules) - num_modules > 100
    judged = "unit" in item.path.parts and not imports and not item.get_closest_marker("slow")
    if judged and spent > UNIT_SECONDS and spent > UNIT_SECONDS * slowness():
        pytest.fail(f"this unit test took {spent:.1f} s of CPU time: make it faster, or mark it `slow`", False)
    return result


def slowness() -> float:
    """CPU time of a fixed loop, relative to an idle machine. Busy neighbours slow a core down, too."""
    before = processor_seconds()
    sum(number % 7 for number in range(2_000_000))
    return (processor_seconds() - before) / 0.07


def processor_seconds() -> float:
    """CPU time of this process and its finished children, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print skip reasons, which explain how to run these tests, and record file durations if requested."""
    skipped = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if skipped:
        terminalreporter.section(f"{skipped.total()} skipped")
        for reason, count in skipped.most_common():
            terminalreporter.line(f"{count:4}  {reason}")
    if config.getoption("--record-seconds"):
        seconds: dict[str, float] = defaultdict(float)
        for report in (one for reports in terminalreporter.stats.values() for one in reports):
            if isinstance(report, pytest.TestReport):
                seconds[file_of(report.nodeid)] += report.duration
        longest = sorted(seconds.items(), key=lambda item: -item[1])
        SECONDS.write_text(json.dumps({file: round(each) for file, each in longest if each >= 1}, indent=1) + "\n")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")
