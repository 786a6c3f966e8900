"""An HTML report of replays: policies side by side, and the text of turns token by token.

    python -m whiflash_workloads.html_report RESULT.json... --out out.html

A RESULT is a file of `python -m whiflash_workloads.replay ... --json-out FILE`: one policy, named by its `--label`. The
page is self-contained and works offline. `templates/` has its HTML, style and script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from whiflash_workloads.charts import Bar, Panel, bars, number, panel
from whiflash_workloads.display import length_only
from whiflash_workloads.figures import depth_labels
from whiflash_workloads.printing import to_readers
from whiflash_workloads.report import remarks
from whiflash_workloads.results import Arguments, Result, ResultError, View, read

LATENCIES = {
    "ttft_ms": "Time to first token (TTFT), ms",
    "tpot_ms": "Time per output token (TPOT), ms",
    "itl_ms": "Inter-chunk latency (ITL), ms",
    "e2e_ms": "Whole turn (E2E), ms",
}
GROUPS = {
    "by_span": "by span",
    "by_drafter": "by drafter",
    "by_context_kind": "by context",
    "by_tool": "by tool",
}
DRAFTERS = {"df": "DFlash", "e3": "EAGLE-3", "none": "no drafts"}
NAMES = {"tool_call": "tool call", "tool_output": "tool output", "user": "user message"} | DRAFTERS
# Arguments that must be equal for policies to be comparable.
SAME = [name for name in Arguments.model_fields if name != "label"]


def render(results: Sequence[Result]) -> str:
    """The HTML page. Raises ResultError if two results have the same label."""
    labels = [result.arguments.label for result in results]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ResultError(f"RESULT: two have the label `{twice}`; replay with a unique --label for each")
    environment = Environment(
        loader=PackageLoader("whiflash_workloads"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"drafter": drafter_class, "named": lambda name: NAMES.get(name, name)}
    by_label = dict(zip(labels, results, strict=True))
    return environment.get_template("report.html").render(
        facts=facts(results),
        warnings=warnings(by_label),
        headline=headline(by_label),
        policies=[policy(label, result, by_label) for label, result in by_label.items()],
        limits=shown_limits(by_label),
        acceptance=acceptance(by_label),
        latencies=[found for found in latency_panels(by_label) if found.strips],
        depths=depths(by_label),
        num_views=len(views(by_label)),
        # Inside a script element only `<` needs escaping.
        data=Markup(json.dumps({"turns": views(by_label), "names": NAMES}).replace("<", "\\u003c")),
    )


def facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Facts about the first result's replay; `warnings` lists differences of the others."""
    first = results[0]
    said, figures = first.arguments, first.figures
    at_a_time = said.concurrency or 1
    closed = f"{at_a_time} session{'s' if at_a_time > 1 else ''} at a time"
    load = f"arrivals {said.arrivals}" if said.arrivals else closed
    return [
        ("traces", ", ".join(Path(name).name for name in said.traces)),
        ("sessions", f"{figures['sessions']}, {figures['turns']} turns"),
        ("load", f"{load}, tool time {said.tool_time}, {said.history} history"),
        ("sampling", f"temperature {said.temperature:g}, at most {said.max_tokens} tokens"),
        ("client machine", f"{first.hardware['cpu']}, {first.hardware['cores']} cores"),
        ("versions", f"SGLang {first.versions.get('sglang') or '-'}, commit {(first.commit or '-')[:10]}"),
    ]


def warnings(results: Mapping[str, Result]) -> list[str]:
    """Reasons that limit or prevent a comparison."""
    said = []
    for label, result in results.items():
        figures = result.figures
        if figures["ending"] != "complete":
            said.append(f"{label}: {figures['ending']}; {figures['not_asked']} turns not started")
        said += [f"{label}: {remark}" for remark in remarks(figures)]
        if figures["length_only"]:
            said.append(f"{label}: {length_only(figures)}")
        if figures["failed"]:
            said.append(f"{label}: {figures['failed']} turns failed")
        baseline = figures["acceptance_length"] == 1 and len(results) > 1  # plain decoding
        if figures["rounds"] is None and not baseline:
            said.append(f"{label}: the server reports no speculation figures (it is not WhiFlash)")
    for name in SAME:
        values = {json.dumps(result.arguments.model_dump()[name]) for result in results.values()}
        if len(values) > 1:
            said.append(f"replayed with different settings: --{name.replace('_', '-')} is {', '.join(sorted(values))}")
    return said


def headline(results: Mapping[str, Result]) -> str:
    """The fastest policy in one sentence."""
    speeds = {label: result.figures["tokens_per_s"] for label, result in results.items()}
    label = max(speeds, key=speeds.__getitem__)
    said = f"{label}: {number(speeds[label])} tokens/s"
    if speeds.get("off") and label != "off":
        said += f", {speeds[label] / speeds['off']:.2f} times as fast as without speculation"
    al = results[label].figures["acceptance_length"]
    return said + (f", {al:.2f} tokens a round" if al and al > 1 else "")


def policy(label: str, result: Result, results: Mapping[str, Result]) -> dict[str, Any]:
    """The comparison's row for one policy."""
    figures = result.figures
    off = results["off"].figures["tokens_per_s"] if "off" in results else None
    prompt, goodput = figures["prompt_tokens"], figures["goodput"]

    def bar(of: Callable[[Mapping[str, Any]], float | None], form: Callable[[float], str], best: str) -> Bar:
        found = bars({name: of(other.figures) for name, other in results.items()}, form, best)
        return next(each for each in found if each.label == label)

    def times(name: str) -> dict[str, Any]:
        """p50 as a bar, p95 as text."""
        p95 = figures[f"{name}_p95"]
        p50 = bar(lambda other: other[f"{name}_p50"], number, "min")
        return {"p50": p50, "p95": "n/a" if p95 is None else number(p95)}

    return {
        "label": label,
        "speed": bar(lambda other: other["tokens_per_s"], "{:.1f}".format, "max"),
        "times_off": f"{figures['tokens_per_s'] / off:.2f}" if off else None,
        "al": bar(lambda other: other["acceptance_length"], "{:.2f}".format, "max"),
        "ttft": times("ttft_ms"),
        "tpot": times("tpot_ms"),
        "e2e": times("e2e_ms"),
        "sessions_per_hour": number(figures["sessions_per_hour"] or 0.0),
        "cached": f"{figures['cached_prompt_tokens'] / prompt:.0%}" if prompt else "n/a",
        "goodput": f"{goodput['share']:.0%}" if goodput and goodput["share"] is not None else "n/a",
        "mix": [(name, round(100 * share, 1)) for name, share in (figures["share_by_drafter"] or {}).items() if share],
        "switches": figures["switches"],
    }


def shown_limits(results: Mapping[str, Result]) -> str | None:
    """The --slo limits of all policies; None without any."""
    found = [result.figures["goodput"]["limits"] for result in results.values() if result.figures["goodput"]]
    texts = sorted({", ".join(f"{name}={limit:g}" for name, limit in limits.items()) for limits in found})
    return "; ".join(texts) or None


def acceptance(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """AL charts by span, drafter, context and tool; one group of bars per value."""
    charts = []
    for key, title in GROUPS.items():
        parts = {label: result.figures["speculation"][key] for label, result in results.items()}
        found = {
            (label, name): (count["acceptance_length"], count["rounds"])
            for label, counts in parts.items()
            for name, count in counts.items()
        }
        drawn = bars({f"{name}\n{label}": al for (label, name), (al, _) in found.items()}, "{:.2f}".format)
        by_place = {each.label: each for each in drawn}
        groups = [
            {
                "name": name,
                "bars": [
                    {"label": label, "bar": by_place[f"{name}\n{label}"], "rounds": found[label, name][1]}
                    for label in results
                    if (label, name) in found
                ],
            }
            for name in dict.fromkeys(name for _, name in found)
        ]
        if groups:
            charts.append({"title": title, "groups": groups})
    return charts


def latency_panels(results: Mapping[str, Result]) -> list[Panel]:
    """One panel per latency, with a strip for each policy."""
    return [
        panel(title, {label: result.detail.quantiles.get(name, []) for label, result in results.items()})
        for name, title in LATENCIES.items()
    ]


def depths(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Per policy, columns of mean prompt tokens by turn number, with their cached share."""
    means = {
        (label, name): (found["prompt_tokens"] / found["turns"], found)
        for label, result in results.items()
        for name, found in result.figures["by_depth"].items()
    }
    top = max((mean for mean, _ in means.values()), default=0.0) or 1.0
    return [
        {
            "label": label,
            "columns": [
                {
                    "name": name,
                    "height": round(100 * means[label, name][0] / top, 1),
                    "cached": round(100 * (means[label, name][1]["cached_share"] or 0), 1),
                    "tokens": number(means[label, name][0]),
                    "turns": means[label, name][1]["turns"],
                    "ttft": means[label, name][1]["ttft_ms_p50"],
                }
                for name in depth_labels()
                if (label, name) in means
            ],
        }
        for label in results
    ]


def views(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The traced turns, each with the rounds of every policy."""
    turns: dict[tuple[str, int], dict[str, Any]] = {}
    for label, result in results.items():
        for view in result.detail.views:
            title = f"{view.session_id}, turn {view.depth}"
            turn = turns.setdefault(
                (view.session_id, view.index), {"title": title, "asked": view.asked.model_dump(), "policies": []}
            )
            turn["policies"].append({"label": label, **policy_view(view)})
    return list(turns.values())


def policy_view(view: View) -> dict[str, Any]:
    """One policy's rounds and times of a traced turn."""
    figures = view.figures
    rounds = [each.model_dump() for each in figures.trace or ()]
    return {
        "tokens": view.completion_tokens,
        "ttft_ms": view.ttft_ms,
        "e2e_ms": view.e2e_ms,
        "switches": figures.switches,
        "first": figures.first,
        "rounds": rounds,
    }


def drafter_class(name: str) -> str:
    """The drafter's CSS class; `other` if it is unknown."""
    return name if name in DRAFTERS else "other"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_workloads.html_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="files of --json-out, one per policy")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="output file (HTML)")
    args = parser.parse_args(argv)
    try:
        args.out.write_text(render([read(path) for path in args.results]), encoding="utf-8")
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {args.out}: cannot be written ({error.strerror}); give another file", file=sys.stderr)
        return 2
    with to_readers():
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
