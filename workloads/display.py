"""What a replay shows on a terminal: a progress bar while it runs (on stderr), notes, and tables of its figures."""

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
    "the server gives no speculation figures (it is not WhiFlash): rounds, drafters, spans and switches are missing"
)


class Display:
    """A context in which turns are counted: as a bar if stderr is a terminal, else only failures are named."""

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
        self.tokens += turn.completion_tokens
        if turn.error is not None:
            self.failed += 1
            where = f"failed: {turn.session_id}, message {turn.index}: {turn.error}"
            self.console.print(where, markup=False)
        said = f"{self.tokens} tokens" + (f", {self.failed} failed" if self.failed else "")
        self.bar.update(self.task, advance=1, said=said)


def notes(figures: Mapping[str, Any], turns: Sequence[Turn]) -> list[str]:
    """What a reader of the figures has to know, one line each."""
    said = []
    if figures["ending"] != "complete":
        how = {"interrupted": "interrupted", "server gone": "ended, as the server does not answer any more"}
        said.append(
            f"{how[figures['ending']]}: {figures['turns']} turns were asked, {figures['not_asked']} were not; "
            f"{figures['whole_sessions']} sessions are whole; the figures are of what was done"
        )
    if figures["rounds"] is None:
        said.append(NO_SPECULATION)
    missing = [turn.missing for turn in turns if turn.missing is not None]
    if missing:
        said.append(f"no speculation figures of {len(missing)} turns (the first: {missing[0]})")
    if figures["length_only"]:
        said.append(length_only(figures))
    if figures["divergences"]:
        said.append(f"live history: {figures['divergences']} replies make another number of calls than recorded")
    return said


def length_only(figures: Mapping[str, Any]) -> str:
    """What the acceptance length is of, where prompts were made up."""
    made_up, others = figures["length_only"], figures["turns"] - figures["length_only"]
    said = f"the prompts of {made_up} turns were made up from lengths and say nothing of acceptance: AL is "
    if figures["acceptance_length"] is None:
        return said + "n/a" + (f", as the other {others} turns have no speculation figures" if others else "")
    return said + f"that of the other {others} turns, and other totals are those of all"


def details(figures: Mapping[str, Any]) -> list[Table]:
    """Latencies, the cache by depth, AL by drafter, span and context, and goodput: each where there is any."""
    tables = [latency_table(figures), depth_table(figures["by_depth"]), speculation_table(figures["speculation"])]
    return [view for view in (*tables, goodput_table(figures["goodput"])) if view is not None and view.row_count]


def latency_table(figures: Mapping[str, Any]) -> Table:
    view = _table("Latency, ms", "", *(f"p{percent}" for percent in PERCENTILES))
    for name, label in zip(LATENCIES, ("TTFT", "TPOT", "ITL", "E2E"), strict=True):
        values = [figures[f"{name}_p{percent}"] for percent in PERCENTILES]
        if values[0] is not None:
            view.add_row(label, *(f"{value:.1f}" for value in values))
    return view


def depth_table(by_depth: Mapping[str, Any]) -> Table:
    view = _table("Prompts by depth", "turn", "turns", "prompt tokens", "cached", "share", "TTFT ms p50")
    for label, found in by_depth.items():
        share = "-" if found["cached_share"] is None else f"{found['cached_share']:.0%}"
        ttft = "-" if found["ttft_ms_p50"] is None else f"{found['ttft_ms_p50']:.0f}"
        counts = (found["turns"], found["prompt_tokens"], found["cached_tokens"])
        view.add_row(label, *map(str, counts), share, ttft)
    return view


def speculation_table(speculation: Mapping[str, Any]) -> Table:
    view = _table("Acceptance length", "of", "", "AL", "rounds", "tokens")
    for kind in ("drafter", "span", "context_kind", "tool"):
        for name, count in speculation[f"by_{kind}"].items():
            al = "-" if count["acceptance_length"] is None else f"{count['acceptance_length']:.2f}"
            view.add_row(kind.replace("_", " "), name, al, str(count["rounds"]), str(count["tokens"]))
    return view


def goodput_table(goodput: Mapping[str, Any] | None) -> Table | None:
    if goodput is None or goodput["share"] is None:
        return None
    limits = ", ".join(f"{name}={limit:g}" for name, limit in goodput["limits"].items())
    view = _table(f"Goodput ({limits})", "turns within", "share", "a second")
    view.add_row(f"{goodput['turns']}", f"{goodput['share']:.1%}", f"{goodput['turns_per_s']}")
    return view


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        view.add_column(column, justify="right" if number else "left")
    return view
