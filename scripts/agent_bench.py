"""`make agent-bench`: run the example agent on held-out tasks, with WHIFLASH and without speculation.

    python scripts/agent_bench.py [--tasks N] [--min-solved SHARE] [--results FILE]

Starts two servers with the bundled models: router `entropy`, and `off`. The LangGraph agent of `agents/desk.py` solves
each task on both, greedily, in alternating order, in separate shops with real tools. Tasks are judged by the database
and the facts in the answer (`workloads/demo/tasks.py`), and the two conversations are compared message by message. Wall
time is the agent's, including tools and figures. The last line is JSON; exit status 1 if a conversation differs or
fewer than `--min-solved` of the tasks are solved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.errors import GraphRecursionError
from rich.table import Table

from whiflash_agents.chat import FIGURES, REASONING, ChatWhiFlash
from whiflash_agents.desk import connect, desk_agent, steps
from whiflash_agents.figures import acceptance_length
from whiflash_workloads import server
from whiflash_workloads.demo.tasks import Task, Verdict, heldout_tasks, judge
from whiflash_workloads.printing import Console, to_readers
from whiflash_workloads.provenance import provenance

ON, OFF = "entropy", "off"
MIN_SOLVED = 0.8


@dataclass(frozen=True)
class Run:
    """One task on one server."""

    task: Task
    verdict: Verdict
    messages: tuple[AnyMessage, ...]  # what the agent added
    seconds: float

    @property
    def said(self) -> list[tuple[Any, ...]]:
        """All messages, comparable across runs: without call ids, which are random."""
        return [
            (message.type, message.text, message.additional_kwargs.get(REASONING), _calls(message))
            for message in self.messages
        ]


def do(task: Task, model: ChatWhiFlash) -> Run:
    """Run the agent on `task` in a new session. The answer is empty if the agent does not finish."""
    desk = task.desk()
    agent = desk_agent(model.with_session(), desk)
    messages: list[AnyMessage] = []
    began = time.perf_counter()
    with contextlib.suppress(GraphRecursionError):
        for step in steps(agent, task.question):
            messages.append(step.message)
    seconds = time.perf_counter() - began
    last = messages[-1]
    answer = last.text if isinstance(last, AIMessage) and not last.tool_calls else ""
    return Run(task, judge(task, desk, answer), tuple(messages), seconds)


def measure(models: dict[str, ChatWhiFlash], tasks: Sequence[Task]) -> dict[str, list[Run]]:
    """Run every task on every server, in alternating order."""
    runs: dict[str, list[Run]] = {router: [] for router in models}
    for number, task in enumerate(tasks):
        for router in sorted(models, reverse=number % 2 == 1):
            runs[router].append(do(task, models[router]))
        verdict = runs[ON][-1].verdict
        said = "solved" if verdict.solved else verdict.why
        print(f"{number + 1} of {len(tasks)}, {task.question} {said}", file=sys.stderr, flush=True)
    return runs


def warm_up(url: str, task: Task) -> ChatWhiFlash:
    """Connect to `url`, run `task` uncounted, and flush the cache. Returns the model."""
    model = connect(url)
    do(task, model)
    httpx.post(f"{url}/flush_cache", params={"timeout": 20}, timeout=30).raise_for_status()
    return model


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The figures of the JSON line."""
    on, off = runs[ON], runs[OFF]
    seconds = {router: sum(run.seconds for run in part) for router, part in runs.items()}
    return {
        "tasks": len(on),
        "solved": sum(run.verdict.solved for run in on),
        "exact": sum(run.verdict.exact for run in on),
        "same_as_off": sum(a.said == b.said for a, b in zip(on, off, strict=True)),
        "wall_time_off_over_on": round(seconds[OFF] / seconds[ON], 3),
        "wall_s": {router: round(total, 2) for router, total in seconds.items()},
        "acceptance_length": _acceptance_length(on),
        "solved_by_kind": {
            kind: f"{sum(run.verdict.solved for run in part)} of {len(part)}" for kind, part in _by_kind(on).items()
        },
    }


def table(runs: dict[str, list[Run]]) -> Table:
    """Solved tasks and seconds with and without speculation, by kind of task."""
    result = Table("kind of task", "solved", "exact", "seconds on", "seconds off", "x off")
    off = _by_kind(runs[OFF])
    for kind, part in _by_kind(runs[ON]).items():
        on_s, off_s = (sum(run.seconds for run in some) for some in (part, off[kind]))
        solved, exact = sum(run.verdict.solved for run in part), sum(run.verdict.exact for run in part)
        cells = (f"{solved} of {len(part)}", str(exact), f"{on_s:.2f}", f"{off_s:.2f}", f"{off_s / on_s:.2f}")
        result.add_row(kind, *cells)
    return result


def _calls(message: AnyMessage) -> list[tuple[str | None, Any]]:
    if not isinstance(message, AIMessage):
        return []
    return [(call["name"], call["args"]) for call in (*message.tool_calls, *message.invalid_tool_calls)]


def _by_kind(runs: Sequence[Run]) -> dict[str, list[Run]]:
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.task.kind):
        kinds[run.task.kind].append(run)
    return kinds


def _acceptance_length(runs: Sequence[Run]) -> float | None:
    """Acceptance length over all replies; None without figures."""
    replies = [message for run in runs for message in run.messages if isinstance(message, AIMessage)]
    figures = [reply.response_metadata[FIGURES] for reply in replies]
    if None in figures:
        return None
    whole = {
        "rounds": sum(part["rounds"] for part in figures),
        "accepted_by_drafter": {"all": sum(sum(part["accepted_by_drafter"].values()) for part in figures)},
    }
    length = acceptance_length(whole)
    return None if length is None else round(length, 3)


def start_servers(logs: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """Start both servers in parallel; returns base URLs by router."""
    servers = {}
    for router in (ON, OFF):
        flags = ("--demo", "--whiflash-router", router)
        servers[router] = server.start("whiflash_sglang.launch_server", *flags, log=logs / f"{router}.log")
        stack.callback(servers[router].stop)
    for running in servers.values():
        running.wait_until_ready()
    return {router: running.base_url for router, running in servers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50, help="number of held-out tasks (default: %(default)s)")
    parser.add_argument(
        "--min-solved", type=float, default=MIN_SOLVED, help="required share of solved tasks (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    if args.tasks < 1:
        parser.error(f"--tasks {args.tasks}: give 1 or more")
    server.stop_on_signals()
    *tasks, spare = heldout_tasks(args.tasks + 1)
    logs = Path(tempfile.mkdtemp(prefix="whiflash-agent-bench-"))
    print(f"starting 2 servers (logs in {logs})", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        urls = start_servers(logs, stack)
        runs = measure({router: warm_up(url, spare) for router, url in urls.items()}, tasks)
    figures = summary(runs)
    arguments = {"tasks": args.tasks, "min_solved": args.min_solved}
    line = json.dumps({"benchmark": "agent", "arguments": arguments, **figures, **provenance()})
    if args.results:
        args.results.write_text(line + "\n")
    with to_readers():
        Console(width=100).print(table(runs))
        print(line)
    if figures["same_as_off"] < figures["tasks"]:
        raise SystemExit("error: a conversation differs from `off`; see the logs in " + str(logs))
    if figures["solved"] < args.min_solved * figures["tasks"]:
        raise SystemExit(
            f"error: {figures['solved']} of {figures['tasks']} tasks solved, --min-solved {args.min_solved}"
        )


if __name__ == "__main__":
    main()
