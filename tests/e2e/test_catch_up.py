"""What a WHIFLASH server shows of its drafters in metrics, and how it goes on when one of them fails: servers on the
bundled models, which are all asked for the same texts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from prometheus_client.parser import text_string_to_metric_families

from whiflash_sglang.core.health import REQUESTS
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_workloads.bench import demo_servers
from whiflash_workloads.lossless import generate
from whiflash_workloads.stress.poison import FLAGS, WEIGHTS, with_nan
from whiflash_workloads.tokens import heldout_histories, totals

pytestmark = pytest.mark.e2e

NUM_TOKENS = 64


@dataclass(frozen=True)
class Seen:
    """What a server said and showed."""

    texts: list[list[int]]
    totals: dict[str, Any]
    metrics: dict[str, dict[str, float]]  # name -> value by the label that tells its samples apart, "" where none does
    log: str


def watch(prompts: list[list[int]], base_url: str, log: Path) -> Seen:
    """The texts of a server, first one prompt after the other, then all at once: they must be the same."""
    alone = asyncio.run(generate(base_url, prompts, NUM_TOKENS, in_flight=1))
    together = asyncio.run(generate(base_url, prompts, NUM_TOKENS, in_flight=len(prompts)))
    assert together == alone
    counted = totals(base_url)
    shown = httpx.get(f"{base_url}/metrics", timeout=600, follow_redirects=True).text
    assert counted is not None
    return Seen(alone, dict(counted), ours(shown), log.read_text(errors="replace"))


def ours(text: str) -> dict[str, dict[str, float]]:
    """The samples of WHIFLASH's own metrics."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("whiflash_") else []:
            own = [value for label, value in sample.labels.items() if label in ("drafter", "step", "kind")]
            found.setdefault(sample.name, {})[own[0] if own else ""] = sample.value
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Seen]:
    """By the drafters that have a NaN. Checkpoints are read as they are."""
    folder = tmp_path_factory.mktemp("catch-up")
    broken = {name: (FLAGS[name], str(with_nan(name, DEMO_MODELS, folder))) for name in ("e3", "df")}
    flags = {
        "none": ("--whiflash-router", "random:1"),
        "e3": ("--whiflash-router", "alternate", *broken["e3"]),
        "e3 df": ("--whiflash-router", "alternate", *broken["e3"], *broken["df"]),
    }
    flags = {name: ("--enable-metrics", *own) for name, own in flags.items()}
    prompts = list(islice(chain(*heldout_histories(6)), 6))
    with demo_servers(flags, folder, at_once=True) as urls:
        return {name: watch(prompts, url, folder / f"{name}.log") for name, url in urls.items()}


@pytest.fixture(scope="module")
def healthy(seen) -> Seen:
    return seen["none"]


@pytest.fixture(scope="module", params=["e3", "e3 df"])
def broken(request, seen) -> tuple[list[str], Seen]:
    return request.param.split(), seen[request.param]


def test_metrics_say_what_the_totals_say(healthy):
    counted, shown = healthy.totals, healthy.metrics
    assert set(counted["rounds_by_drafter"]) == {"df", "e3"}
    nought = dict.fromkeys(("df", "e3", "none"), 0)
    assert shown["whiflash_rounds_total"] == nought | counted["rounds_by_drafter"]
    assert shown["whiflash_drafted_tokens_total"] == nought | counted["drafted_by_drafter"]
    assert shown["whiflash_accepted_tokens_total"] == nought | counted["accepted_by_drafter"]
    assert shown["whiflash_ingested_tokens_total"] == nought | counted["ingested_by_drafter"]
    assert shown["whiflash_switches_total"] == {"": counted["switches"]}
    assert shown["whiflash_catch_up_tokens_total"] == {"": counted["catch_up"]["tokens"]}
    assert shown["whiflash_catch_up_passes_total"] == {"": counted["catch_up"]["passes"]}
    assert shown["whiflash_catch_up_seconds_total"][""] == pytest.approx(counted["catch_up"]["ms"] / 1000)
    assert shown["whiflash_backlog_max_tokens"] == {"": counted["backlog_max"]}
    assert shown["whiflash_kv_pool_tokens"] == counted["kv_pool"]
    assert shown["whiflash_step_seconds_total"] == pytest.approx(counted["seconds"])
    assert shown["whiflash_drafter_switched_off"] == {"df": 0.0, "e3": 0.0}


def test_totals_are_those_of_the_texts(healthy):
    """Every token but a request's first comes from a round; each drafter ingests what the rounds committed, no more
    than a last window beyond the texts."""
    counted = healthy.totals
    decoded = 2 * sum(len(text) - 1 for text in healthy.texts)
    committed = counted["rounds"] + counted["accepted_drafts"]
    windows = 2 * len(healthy.texts) * 8
    assert decoded <= committed <= decoded + windows
    assert all(decoded <= tokens <= committed for tokens in counted["ingested_by_drafter"].values())
    assert 0 < counted["catch_up"]["tokens"] <= sum(counted["ingested_by_drafter"].values())
    assert 0 < counted["catch_up"]["passes"] <= counted["switches"] + 2 * 2 * len(healthy.texts)
    assert 0 < counted["backlog_max"] <= NUM_TOKENS + 8


def test_a_drafter_that_yields_nan_is_switched_off_and_the_text_stays(broken, healthy):
    names, seen = broken
    assert seen.texts == healthy.texts
    assert seen.totals["switched_off"] == dict.fromkeys(names, 1)
    assert seen.metrics["whiflash_drafter_switched_off"] == {name: float(name in names) for name in ("df", "e3")}
    lines = [line for line in seen.log.splitlines() if "switched off" in line]
    assert len(lines) == len(names)
    for name in names:
        (line,) = (line for line in lines if f"drafter {name} " in line)
        assert "NaN" in line and WEIGHTS[name][0] in line and "continue with" in line


def test_requests_go_on_without_the_drafter_that_is_off(broken, healthy):
    """It fails each of the first requests once, and then nobody is drafted for by it; rounds go on without drafters."""
    names, seen = broken
    rounds = seen.totals["rounds_by_drafter"]
    failed = dict.fromkeys(names, REQUESTS)
    assert {name: rounds[name] for name in names} == seen.totals["failed_by_drafter"] == failed
    assert {name: seen.metrics["whiflash_failed_drafts_total"][name] for name in names} == failed
    rest = "none" if len(names) == 2 else "df"
    assert rounds[rest] == seen.totals["rounds"] - REQUESTS * len(names)
    if rest == "df":
        assert seen.totals["accepted_by_drafter"]["df"] > rounds["df"]
