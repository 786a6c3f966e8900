"""A thousand sessions, sixteen at a time: nothing is lost, order is kept, memory does not grow with what is done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pytest

from tests.sessions import session
from tests.stub_server import StubServer

SESSIONS, CONCURRENCY = 1000, 16
MEGABYTE = 2**20


def depths_in_order_of_arrival(stub: StubServer) -> dict[str, list[int]]:
    """By session, whose name is its user's text, the number of messages of each request."""
    found: dict[str, list[int]] = defaultdict(list)
    for body in stub.requests:
        found[body["messages"][1]["content"]].append(len(body["messages"]))
    return found


@pytest.mark.slow  # it plays 2,000 turns
def test_a_thousand_sessions(tmp_path: Path) -> None:
    """In a process of its own, whose memory is looked at after a tenth of the work and at its end."""
    trace = tmp_path / "trace.jsonl"
    with trace.open("w") as out:
        for number in range(SESSIONS):
            made = session(str(number)).model_dump(exclude_none=True)
            made["messages"][1]["content"] = f"session {number}"
            # A kilobyte to carry for each turn, so that keeping what is done would show.
            made["messages"][3]["content"] = "text " * 200
            out.write(json.dumps(made) + "\n")
    command = [sys.executable, "-m", "whiflash_workloads.replay", str(trace), "--concurrency", str(CONCURRENCY)]
    with StubServer() as stub, (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--base-url", stub.base_url, "--no-turn-figures"], stdout=said, stderr=subprocess.STDOUT
        )
        memory = psutil.Process(process.pid)
        early = late = 0
        while process.poll() is None:
            if early == 0 and len(stub.requests) >= SESSIONS // 5:
                early = memory.memory_info().rss
            if early and process.poll() is None:
                late = memory.memory_info().rss or late
            time.sleep(0.05)
    assert process.returncode == 0
    figures = json.loads((tmp_path / "said").read_text().splitlines()[-1])["figures"]
    assert (figures["turns"], figures["failed"], figures["not_asked"]) == (2 * SESSIONS, 0, 0)
    assert (figures["whole_sessions"], figures["completion_tokens"]) == (SESSIONS, 12 * SESSIONS)
    found = depths_in_order_of_arrival(stub)
    assert Counter(map(tuple, found.values())) == {(2, 4): SESSIONS}
    assert stub.most_in_flight <= CONCURRENCY
    assert early > 0 and late > 0
    # Records of 1,800 turns are less than one; a stream or a client kept for each would be ten times as much.
    assert late - early < 4 * MEGABYTE, f"{(late - early) / MEGABYTE:.1f} MB more"
