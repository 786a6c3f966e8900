"""Set-up of the whole test run: what every test gets, its limits, the order of files, and what is told at the end."""

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

UNIT_SECONDS = 5  # of processor time, which a busy machine hardly changes
LIMITS = {"slow": 1500, "e2e": 600}  # seconds that a test may take at most, set-up included; others: pyproject.toml
SECONDS = Path(__file__).parent / "seconds.json"  # by file, in a run of all tests on two idle cores
UNKNOWN_SECONDS = 10.0
ZYGOTES = pytest.StashKey[ExitStack]()

# Packed and plain weights differ in the last bit, and which are faster is measured: all servers of tests have the same.
os.environ["WHIFLASH_PACK_WEIGHTS"] = "1"
server.spawn = zygote.spawn

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests that are marked `nightly` too")
    parser.addoption("--record-seconds", action="store_true", help=f"write {SECONDS.name}, which orders the files")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ZYGOTES] = ExitStack()
    if not hasattr(config, "workerinput"):  # for all workers
        config.stash[ZYGOTES].enter_context(zygote.zygotes())


def pytest_unconfigure(config: pytest.Config) -> None:
    if (started := config.stash.get(ZYGOTES, None)) is not None:
        started.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that none of them is what the last worker ends with."""
    seconds = json.loads(SECONDS.read_text())
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), UNKNOWN_SECONDS))
    for item in items:
        for name, limit in LIMITS.items():
            if item.get_closest_marker(name) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(limit))
        nightly = item.get_closest_marker("nightly")
        if nightly and not config.getoption("--nightly"):
            item.add_marker(pytest.mark.skip(reason=f"{nightly.kwargs['reason']}: make test-all"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A unit test is quick; one that cannot be says so (`slow`)."""
    before, num_modules = processor_seconds(), len(sys.modules)
    result = yield
    spent = processor_seconds() - before
    # Whichever test comes first pays for the import of SGLang: that is no work of its own.
    imports = len(sys.modules) - num_modules > 100
    if spent > UNIT_SECONDS and not imports and "unit" in item.path.parts and not item.get_closest_marker("slow"):
        pytest.fail(
            f"a unit test that takes {spent:.1f} s of processor time: make it quicker, or mark it `slow`", False
        )
    return result


def processor_seconds() -> float:
    """Of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was skipped and how to get it; and how long the files took, where that is to be recorded."""
    skipped = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if skipped:
        terminalreporter.section(f"{skipped.total()} skipped, and how to get them")
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
