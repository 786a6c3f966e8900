"""Terminal output of a replay: a progress bar on stderr, notes, and tables of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from whiflash_workloads.figures import LATENCIES, PERCENTILES
from whiflash_workloads.report import Turn

NO_SPECULATION = (
    "the server reports no speculation figures (it is not WhiFlash): no rounds, drafters, spans and switches"
)


class Display:
    """Context manager for progress: a bar if stderr is a terminal. Failures are always printed."""

    def __init__(self, num_turns: int, console: Console | None = None):
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.tokens = self.failed = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("turns", total=num_turns, said="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, turn: Turn) -> None:
        """Count a finished turn and print its error, if any."""
        self.tokens += turn.completion_tokens
        if turn.error is not None:
            self.failed += 1
            where = f"failed: {turn.session_id}, message {turn.index}: {turn.error}"
            self.console.print(where, markup=False)
        said = f"{self.tokens} tokens" + (f", {self.failed} failed" if self.failed else "")
        self.bar.update(self.task, advance=1, said=said)


def notes(figures: Mapping[str, Any], turns: Sequence[Turn]) -> list[str]:
    """Caveats about the figures, one line each."""
    said = []
    if figures["ending"] != "complete":
        how = {"interrupted": "interrupted", "server gone": "stopped, because the server no longer responds"}
        said.append(
            f"{how[figures['ending']]}: {figures['turns']} turns done, {figures['not_asked']} not started; "
            f"{figures['whole_sessions']} sessions complete; the figures cover what was done"
        )
    if figures["rounds"] is None:
        said.append(NO_SPECULATION)
    missing = [turn.missing for turn in turns if turn.missing is not None]
    if missing:
        said.append(f"no speculation figures for {len(missing)} turns (first reason: {missing[0]})")
    if figures["length_only"]:
        said.append(length_only(figures))
    if figures["divergences"]:
        said.append(f"live history: {figures['divergences']} replies differ from the recording in the number of calls")
    return said


def length_only(figures: Mapping[str, Any]) -> str:
    """Note on the acceptance length if some prompts are synthetic."""
    made_up, others = figures["length_only"], figures["turns"] - figures["length_only"]
    said = f"{made_up} turns have synthetic prompts of recorded lengths, which say nothing about acceptance: AL is "
    if figures["acceptance_length"] is None:
        return said + "n/a" + (f", because the other {others} turns have no speculation figures" if others else "")
    return said + f"over the other {others} turns, other totals are over all"


def details(figures: Mapping[str, Any]) -> list[Table]:
    """Tables that have data: latencies, cache by depth, AL by drafter, span, context and tool, goodput."""
    tables = [latency_table(figures), depth_table(figures["by_depth"]), speculation_table(figures["speculation"])]
    return [view for view in (*tables, goodput_table(figures["goodput"])) if view is not None and view.row_count]


def latency_table(figures: Mapping[str, Any]) -> Table:
    """Percentiles of latencies, in milliseconds."""
    view = _table("Latency, ms", "", *(f"p{percent}" for percent in PERCENTILES))
    for name, label in zip(LATENCIES, ("TTFT", "TPOT", "ITL", "E2E"), strict=True):
        values = [figures[f"{name}_p{percent}"] for percent in PERCENTILES]
        if values[0] is not None:
            view.add_row(label, *(f"{value:.1f}" for value in values))
    return view


def depth_table(by_depth: Mapping[str, Any]) -> Table:
    """Prompt tokens, cached share and TTFT by turn number."""
    view = _table("Prompts by depth", "turn", "turns", "prompt tokens", "cached", "share", "TTFT ms p50")
    for label, found in by_depth.items():
        share = "-" if found["cached_share"] is None else f"{found['cached_share']:.0%}"
        ttft = "-" if found["ttft_ms_p50"] is None else f"{found['ttft_ms_p50']:.0f}"
        counts = (found["turns"], found["prompt_tokens"], found["cached_tokens"])
        view.add_row(label, *map(str, counts), share, ttft)
    return view


def speculation_table(speculation: Mapping[str, Any]) -> Table:
    """Acceptance length by drafter, span, context kind and tool."""
    view = _table("Acceptance length", "of", "", "AL", "rounds", "tokens")
    for kind in ("drafter", "span", "context_kind", "tool"):
        for name, count in speculation[f"by_{kind}"].items():
            al = "-" if count["acceptance_length"] is None else f"{count['acceptance_length']:.2f}"
            view.add_row(kind.replace("_", " "), name, al, str(count["rounds"]), str(count["tokens"]))
    return view


def goodput_table(goodput: Mapping[str, Any] | None) -> Table | None:
    """Turns within the SLO; None without one."""
    if goodput is None or goodput["share"] is None:
        return None
    limits = ", ".join(f"{name}={limit:g}" for name, limit in goodput["limits"].items())
    view = _table(f"Goodput ({limits})", "turns within", "share", "per second")
    view.add_row(f"{goodput['turns']}", f"{goodput['share']:.1%}", f"{goodput['turns_per_s']}")
    return view


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        view.add_column(column, justify="right" if number else "left")
    return view
