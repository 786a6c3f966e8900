"""Evaluate the measurements of `scripts/bench_gpu.py`: milliseconds by part, speeds by span, criteria, and a Markdown
page. Pure functions from counters and times to plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from whiflash_workloads.bench import route_share, switching_share
from whiflash_workloads.report import Totals
from whiflash_workloads.tokens import Streamed

UPSTREAM = {"fixed:e3": "EAGLE3", "fixed:df": "DFLASH"}  # our policy -> SGLang's algorithm to compare with
ROUTERS = ("entropy", "neural")
PARTS = {
    "route": ("route",),
    "catch-up": ("catch_up",),
    "draft": ("draft",),
    "verify": ("verify",),
    "commit": ("commit",),
}
"""Parts of a round -> the server's steps (`whiflash_sglang/serving/totals.py`). The rest of a round is host time.

`between`, the time from one round to the next, is not part of a round.
"""


# -------------------------------------------------------------------------------------------------------------- rounds


def round_figures(counted: Totals) -> dict[str, Any]:
    """One table cell from a server's counters: `ms` per round by part, the shares for the criteria, and counts."""
    seconds, steps = counted["seconds"], counted["steps"]
    ms = {part: 1000 * sum(seconds[step] for step in own) / steps for part, own in PARTS.items()}
    whole = 1000 * seconds["round"] / steps
    ms |= {"host": whole - sum(ms.values()), "round": whole, "between": 1000 * seconds["between"] / steps}
    return {
        "ms": {part: round(value, 4) for part, value in ms.items()},
        "switching_share": switching_share([counted]),
        "router_share": route_share([counted]),
        "rows": round(counted["rounds"] / steps, 2),  # mean batch size, as requests end one after the other
        "acceptance_length": round(1 + counted["accepted_drafts"] / counted["rounds"], 3),
        "rounds_by_drafter": counted["rounds_by_drafter"],
        "switches": counted["switches"],
    }


# --------------------------------------------------------------------------------------------------------------- texts


class Spent(NamedTuple):
    """Tokens, and the time that they took in seconds."""

    tokens: float = 0.0
    seconds: float = 0.0

    def plus(self, tokens: float, seconds: float) -> Spent:
        """The sum."""
        return Spent(self.tokens + tokens, self.seconds + seconds)


def by_span(streamed: Streamed, spans: Sequence[str]) -> dict[str, Spent]:
    """Tokens and seconds by span of a text; `spans` [tokens]. The first chunk is from the prefill and excluded.

    Tokens of one chunk share the time since the chunk before: of 6 tokens after 12 ms, 2 of them reasoning, reasoning
    gets 2 tokens and 4 ms.
    """
    found: dict[str, Spent] = {}
    arrivals = streamed.arrivals_s
    start = 0
    before: float | None = None
    while start < len(arrivals):
        end = start + arrivals[start:].count(arrivals[start])
        if before is not None:
            each = (arrivals[start] - before) / (end - start)
            for span in spans[start:end]:
                found[span] = found.get(span, Spent()).plus(1, each)
        before, start = arrivals[start], end
    return found


def speeds(spent: Iterable[Mapping[str, Spent]]) -> dict[str, float]:
    """Tokens/s by span over many texts."""
    sums: dict[str, Spent] = {}
    for text in spent:
        for span, part in text.items():
            sums[span] = sums.get(span, Spent()).plus(*part)
    return {span: round(part.tokens / part.seconds, 2) for span, part in sums.items() if part.seconds}


def histogram(texts: Iterable[Streamed]) -> list[int]:
    """How often 0, 1, .. drafts of a round were accepted, over all texts; empty without speculation."""
    counts: list[int] = []
    for text in texts:
        own = text.about.get("spec_correct_drafts_histogram") or []
        counts += [0] * (len(own) - len(counts))
        for accepted, count in enumerate(own):
            counts[accepted] += count
    return counts


def acceptance_length(texts: Sequence[Streamed]) -> float | None:
    """Mean tokens per round over all texts; None without speculation.

    Counted from the texts, because SGLang's own algorithms also count drafts accepted after the end of a text.
    """
    num_rounds = sum(text.about.get("spec_verify_ct", 0) for text in texts)
    num_tokens = sum(len(text.tokens) - 1 for text in texts)  # the first one is the prefill's
    return round(num_tokens / num_rounds, 3) if num_rounds else None


# ------------------------------------------------------------------------------------------------------------ criteria


class Limit(NamedTuple):
    """A criterion: a lower limit, or an upper one if `at_most`."""

    limit: float
    at_most: bool = False

    def judge(self, value: float | None) -> dict[str, Any]:
        """Value, limit and whether it `holds` (None if not measured)."""
        if value is None:
            return {"value": None, "limit": self.limit, "holds": None}
        holds = value <= self.limit if self.at_most else value >= self.limit
        return {"value": round(value, 4), "limit": self.limit, "holds": holds}


LIMITS = {
    "tokens/s of fixed:e3 over SGLang's EAGLE3": Limit(0.97),
    "tokens/s of fixed:df over SGLang's DFLASH": Limit(0.97),
    "tokens/s of the best router over the better of SGLang's": Limit(1.05),
    "tokens/s of a router over EAGLE3 in its best span": Limit(1.70),
    "tokens/s of a router over DFLASH in its best span": Limit(1.37),
    "switching under entropy, share of a round": Limit(0.03, at_most=True),
    "switching under alternate, share of a round": Limit(0.07, at_most=True),
    "routing, share of a round": Limit(0.01, at_most=True),
    "time to the first token of a long prompt, over off": Limit(1.05, at_most=True),
    "share of prompts whose greedy text is that of off": Limit(0.99),
    "texts that differ where no near tie of logits excuses it": Limit(0, at_most=True),
    "faults in a soak of mixed widths": Limit(0, at_most=True),
    "compute-sanitizer over the ingestion kernel, exit status": Limit(0, at_most=True),
}
FAULTS = (
    "every_slot_free_after_each_block",
    "free_slots_as_at_start",
    "no_backlog_left",
    "no_request_failed",
    "healthy",
    "same_texts_as_before",
)
"""Checks of `scripts/soak.py` that must pass for any duration and machine."""


def criteria(
    shapes: Mapping[str, Any] | None, acceptance: Mapping[str, Any] | None, soak: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Every criterion by name: `value`, `limit`, and whether it `holds` (None if not measured).

    Shares of a round are the maximum over batches and contexts. Speeds are from the trained models.
    """
    values = (
        *(_speed_values((acceptance or {}).get("policies", {}))),
        *(_round_values((shapes or {}).get("rounds", {}))),
        ((shapes or {}).get("ttft") or {}).get("over_off"),
        *(_text_values((acceptance or {}).get("policies", {}))),
        *_soak_values(soak),
    )
    return {name: limit.judge(value) for (name, limit), value in zip(LIMITS.items(), values, strict=True)}


def _speed_values(policies: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    total = {name: figures["tokens_per_s"] for name, figures in policies.items()}
    held = [_over(total.get(ours), total.get(theirs)) for ours, theirs in UPSTREAM.items()]
    routed = [total[name] for name in ROUTERS if name in total]
    theirs = [total[name] for name in UPSTREAM.values() if name in total]
    best = _over(max(routed, default=None), max(theirs) if len(theirs) == len(UPSTREAM) else None)
    return [*held, best, *(_best_span(policies, name) for name in UPSTREAM.values())]


def _best_span(policies: Mapping[str, Mapping[str, Any]], upstream: str) -> float | None:
    base = policies.get(upstream, {}).get("by_span", {})
    ratios = [
        speed / base[span]
        for name in ROUTERS
        for span, speed in policies.get(name, {}).get("by_span", {}).items()
        if base.get(span)
    ]
    return max(ratios, default=None)


def _round_values(rounds: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    def largest(share: str, *routers: str) -> float | None:
        cells = (cell for router in routers for cell in rounds.get(router, {}).values() if "ms" in cell)
        return max((cell[share] for cell in cells), default=None)

    switching = [largest("switching_share", router) for router in ("entropy", "alternate")]
    return [*switching, largest("router_share", *ROUTERS)]


def _text_values(policies: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """Criteria on texts; SGLang's own algorithms are excluded."""
    ours = [figures["texts"] for name, figures in policies.items() if "texts" in figures and name[0].islower()]
    if not ours:
        return [None, None]
    return [min(t["equal"] / t["prompts"] for t in ours), sum(len(t["unexplained"]) for t in ours)]


def _soak_values(soak: Mapping[str, Any] | None) -> list[float | None]:
    """Criteria on the soak test. A run without a result counts as one fault; the sanitizer's exit status must be 0."""
    if soak is None:
        return [None, None]
    checks, status = soak.get("checks"), soak["sanitizer"]
    faults = 1 if checks is None else sum(not checks[name] for name in FAULTS)
    return [faults, None if status is None else abs(status)]


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# ---------------------------------------------------------------------------------------------------------------- page


def markdown(line: Mapping[str, Any]) -> str:
    """The JSON line as a Markdown page."""
    hardware = line["hardware"]
    parts = [f"# GPU benchmark\n\n{hardware.get('gpu') or 'no GPU'}; {hardware['cpu']}; commit {line['commit']}"]
    judged = [
        (name, _shown(found["value"]), _limit(LIMITS[name]), {True: "yes", False: "no", None: "not measured"}[held])
        for name, found in line["criteria"].items()
        for held in [found["holds"]]
    ]
    parts.append("## Criteria\n\n" + _table(("criterion", "value", "limit", "holds"), judged))
    if line["shapes"] is not None:
        parts.append(_rounds_page(line["shapes"]))
    if line["acceptance"] is not None:
        parts.append(_speeds_page(line["acceptance"]))
    if line.get("soak") is not None:
        parts.append(_soak_page(line["soak"]))
    return "\n\n".join(parts) + "\n"


def _rounds_page(shapes: Mapping[str, Any]) -> str:
    columns = (*PARTS, "host", "round", "between")
    rows = []
    for router, cells in shapes["rounds"].items():
        for cell, found in cells.items():
            if "ms" in found:
                times = [f"{found['ms'][part]:.3f}" for part in columns]
                shares = [f"{found[share]:.2%}" for share in ("switching_share", "router_share")]
                rows.append((router, cell, *times, *shares, found["acceptance_length"]))
            else:
                rows.append((router, cell, *["-"] * len(columns), "-", "-", found["skipped"]))
    head = ("router", "batch x context", *(f"{part}, ms" for part in columns), "switching", "routing", "AL")
    text = f"## A round by part, {shapes['models']}\n\n" + _table(head, rows)
    if shapes.get("tokens_per_s"):
        text += "\n\n" + _table(("policy", "tokens/s at the same acceptance"), shapes["tokens_per_s"].items())
    if shapes.get("ttft"):
        first = ", ".join(f"{name} {ms:.1f} ms" for name, ms in shapes["ttft"]["ms"].items())
        text += f"\n\nTime to the first token of a prompt of {shapes['ttft']['prompt_tokens']} tokens: {first}."
    return text


def _speeds_page(acceptance: Mapping[str, Any]) -> str:
    policies = acceptance["policies"]
    spans = sorted({span for figures in policies.values() for span in figures["by_span"]})
    rows = []
    for name, figures in policies.items():
        texts = figures.get("texts")
        equal = "-" if texts is None else f"{texts['equal']} of {texts['prompts']}"
        by_span = (_shown(figures["by_span"].get(span)) for span in spans)
        rows.append((name, figures["tokens_per_s"], _shown(figures["acceptance_length"]), *by_span, equal))
    head = ("policy", "tokens/s", "AL", *(f"{span}, tokens/s" for span in spans), "texts as off")
    title = f"## Trained models, {acceptance['models']}"
    return "\n\n".join([title, _table(head, rows), *acceptance["notes"]])


def _soak_page(soak: Mapping[str, Any]) -> str:
    title = f"## Soak, {soak['models']}, {soak['minutes']:g} minutes"
    if soak.get("checks") is None:
        return f"{title}\n\nEnded without a result."
    checks = [(name, "yes" if held else "no") for name, held in soak["checks"].items()]
    rounds = ", ".join(f"{count} of {name}" for name, count in soak["rounds_by_drafter"].items())
    return f"{title}\n\n{_table(('check', 'holds'), checks)}\n\n{soak['requests']} requests; rounds: {rounds}."


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _limit(limit: Limit) -> str:
    return f"{'at most' if limit.at_most else 'at least'} {limit.limit:g}"
