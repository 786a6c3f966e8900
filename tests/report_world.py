"""Synthetic results of replays, without a server: bundled sessions with random rounds.

The text of each turn is split into pieces like tokens. Each policy drafts in its own way; acceptance is random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import whiflash_workloads
from tests.stub_server import figures_of
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.provenance import provenance
from whiflash_workloads.report import Report, Totals, Turn
from whiflash_workloads.results import Result, detail
from whiflash_workloads.schema import AssistantMessage, Session, ToolMessage
from whiflash_workloads.speculation import RequestFigures

TRACES = Path(whiflash_workloads.__file__).parent / "demo" / "traces" / "heldout.jsonl"
TAKEN = {("df", "reasoning"): 0.72, ("df", "tool_call"): 0.93, ("df", "answer"): 0.8}
TAKEN |= {("e3", "reasoning"): 0.86, ("e3", "tool_call"): 0.82, ("e3", "answer"): 0.85}
DRAFTS = {"df": 15, "e3": 5, "none": 0}

Route = Callable[[float, str], str]
POLICIES: dict[str, Route | None] = {
    "off": None,
    "fixed:e3": lambda entropy, span: "e3",
    "fixed:df": lambda entropy, span: "df",
    "entropy": lambda entropy, span: "e3" if entropy > 0.5 else "df",
}


def pieces(message: AssistantMessage) -> list[tuple[str, str]]:
    """(text, span) of every token."""
    parts = [(f"<think>\n{message.reasoning_content}\n</think>\n\n", "reasoning")] if message.reasoning_content else []
    for call in message.tool_calls or ():
        body = f'<tool_call>\n{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}\n</tool_call>'
        parts.append((body, "tool_call"))
    if message.content:
        parts.append((message.content, "answer"))
    cut = r"</?think>|</?tool_call>|\n+|\d| ?[A-Za-z]{1,7}| ?[^\sA-Za-z\d]{1,2}| "
    return [(piece, span) for text, span in parts for piece in re.findall(cut, text)]


def rounds(tokens: list[tuple[str, str]], route: Route, dice: random.Random) -> list[dict[str, Any]]:
    found, at = [], 1
    while at < len(tokens):
        span = tokens[at][1]
        entropy = dice.expovariate(2.2 if span == "reasoning" else 4)
        drafter = route(entropy, span)
        ahead = tokens[at : at + DRAFTS[drafter]]
        taken = next((i for i in range(len(ahead)) if dice.random() > TAKEN[drafter, span]), len(ahead) - 1)
        drafts = [text for text, _ in ahead]
        drafts[taken:] = dice.sample([" the", " order", '":', " customer", "4", " is", " shipped", "\n"], 8)[
            : len(drafts) - taken
        ]
        committed = [text for text, _ in tokens[at : at + taken + 1]]
        scores = {"entropy": round(entropy, 4), "score": round(3 + 2 * dice.random(), 2), "span": span}
        found.append({"drafter": drafter, "drafts": drafts, "accepted": taken, "tokens": committed, **scores})
        at += taken + 1
    return found


def turns(sessions: list[Session], route: Route | None, seed: int, traced: int) -> list[Turn]:
    dice, made = random.Random(seed), []
    for number, session in enumerate(sessions):
        for depth, index in enumerate(session.turns, start=1):
            message, before = session.messages[index], session.messages[index - 1]
            assert isinstance(message, AssistantMessage)
            tokens = pieces(message)
            figures = None
            if route is not None:
                found = rounds(tokens, route, dice)
                figures = figures_of(found, tokens[0][0]) | {"trace": found if len(made) < traced else None}
                of_tool = isinstance(before, ToolMessage)
                figures |= {"context_kind": "tool_output" if of_tool else "user", "tool": None}
            steps = figures["rounds"] if figures else len(tokens)
            gaps = tuple(dice.gauss(0.0095 if figures else 0.005, 0.001) for _ in range(steps))
            ttft_s, prompt = 0.03 + dice.expovariate(100), 500 + 160 * depth
            turn = Turn(
                session_id=session.session_id,
                index=index,
                text="",
                prompt_tokens=prompt,
                cached_tokens=450 if depth == 1 else prompt - 110 - 8 * depth,
                completion_tokens=len(tokens),
                ttft_s=ttft_s,
                tpot_s=sum(gaps) / len(tokens),
                cut_turns=0,
                shortened=False,
                error=None,
                e2e_s=ttft_s + sum(gaps),
                gaps_s=gaps,
                session=number,
                depth=depth,
                speculation=RequestFigures.model_validate(figures) if figures else None,
            )
            made.append(turn)
    return made


def totals(turns: list[Turn]) -> Totals | None:
    known = [turn.speculation for turn in turns if turn.speculation]
    by_drafter = {name: sum(each.rounds_by_drafter.get(name, 0) for each in known) for name in ("df", "e3")}
    return {
        "rounds": sum(by_drafter.values()),
        "rounds_by_drafter": {name: count for name, count in by_drafter.items() if count},
        "accepted_drafts": sum(sum(each.accepted_by_drafter.values()) for each in known),
        "switches": sum(each.switches for each in known),
        "seconds": dict.fromkeys(("prefill", "prefill_drafters", "catch_up", "draft", "verify", "read"), 1.0),
    }


def result(label: str, num_sessions: int = 12, traced: int = 16) -> Result:
    """The content of `--json-out` for this policy."""
    sessions = list(load_traces([TRACES]).sessions[:num_sessions])
    route = POLICIES[label]
    made = turns(sessions, route, seed=7, traced=traced)
    wall_s = sum(turn.e2e_s or 0 for turn in made)
    counted = None if route is None else totals(made)
    report = Report(label, tuple(made), wall_s, counted, route is not None, len(sessions), len(made))
    arguments = {
        "traces": [str(TRACES)],
        "label": label,
        "limit": num_sessions,
        "max_tokens": 256,
        "temperature": 0.0,
        "history": "forced",
        "concurrency": 1,
        "arrivals": None,
        "seed": 0,
        "tool_time": "zero",
        "warm_up": 0,
        "cache_bust": False,
    }
    figures = report.figures() | {"sessions": len(sessions), "skipped": 0}
    line = {"benchmark": "replay", "arguments": arguments, "figures": figures, **provenance()}
    return Result.model_validate(line | {"detail": detail(report, sessions)})
