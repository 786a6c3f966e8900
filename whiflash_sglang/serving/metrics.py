"""The totals as Prometheus metrics `whiflash_*`, shown by SGLang's `/metrics` next to its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from operator import itemgetter as at
from typing import Any

from whiflash_sglang.core.spans import CONTEXT_KINDS, SPANS
from whiflash_sglang.serving.totals import STEPS, Totals
from whiflash_sglang.serving.trace import NOBODY

Figures = Mapping[str, Any]
"""`Totals.snapshot()`."""


def _each(split: str, field: str) -> Callable[[Figures], dict[str, int]]:
    return lambda figures: {name: count[field] for name, count in figures[f"by_{split}"].items()}


# Name, label in addition to the server's, description, and its value in the figures, or its values by label.
COUNTERS: tuple[tuple[str, str | None, str, Callable[[Figures], Any]], ...] = (
    ("rounds", "drafter", "Decode rounds of requests.", at("rounds_by_drafter")),
    ("drafted_tokens", "drafter", "Draft tokens proposed.", at("drafted_by_drafter")),
    ("accepted_tokens", "drafter", "Draft tokens accepted.", at("accepted_by_drafter")),
    ("ingested_tokens", "drafter", "Tokens ingested by a drafter while decoding.", at("ingested_by_drafter")),
    ("failed_drafts", "drafter", "Request rounds with NaN or infinity in the drafts.", at("failed_by_drafter")),
    ("catch_up_tokens", None, "Ingested tokens that an idle drafter had missed.", lambda of: of["catch_up"]["tokens"]),
    ("catch_up_passes", None, "Catch-ups of a drafter with a request.", lambda of: of["catch_up"]["passes"]),
    ("catch_up_seconds", None, "Wall time of catch-up passes.", lambda of: of["catch_up"]["ms"] / 1000),
    ("switches", None, "Request rounds whose drafter differs from the round before.", at("switches")),
    ("step_seconds", "step", "Wall time by step of a round, including prefill steps.", at("seconds")),
    ("span_rounds", "span", "Decode rounds of requests by the span in which they began.", _each("span", "rounds")),
    ("span_tokens", "span", "Tokens committed by these rounds.", _each("span", "tokens")),
    (
        "context_rounds",
        "context_kind",
        "Decode rounds of requests by what their prompts end with.",
        _each("context", "rounds"),
    ),
    ("context_tokens", "context_kind", "Tokens committed by these rounds.", _each("context", "tokens")),
)
GAUGES: tuple[tuple[str, str | None, str, Callable[[Figures], Any]], ...] = (
    ("backlog_max_tokens", None, "Longest backlog of a drafter at a catch-up.", at("backlog_max")),
    ("kv_pool_tokens", "kind", "KV tokens in the pool, and lost to draft pools.", at("kv_pool")),
    (
        "not_drafted_share",
        None,
        "Share of recent rows for which drafting did not pay off.",
        at("not_drafted_share"),
    ),
    (
        "round_costs_wrong",
        None,
        "Rounds that took twice or half the time measured at startup.",
        lambda of: of["round_costs"].get("wrong", 0),
    ),
    (
        "drafter_switched_off",
        "drafter",
        "1 if the drafter is switched off after producing NaN for several requests.",
        at("switched_off"),
    ),
)


class Metrics:
    """Writes totals to the metrics, at most once per `INTERVAL_S`. `labels`: those of this server."""

    INTERVAL_S = 1.0

    def __init__(self, totals: Totals, labels: Mapping[str, str]):
        # Lazy: SGLang must first set the folder for multi-process metrics.
        from prometheus_client import Counter, Gauge

        self.totals = totals
        self.labels = [*labels.values()]
        self.shown: dict[tuple[str, str], float] = {}
        self.next_update = 0.0
        self.metrics = {
            name: kind(f"whiflash_{name}", text, [*labels, *([label] if label else [])])
            for kind, metrics in ((Counter, COUNTERS), (Gauge, GAUGES))
            for name, label, text, _ in metrics
        }
        # Every series exists from startup: one that appears with its first count would lose that count in rates.
        drafters = totals.drafter_names
        known = {"step": STEPS, "span": SPANS, "context_kind": CONTEXT_KINDS, "kind": (), None: ("",)}
        self.zeros = {
            name: dict.fromkeys({"drafter": names, **known}[label], 0)
            for names, metrics in (((*drafters, NOBODY), COUNTERS), (drafters, GAUGES))
            for name, label, _, _ in metrics
        }
        self.write(totals.snapshot())

    def update(self, at_once: bool = False) -> None:
        """Update the metrics, at most once per `INTERVAL_S`, or `at_once` if no round may follow."""
        now = time.monotonic()
        if now < self.next_update and not at_once:
            return
        self.next_update = now + self.INTERVAL_S
        self.write(self.totals.snapshot())

    def write(self, figures: Figures) -> None:
        """Set the metrics to these figures."""
        for name, _, _, read in (*COUNTERS, *GAUGES):
            found = read(figures)
            for label, value in {**self.zeros[name], **(found if isinstance(found, Mapping) else {"": found})}.items():
                metric = self.metrics[name].labels(*self.labels, *([label] if label else []))
                if hasattr(metric, "set"):
                    metric.set(value)
                else:
                    metric.inc(value - self.shown.get((name, label), 0))
                    self.shown[name, label] = value
