"""Results of a replay: records of turns, their figures, and a table that compares policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from whiflash_workloads.figures import acceptance_length, by_depth, latencies, percentiles, speculation
from whiflash_workloads.slo import Limits, goodput
from whiflash_workloads.speculation import RequestFigures

Totals = dict[str, Any]
"""The server's counters (`whiflash_sglang/serving/totals.py`): numbers, and dicts of numbers."""
TABLE_WIDTH = 150  # console width in characters, enough for the widest row; also used without a terminal


@dataclass(frozen=True)
class Turn:
    """One requested turn. Times in seconds on the client's clock."""

    session_id: str
    index: int  # of the recorded assistant message
    text: str  # reasoning, content and tool calls, stripped and concatenated
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None  # None without output
    tpot_s: float | None  # None with fewer than two tokens
    cut_turns: int  # oldest recorded turns dropped to fit the context
    shortened: bool  # a message was shortened, because dropping turns was not enough
    error: str | None
    e2e_s: float | None = None
    gaps_s: tuple[float, ...] = ()  # between text chunks; a chunk may have several tokens
    session: int = 0  # number of the session in the run, as ids may repeat
    depth: int = 1  # number of the turn in its session, from 1
    retries: int = 0  # after connections that failed before any output
    speculation: RequestFigures | None = None
    missing: str | None = None  # why a WhiFlash server returned no speculation figures
    length_only: bool = False  # synthetic prompt, meaningless for acceptance


Ending = Literal["complete", "interrupted", "server gone"]


@dataclass(frozen=True)
class Report:
    """The results of one replay."""

    label: str
    turns: tuple[Turn, ...]
    wall_s: float
    totals: Totals | None  # the server's counters over the replay; None without WHIFLASH
    speculates: bool = False  # with any algorithm
    whole_sessions: int = 0  # sessions in which every turn succeeded
    planned_turns: int | None = None  # None: len(turns)
    ending: Ending = "complete"
    divergences: int = 0  # live history: replies whose number of calls differs from the recording
    limits: Limits | None = None  # --slo

    def texts(self) -> dict[tuple[str, int], str | None]:
        """Text by (session, message index); None if the request failed."""
        return {(turn.session_id, turn.index): None if turn.error else turn.text for turn in self.turns}

    def figures(self) -> dict[str, Any]:
        """All figures as plain data, for the JSON line."""
        done = [turn for turn in self.turns if turn.error is None]
        tokens = sum(turn.completion_tokens for turn in done)
        asked = len(self.turns)
        times = [percentiles(name, values) for name, values in latencies(done).items()]
        return {
            "turns": asked,
            "failed": asked - len(done),
            "not_asked": 0 if self.planned_turns is None else self.planned_turns - asked,
            "ending": self.ending,
            "retries": sum(turn.retries for turn in self.turns),
            "wall_s": round(self.wall_s, 3),
            "whole_sessions": self.whole_sessions,
            "sessions_per_hour": round(3600 * self.whole_sessions / self.wall_s, 1) if self.wall_s else None,
            "tokens_per_s": round(tokens / self.wall_s, 2) if self.wall_s else 0.0,
            "completion_tokens": tokens,
            "prompt_tokens": sum(turn.prompt_tokens for turn in done),
            "cached_prompt_tokens": sum(turn.cached_tokens for turn in done),
            "cut_prompts": sum(turn.cut_turns > 0 for turn in self.turns),
            "shortened_prompts": sum(turn.shortened for turn in self.turns),
            "divergences": self.divergences,
            "length_only": sum(turn.length_only for turn in self.turns),
            **{name: value for part in times for name, value in part.items()},
            "goodput": goodput(self.turns, self.wall_s, self.limits) if self.limits else None,
            **self._speculation(),
            "by_depth": by_depth(done),
            **self._acceptance(done),
        }

    def _acceptance(self, done: Sequence[Turn]) -> dict[str, Any]:
        """Acceptance lengths without length-only turns, which the server's counters do not distinguish."""
        if not any(turn.length_only for turn in self.turns):
            return {"speculation": speculation(done, self.totals)}
        found = {"speculation": speculation(done, None)}
        if self.totals is None and not self.speculates and not all(turn.length_only for turn in self.turns):
            return found  # plain decoding: one token per round
        return found | {"acceptance_length": acceptance_length(done)}

    def _speculation(self) -> dict[str, Any]:
        """Figures from the server's counters. `host_share` is the share of time outside model steps."""
        if self.totals is None:
            nothing = dict.fromkeys(("rounds", "rounds_by_drafter", "share_by_drafter", "switches", "host_share"))
            # Without speculation every token is one round; another algorithm's rounds are unknown.
            return {"acceptance_length": None if self.speculates else 1.0} | nothing
        return _counted(self.totals, self.wall_s)


def _counted(totals: Totals, wall_s: float) -> dict[str, Any]:
    rounds = totals["rounds"]
    by_drafter = totals["rounds_by_drafter"]
    # Seconds in model forwards: prefill, verify, drafters, and the read that waits for an asynchronous device.
    steps = ("prefill", "prefill_drafters", "catch_up", "draft", "verify", "read")
    forwards = sum(totals["seconds"][step] for step in steps)
    return {
        "acceptance_length": round(1 + totals["accepted_drafts"] / rounds, 3) if rounds else None,
        "rounds": rounds,
        "rounds_by_drafter": by_drafter,
        "share_by_drafter": {name: round(count / rounds, 3) for name, count in by_drafter.items()} if rounds else {},
        "switches": totals["switches"],
        "host_share": round(1 - forwards / wall_s, 3) if wall_s else None,
    }


def merge(reports: Sequence[Report]) -> Report:
    """Merge the reports of one policy that was measured in several consecutive parts. Raises ValueError if empty."""
    if not reports:
        raise ValueError("merge needs at least one report")
    turns = tuple(turn for report in reports for turn in report.turns)
    counted = [report.totals for report in reports if report.totals is not None]
    totals = sum_of(counted) if counted else None
    planned = [report.planned_turns for report in reports if report.planned_turns is not None]
    return Report(
        label=reports[0].label,
        turns=turns,
        wall_s=sum(report.wall_s for report in reports),
        totals=totals,
        speculates=reports[0].speculates,
        whole_sessions=sum(report.whole_sessions for report in reports),
        planned_turns=sum(planned) if len(planned) == len(reports) else None,
        ending=next((report.ending for report in reports if report.ending != "complete"), "complete"),
        divergences=sum(report.divergences for report in reports),
        limits=reports[0].limits,
    )


def sum_of(parts: Iterable[Totals]) -> Totals:
    """Add counters, by key of nested dicts."""
    result: Totals = {}
    for part in parts:
        for key, value in part.items():
            result[key] = (
                sum_of([result.get(key, {}), value]) if isinstance(value, dict) else result.get(key, 0) + value
            )
    return result


def difference(after: Totals, before: Totals) -> Totals:
    """The difference of two counter snapshots."""
    result: Totals = {}
    for key, value in after.items():
        earlier = before.get(key)
        result[key] = difference(value, earlier or {}) if isinstance(value, dict) else value - (earlier or 0)
    return result


def table(figures_by_label: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with a row per label, `remarks` below. Speedups are relative to label `off`, if present."""
    baseline = figures_by_label.get("off", {}).get("tokens_per_s")
    said = [f"{label}: {remark}" for label, figures in figures_by_label.items() for remark in remarks(figures)]
    view = Table(title="Replay", caption="\n".join(said) or None, caption_justify="left")
    columns = ("policy", "tokens/s", "x off", "AL", "rounds", "by drafter", "switches")
    for column in (*columns, "TTFT ms p50 / p95", "ms/token p50 / p95", "cached", "host", "failed"):
        view.add_column(column, justify="left" if column == "policy" else "right")
    for label, figures in figures_by_label.items():
        shares = figures["share_by_drafter"] or {}
        view.add_row(
            label,
            f"{figures['tokens_per_s']:.1f}",
            f"{figures['tokens_per_s'] / baseline:.2f}" if baseline else "-",
            _shown(figures["acceptance_length"], "{:.2f}"),
            _shown(figures["rounds"]),
            " ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "-",
            _shown(figures["switches"]),
            f"{_shown(figures['ttft_ms_p50'], '{:.0f}')} / {_shown(figures['ttft_ms_p95'], '{:.0f}')}",
            f"{_shown(figures['tpot_ms_p50'], '{:.2f}')} / {_shown(figures['tpot_ms_p95'], '{:.2f}')}",
            f"{figures['cached_prompt_tokens']}",
            _shown(figures["host_share"], "{:.0%}"),
            f"{figures['failed']}",
        )
    return view


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """How prompts differ from the recording, one line each."""
    said, turns = [], figures["turns"]
    if cut := figures["cut_prompts"]:
        said.append(f"{cut} of {turns} prompts were cut to fit the context: their oldest turns were dropped")
    if shortened := figures["shortened_prompts"]:
        said.append(f"{shortened} of {turns} prompts have a shortened message, as dropping turns was not enough")
    if changed := figures.get("changed"):
        kinds = ", ".join(f"{count} x {kind}" for kind, count in changed.items())
        said.append(f"some messages were converted ({kinds}); see docs/traces.md")
    return said


def _shown(value: float | None, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)
