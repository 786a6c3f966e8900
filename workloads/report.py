"""What a replay found: a record for each turn, a report for each run, and the figures that they come to.

`totals` is the server's own count of rounds (`internal_states[0].whiflash` of `/server_info`), after less before.
Times and tokens are of the turns that were answered; a failed turn is counted and otherwise left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Turn:
    """One recorded assistant turn, asked for again. `started` and `finished` count from the start of the replay."""

    session_id: str
    index: int  # of the assistant message in its session
    text: str  # reasoning, content, and the names and arguments of tool calls
    prompt_tokens: int
    cached_tokens: int | None  # None where the server does not say
    completion_tokens: int
    ttft_s: float | None  # to the first chunk that carries text; None for an empty answer
    tpot_s: float | None  # for each token behind the first; None below two tokens
    started: float
    finished: float
    cut_turns: int  # oldest turns left out of the prompt
    shortened: bool  # a message of the prompt was cut in its middle
    error: str | None


@dataclass(frozen=True)
class Report:
    """One run against one server, or several of the same policy, merged."""

    label: str
    turns: tuple[Turn, ...]
    wall_s: float
    totals: dict[str, Any] | None  # None where the server counts no rounds
    skipped: tuple[str, ...] = ()  # records of the traces that could not be read
    server: dict[str, Any] = field(default_factory=dict)  # what is known of it: version, speculative_algorithm

    @property
    def failed(self) -> tuple[Turn, ...]:
        return tuple(turn for turn in self.turns if turn.error is not None)

    def texts(self) -> dict[tuple[str, int], str]:
        """Text of each answered turn, by session and message index."""
        return {(turn.session_id, turn.index): turn.text for turn in self.turns if turn.error is None}

    def figures(self) -> dict[str, Any]:
        """Plain data for the JSON line and the table; None where a figure is not known."""
        answered = [turn for turn in self.turns if turn.error is None]
        ttft = [1000 * turn.ttft_s for turn in answered if turn.ttft_s is not None]
        tpot = [1000 * turn.tpot_s for turn in answered if turn.tpot_s is not None]
        cached = [turn.cached_tokens for turn in answered if turn.cached_tokens is not None]
        completion_tokens = sum(turn.completion_tokens for turn in answered)
        return {
            "tokens_per_s": round(completion_tokens / self.wall_s, 3) if self.wall_s else None,
            "ttft_ms_p50": percentile(ttft, 50),
            "ttft_ms_p95": percentile(ttft, 95),
            "tpot_ms_p50": percentile(tpot, 50),
            "tpot_ms_p95": percentile(tpot, 95),
            **self._round_figures(),
            "prompt_tokens": sum(turn.prompt_tokens for turn in answered),
            "cached_prompt_tokens": sum(cached) if cached else None,
            "completion_tokens": completion_tokens,
            "wall_s": round(self.wall_s, 3),
            "turns": len(self.turns),
            "failed": len(self.failed),
            "cut_prompts": sum(turn.cut_turns > 0 for turn in self.turns),
            "shortened_prompts": sum(turn.shortened for turn in self.turns),
            "skipped": len(self.skipped),
        }

    def _round_figures(self) -> dict[str, Any]:
        names = ("acceptance_length", "rounds", "rounds_by_drafter", "share_by_drafter", "switches", "host_share")
        figures: dict[str, Any] = dict.fromkeys(names)
        if self.totals is None:
            # Without speculation a step commits one token. Of another algorithm's rounds nothing is known.
            if self.server.get("speculative_algorithm", "unknown") is None:
                figures["acceptance_length"] = 1.0
            return figures
        rounds, by_drafter = self.totals["rounds"], self.totals["rounds_by_drafter"]
        seconds = self.totals["seconds"]
        figures |= {"rounds": rounds, "rounds_by_drafter": by_drafter, "switches": self.totals["switches"]}
        if rounds:
            figures["acceptance_length"] = round(1 + self.totals["accepted_drafts"] / rounds, 4)
            figures["share_by_drafter"] = {name: round(count / rounds, 4) for name, count in by_drafter.items()}
        if seconds["round"]:
            forwards = seconds["draft"] + seconds["verify"] + seconds["ingest"]
            figures["host_share"] = round(1 - forwards / seconds["round"], 4)
        return figures


def merge(reports: Sequence[Report]) -> Report:
    """Runs of one policy as one: wall times and totals add up. A turn in several runs keeps its last text."""
    totals: dict[str, Any] | None = {}
    for report in reports:
        totals = None if totals is None or report.totals is None else added(totals, report.totals)
    return Report(
        label=reports[0].label,
        turns=tuple(turn for report in reports for turn in report.turns),
        wall_s=sum(report.wall_s for report in reports),
        totals=totals,
        skipped=tuple(dict.fromkeys(line for report in reports for line in report.skipped)),
        server=reports[0].server,
    )


def added(first: Mapping[str, Any], second: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Nested counts, added key by key: {"a": 1} and {"a": 2, "b": {"c": 3}} are {"a": 3, "b": {"c": 3}}."""
    result: dict[str, Any] = {}
    for key in (*first, *(key for key in second if key not in first)):
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) or isinstance(b, Mapping):
            result[key] = added(a or {}, b or {}, sign)
        else:
            result[key] = (a or 0) + sign * (b or 0)
    return result


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the two nearest values, as numpy's: [10, 20], 50 is 15."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (ordered[high] - ordered[low]) * (place - low), 3)


# Rows of the table: what it is called, and how it is written.
ROWS = {
    "tokens_per_s": ("output tokens/s", "{:.1f}"),
    "ttft_ms_p50": ("TTFT p50, ms", "{:.1f}"),
    "ttft_ms_p95": ("TTFT p95, ms", "{:.1f}"),
    "tpot_ms_p50": ("time per output token p50, ms", "{:.2f}"),
    "tpot_ms_p95": ("time per output token p95, ms", "{:.2f}"),
    "acceptance_length": ("acceptance length", "{:.2f}"),
    "rounds": ("rounds", "{:,}"),
    "share_by_drafter": ("rounds by drafter", "{}"),
    "switches": ("switches", "{:,}"),
    "host_share": ("host share of a round", "{:.0%}"),
    "prompt_tokens": ("prompt tokens", "{:,}"),
    "cached_prompt_tokens": ("prompt tokens from the cache", "{:,}"),
    "completion_tokens": ("output tokens", "{:,}"),
    "turns": ("turns", "{:,}"),
    "failed": ("failed", "{:,}"),
    "cut_prompts": ("prompts without oldest turns", "{:,}"),
    "shortened_prompts": ("prompts with a shortened message", "{:,}"),
    "skipped": ("records skipped", "{:,}"),
}


def table(figures_by_label: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each label, a row for each figure; a figure that no label knows is left out."""
    view = Table()
    view.add_column("")
    for label in figures_by_label:
        view.add_column(label, justify="right")
    for key, (title, form) in ROWS.items():
        values = [figures.get(key) for figures in figures_by_label.values()]
        if any(value is not None for value in values):
            view.add_row(title, *("-" if value is None else form.format(_written(value)) for value in values))
    return view


def _written(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "\n".join(f"{name} {share:.0%}" for name, share in value.items()) or "-"
    return value
