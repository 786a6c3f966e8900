"""The figures of `scripts/bench_gpu.py` as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whiflash_workloads.gpu.judge import PARTS


def picture(line: Mapping[str, Any], file: Path) -> None:
    """Plot rounds by part for every router, and tokens/s by span for every policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    views = {"shapes": draw_rounds, "acceptance": draw_speeds}
    measured = [name for name in views if line[name] is not None]
    num_cells = sum(map(len, (line["shapes"] or {}).get("rounds", {}).values()))
    size = (7 * len(measured), max(5, 0.22 * num_cells))
    figure, axes = pyplot.subplots(1, len(measured), figsize=size, layout="constrained", squeeze=False)
    for name, own in zip(measured, axes[0], strict=True):
        views[name](own, line[name])
        own.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_rounds(axes: Any, shapes: Mapping[str, Any]) -> None:
    """Stacked bars of milliseconds by part."""
    bars = [
        (f"{router}, {name}", found["ms"])
        for router, cells in shapes["rounds"].items()
        for name, found in cells.items()
        if "ms" in found
    ]
    behind = [0.0] * len(bars)
    for part in (*PARTS, "host", "between"):
        widths = [ms[part] for _, ms in bars]
        axes.barh([label for label, _ in bars], widths, left=behind, label=part)
        behind = [a + b for a, b in zip(behind, widths, strict=True)]
    axes.set(title="A round by part (router, batch x context)", xlabel="ms")
    axes.invert_yaxis()


def draw_speeds(axes: Any, acceptance: Mapping[str, Any]) -> None:
    """Grouped bars of tokens/s by span."""
    policies = acceptance["policies"]
    spans = sorted({span for found in policies.values() for span in found["by_span"]})
    width = 0.8 / len(policies)
    for i, (name, found) in enumerate(policies.items()):
        places = [place + i * width for place in range(len(spans))]
        axes.bar(places, [found["by_span"].get(span, 0) for span in spans], width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(spans))], spans)
    axes.set(title="Trained models, by span", ylabel="tokens/s")
