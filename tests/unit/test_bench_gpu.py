"""What `scripts/bench_gpu.py` is made of: models without weights, forced acceptance, figures and criteria."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from tests.scripts import load_script
from whiflash_sglang.core.accept import accept
from whiflash_sglang.core.types import CatchUp, HostRows, Proposal
from whiflash_sglang.routing.entropy import EntropyScore
from whiflash_sglang.serving.totals import STEPS
from whiflash_sglang.startup.checkpoints import load_drafter_spec, load_target_spec
from whiflash_sglang.startup.safetensors_header import read_headers, weight_bytes
from whiflash_sglang.training import forced_server as forced
from whiflash_sglang.training.dummy_models import QWEN3_8B, TINY, ModelShape, write_models
from whiflash_sglang.training.forced_server import ForcedAcceptance, ForcedChoices, Recording
from whiflash_workloads.gpu import judge
from whiflash_workloads.tokens import Streamed, stream

# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [QWEN3_8B, TINY], ids=["qwen3-8b", "tiny"])
def test_models_without_weights_are_accepted_and_take_no_disk(shape: ModelShape, tmp_path: Path) -> None:
    folders = write_models(tmp_path, shape)
    target = load_target_spec(str(folders.target))
    assert (target.hidden_size, target.num_layers, target.head_dim) == (
        shape.hidden_size,
        shape.num_layers,
        shape.head_dim,
    )
    dflash = load_drafter_spec(str(folders.dflash), "df", target)
    eagle3 = load_drafter_spec(str(folders.eagle3), "e3", target)
    assert (dflash.num_layers, dflash.block_size, dflash.layer_ids) == (
        shape.dflash_depth,
        shape.block_size,
        shape.dflash_layers,
    )
    assert (eagle3.draft_vocab_size, eagle3.layer_ids) == (shape.draft_vocab_size, shape.eagle3_layers)
    taken = sum(512 * file.stat().st_blocks for file in tmp_path.glob("*/model.safetensors"))
    assert taken < 2**20


def test_the_large_shape_is_qwen3_8b_s(tmp_path: Path) -> None:
    folders = write_models(tmp_path, QWEN3_8B)
    assert weight_bytes("--model-path", folders.target) / 2 == 8_190_735_360  # parameters of the published model


@pytest.mark.parametrize("family", ["target", "dflash", "eagle3"])
def test_names_are_those_of_checkpoints_that_were_saved(family: str, tmp_path: Path) -> None:
    """The bundled models tie their head to the embedding, and their EAGLE-3 has the optional `t2d`."""
    written = write_models(tmp_path, replace(TINY, num_layers=8))
    saved = Path(__file__).parents[2] / "whiflash_sglang" / "demo_models" / family
    names = set(read_headers("--model-path", tmp_path / family)) ^ set(read_headers("--model-path", saved))
    assert names <= {"lm_head.weight", "t2d"}
    assert getattr(written, family).is_dir()


# -------------------------------------------------------------------------------------------------- forced acceptance


RECORDING = Recording({5: [1, 0, 0, 0, 0, 3], 15: [0, 0, 2, 2]}, e3_share=0.25, switch_rate=0.3)


def test_a_recording_survives_the_environment() -> None:
    assert Recording.from_environ(RECORDING.to_environ()) == RECORDING


def test_the_table_has_a_row_for_each_length_of_chain() -> None:
    table = RECORDING.table()
    assert len(table) == 16 and {len(row) for row in table} == {16}
    assert table[5] == [1, 0, 0, 0, 0, 3, *[0] * 10]
    assert table[15] == [0, 0, 2, 2, *[0] * 12]
    assert table[0] == table[7] == [1, *[0] * 15], "no drafts, or none that were recorded: none stands"


def test_longer_recorded_chains_count_as_whole_ones() -> None:
    assert Recording({2: [1, 2, 3, 4]}, 0.5, 0.5).table()[2] == [1, 2, 7]


def proposal(num_drafts: list[int], width: int = 16) -> Proposal:
    return Proposal(torch.zeros(len(num_drafts), width, dtype=torch.int64), torch.tensor(num_drafts))


def test_lengths_are_drawn_as_recorded_and_the_same_again() -> None:
    asked = proposal([5] * 400 + [15] * 400 + [0] * 5)
    predictions = torch.arange(805 * 16).view(805, 16)

    def drawn() -> Any:
        return ForcedAcceptance(RECORDING, accept)(asked, predictions)

    found = drawn()
    chains, blocks, none = found.num_committed.split([400, 400, 5])
    assert set(chains.tolist()) == {1, 6} and 0.68 < float((chains == 6).float().mean()) < 0.82
    assert set(blocks.tolist()) == {3, 4} and 0.43 < float((blocks == 4).float().mean()) < 0.57
    assert none.tolist() == [1] * 5
    assert torch.equal(found.tokens, predictions), "the target's own choices"
    assert torch.equal(drawn().num_committed, found.num_committed)


def test_a_round_without_drafts_has_one_column() -> None:
    found = ForcedAcceptance(RECORDING, accept)(proposal([0, 0], width=1), torch.tensor([[7], [8]]))
    assert found.num_committed.tolist() == [1, 1] and found.tokens.tolist() == [[7], [8]]


def test_drafters_are_chosen_and_kept_as_recorded() -> None:
    choices = ForcedChoices(RECORDING)
    chosen = torch.tensor([[choices.draw(slot) for slot in range(50)] for _ in range(400)])[50:]
    assert float(chosen.float().mean()) == pytest.approx(RECORDING.e3_share, abs=0.02)
    assert float((chosen[1:] != chosen[:-1]).float().mean()) == pytest.approx(RECORDING.switch_rate, abs=0.02)


def test_one_drafter_in_every_round() -> None:
    """A recording in which a router never chose the other one."""
    for share, always in ((1.0, True), (0.0, False)):
        choices = ForcedChoices(replace(RECORDING, e3_share=share, switch_rate=0.0))
        drawn = [[choices.draw(slot) for slot in range(5)] for _ in range(5)]
        assert drawn == [[always] * 5] * 5


def test_scores_of_the_rows_are_drawn_before_the_round() -> None:
    score = EntropyScore(4)
    rows = SimpleNamespace(host=HostRows(slots=[1, 3], prefix_lens=[9, 9]))
    seen: list[list[float]] = []
    run = forced.forced_run(lambda decode_round, rows: seen.append([*score.values]), RECORDING)
    for _ in range(30):
        run(SimpleNamespace(router=SimpleNamespace(score=score)), rows)
    assert all(values[0] == values[2] == 0 for values in seen)
    assert {values[slot] for values in seen for slot in (1, 3)} == {forced.FOR_E3, forced.FOR_DF}
    run(SimpleNamespace(router=SimpleNamespace()), rows)
    assert len(seen) == 31, "a router without a score is left alone"


def test_a_step_is_timed_with_the_device_waited_for() -> None:
    """On a device that runs behind the host, a part's time would be that of its launches."""
    events: list[str] = []

    class Totals:
        def timed(self, step: str) -> Any:
            return Clock(step)

    class Clock:
        def __init__(self, step: str):
            self.step = step

        def __enter__(self) -> None:
            events.append(f"start {self.step}")

        def __exit__(self, *error: object) -> None:
            events.append(f"stop {self.step}")

    Totals.timed = forced.synchronized(Totals.timed, lambda: events.append("wait"))  # type: ignore[method-assign]
    with Totals().timed("draft"):
        events.append("launch")
    assert events == ["wait", "start draft", "launch", "wait", "stop draft"]
    ingest = forced.synchronized_ingest(lambda *args: CatchUp([1], [2], [0], -1.0), lambda: events.append("wait"))
    assert ingest(None, "df", [1], [9]).seconds >= 0
    assert forced.synchronized_ingest(lambda *args: None, lambda: None)(None, "df", [], []) is None


# ------------------------------------------------------------------------------------------------------------ figures


def counted(**seconds: float) -> dict[str, Any]:
    return {
        "seconds": dict.fromkeys(STEPS, 0.0) | seconds,
        "steps": 10,
        "rounds": 20,
        "accepted_drafts": 50,
        "rounds_by_drafter": {"e3": 20},
        "switches": 2,
        "catch_up": {"ms": 4.0},
    }


def test_a_round_by_part() -> None:
    found = judge.round_figures(
        counted(
            round=0.1,
            route=0.001,
            catch_up=0.01,
            draft=0.02,
            verify=0.05,
            commit=0.009,
            between=0.007,
        )
    )
    assert found["ms"] == {
        "route": 0.1,
        "catch-up": 1.0,
        "draft": 2.0,
        "verify": 5.0,
        "commit": 0.9,
        "host": 1.0,
        "round": 10.0,
        "between": 0.7,
    }
    assert (found["switching_share"], found["router_share"]) == (0.05, 0.01)
    assert (found["rows"], found["acceptance_length"]) == (2.0, 3.5)


def test_speed_by_span_goes_by_arrivals() -> None:
    """Tokens that come at once share the time since those before; the first ones are the prefill's."""
    text = Streamed([*range(8)], [0.5, *[0.512] * 6, 0.514], {})
    found = judge.by_span(text, ["reasoning"] * 3 + ["answer"] * 5)
    assert found["reasoning"].tokens == 2 and found["reasoning"].seconds == pytest.approx(0.004)
    assert found["answer"].tokens == 5 and found["answer"].seconds == pytest.approx(0.010)
    assert judge.speeds([found, found]) == {"reasoning": 500.0, "answer": 500.0}
    assert judge.by_span(Streamed([], [], {}), []) == {}


def test_acceptance_length_is_of_the_texts_tokens() -> None:
    """Of a text of 7 tokens in 2 rounds and one that ended in its prefill; not of what a server says was accepted."""
    texts = [
        Streamed([5] * 7, [0.1] * 7, {"spec_verify_ct": 2, "spec_correct_drafts_histogram": [0, 0, 0, 0, 0, 2]}),
        Streamed([2], [0.1], {}),
    ]
    assert judge.acceptance_length(texts) == 3.0
    assert judge.acceptance_length([Streamed([5, 6], [0.1, 0.2], {})]) is None


def test_histograms_of_texts_add_up() -> None:
    texts = [Streamed([], [], {"spec_correct_drafts_histogram": own}) for own in ([1, 2], [0, 0, 3])]
    assert judge.histogram(texts) == [1, 2, 3]
    assert judge.histogram([Streamed([], [], {})]) == []


def test_a_streamed_text_has_a_time_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece carries the whole text so far; tokens that come with it came at once."""
    pieces = [[5], [5, 6, 7], [5, 6, 7], [5, 6, 7, 8]]
    lines = [f"data: {json.dumps({'output_ids': ids, 'meta_info': {'n': len(ids)}})}" for ids in pieces]

    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["stream"] is True
        return httpx.Response(200, text="\n\n".join([*lines, "data: [DONE]", ""]))

    client = httpx.Client(transport=httpx.MockTransport(answer))
    options = ("json",)

    def streamed(method: str, url: str, **given: Any) -> Any:
        return client.stream(method, url, **{name: given[name] for name in options})

    monkeypatch.setattr(httpx, "stream", streamed)
    found = stream("http://test", [1, 2], 4)
    assert found.tokens == [5, 6, 7, 8] and found.about == {"n": 4}
    first, second, third, last = found.arrivals_s
    assert first < second == third < last


# ----------------------------------------------------------------------------------------------------------- criteria


def policy(speed: float, answer: float, equal: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens_per_s": speed, "acceptance_length": 5.0, "by_span": {"answer": answer}}
    if equal is not None:
        found["texts"] = {"prompts": 200, "equal": equal, "unexplained": [{}] * (equal < 198)}
    return found


def acceptance() -> dict[str, Any]:
    policies = {
        "off": policy(50, 50),
        "fixed:e3": policy(98, 90, 200),
        "fixed:df": policy(116, 150, 199),
        "entropy": policy(125, 170, 199),
        "neural": policy(126, 172, 198),
        "EAGLE3": policy(100, 100, 12),
        "DFLASH": policy(120, 120, 12),
    }
    return {"models": "some", "policies": policies, "notes": ["A note."], "recording": {}}


def shapes() -> dict[str, Any]:
    cell = judge.round_figures(counted(round=0.1, draft=0.02, verify=0.05))
    cells = {
        router: {
            "1 x 1024": cell | {"switching_share": 0.01, "router_share": 0.002},
            "4 x 1024": cell | {"switching_share": 0.04, "router_share": 0.02},
            "64 x 32768": {"skipped": "too many KV tokens"},
        }
        for router in ("entropy", "alternate")
    }
    ttft = {"prompt_tokens": 8192, "ms": {"off": 100.0, "entropy": 104.0}, "over_off": 1.04}
    return {"models": "some", "rounds": cells, "tokens_per_s": {"EAGLE3": 3.0}, "ttft": ttft}


def soaked(**others: Any) -> dict[str, Any]:
    checks = {**dict.fromkeys(judge.FAULTS, True), "memory_flat": False}
    about = {"models": "some", "minutes": 5.0, "requests": 70, "rounds_by_drafter": {"df": 5, "e3": 4}}
    return {**about, "checks": checks, "failures": [], "sanitizer": None, **others}


def test_criteria() -> None:
    found = judge.criteria(shapes(), acceptance(), soaked(sanitizer=0))
    assert list(found) == list(judge.LIMITS)
    values = [judged["value"] for judged in found.values()]
    assert values == [0.98, 0.9667, 1.05, 1.72, 1.4333, 0.04, 0.04, 0.02, 1.04, 0.99, 0, 0, 0]
    holds = [judged["holds"] for judged in found.values()]
    assert holds == [True, False, True, True, True, False, True, False, True, True, True, True, True]
    assert json.loads(json.dumps(found)) == found


def test_what_was_not_measured_is_not_judged() -> None:
    assert {judged["holds"] for judged in judge.criteria(None, None).values()} == {None}
    on_a_cpu = acceptance()
    del on_a_cpu["policies"]["EAGLE3"], on_a_cpu["policies"]["DFLASH"]
    found = judge.criteria(None, on_a_cpu)
    assert [judged["holds"] for judged in found.values()] == [None] * 9 + [True, True, None, None]


def test_a_text_that_nothing_excuses_fails() -> None:
    different = acceptance()
    different["policies"]["neural"] = policy(126, 172, 190)
    *_, share, unexplained, _, _ = judge.criteria(None, different).values()
    assert (share["value"], share["holds"], unexplained["value"], unexplained["holds"]) == (0.95, False, 1, False)


@pytest.mark.parametrize(
    "others, values, holds",
    [
        ({}, [0, None], [True, None]),
        ({"checks": {**dict.fromkeys(judge.FAULTS, True), "healthy": False}}, [1, None], [False, None]),
        ({"checks": None, "sanitizer": 86}, [1, 86], [False, False]),
        ({"sanitizer": -11}, [0, 11], [True, False]),
    ],
)
def test_faults_of_a_soak_are_counted(others: dict[str, Any], values: list[Any], holds: list[Any]) -> None:
    """Of a short run memory says nothing; a run without a result is a fault, and so is a tool that was killed."""
    *_, faults, sanitizer = judge.criteria(None, None, soaked(**others)).values()
    assert [faults["value"], sanitizer["value"]] == values
    assert [faults["holds"], sanitizer["holds"]] == holds
    page = judge.markdown({**line(), "soak": soaked(**others)})
    assert ("without a result" if others.get("checks", 1) is None else "70 requests; rounds: 5 of df, 4 of e3.") in page


def line() -> dict[str, Any]:
    found = {"shapes": shapes(), "acceptance": acceptance(), "soak": soaked()}
    hardware = {"gpu": "Some GPU", "cpu": "some CPU"}
    return {"criteria": judge.criteria(**found), **found, "commit": "abc", "hardware": hardware}


def test_the_page_has_every_criterion_cell_and_policy() -> None:
    page = judge.markdown(line())
    for said in (*judge.LIMITS, "Some GPU", "entropy | 64 x 32768", "too many KV tokens", "A note.", "199 of 200"):
        assert said in page
    assert "| DFLASH | 120 | 5 | 120 | 12 of 200 |" in page
    for table in page.split("\n\n"):
        if table.startswith("|"):
            assert len({row.count("|") for row in table.splitlines()}) == 1, "rows as wide as their head"


def test_the_page_of_one_part() -> None:
    page = judge.markdown(
        {**line(), "shapes": None, "acceptance": None, "soak": None, "criteria": judge.criteria(None, None)}
    )
    assert page.count("not measured") == len(judge.LIMITS) and "##" in page


# ------------------------------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("transformers")
    return load_script("bench_gpu")


def test_flags_of_servers_stand_behind_two_dashes(script: Any) -> None:
    args = script.parse(["--tiny", "--batches", "2", "--", "--attention-backend", "triton"])
    assert args.server_flags == ["--attention-backend", "triton"] and args.batches == [2]


def test_every_server_of_the_bundled_models_gets_those_flags(script: Any) -> None:
    """SGLang's own too, and the type that `--demo` names: its default is another."""
    models = load_script("bench_gpu_models").demo(script.parse(["--tiny", "--", "--attention-backend", "triton"]))
    for flags in (models.launcher_flags, models.flags):
        assert flags[-2:] == ("--attention-backend", "triton")
    assert models.launcher_flags[0] == "--demo" and "--dtype=float32" in models.flags


def test_a_machine_without_an_accelerator_is_told_so(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.cpu, "activate", lambda: "a platform")
    with pytest.raises(SystemExit):
        script.parse([])
    assert "--tiny" in capsys.readouterr().err


def test_the_bundled_recording_is_forced_on_chains_of_either_length(script: Any) -> None:
    recording = script.recorded(script.RECORDED, 5, 15)
    assert set(recording.acceptance) == {5, 15} and not recording.synchronize
    assert 1 < script.mean_length(recording, 5) < 6 and 1 < script.mean_length(recording, 15) < 16
    with pytest.raises(SystemExit, match="cannot be distinguished"):
        script.recorded(script.RECORDED, 7, 7)


def test_results_are_a_recording_too(script: Any, tmp_path: Path) -> None:
    recording = {"e3": [1, 2], "df": [3], "e3_share": 0.4, "switch_rate": 0.1}
    (tmp_path / "gpu.json").write_text(json.dumps({"shapes": None, "acceptance": {"recording": recording}}))
    assert script.recorded(tmp_path / "gpu.json", 5, 15) == Recording({5: [1, 2], 15: [3]}, 0.4, 0.1)


def test_a_random_router_fits_its_models(script: Any, tmp_path: Path) -> None:
    from whiflash_sglang.routing.artefact import load_router

    paths = script.ModelPaths(*write_models(tmp_path, TINY), 5)
    script.random_router(tmp_path / "router", paths)
    found = load_router(str(tmp_path / "router"), paths.identity(), None, None)
    assert found.network.weight_in.shape == (64, TINY.hidden_size)


def test_every_router_that_learns_is_served_what_it_needs(script: Any, tmp_path: Path) -> None:
    """Of the shapes' routers: the bundled artefact is of other models and would be refused."""
    assert set(judge.ROUTERS) < set(script.SHAPE_ROUTERS) and script.parse(["--tiny"]).routers == script.SHAPE_ROUTERS
    for name in script.SHAPE_ROUTERS:
        named = [flag for flag in script.router_flags(name, tmp_path) if "neural-router-path" in flag]
        assert named == [f"--whiflash-neural-router-path={tmp_path}"] * (name == "neural")


def test_the_soak_has_drafters_take_turns(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []

    def run(*arguments: str) -> None:
        told.append(arguments)
        (results,) = [flag.partition("=")[2] for flag in arguments if flag.startswith("--results=")]
        Path(results).write_text(json.dumps({"checks": soaked()["checks"], "requests": 3, "whiflash": {}}))
        raise subprocess.CalledProcessError(1, arguments)  # as it does where a check is false

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "has_accelerator", lambda: False)
    found = script.soak(script.parse(["--tiny"]), script.CPU, tmp_path)
    (arguments,) = told
    flags = load_script("soak").parse(arguments[1:])
    assert (flags.router, flags.minutes, flags.models) == ("alternate", script.TINY_SOAK_MINUTES, ["--demo"])
    assert found["checks"]["memory_flat"] is False and found["requests"] == 3 and found["sanitizer"] is None
    monkeypatch.setattr(script, "run", lambda *arguments: None)
    assert script.soak(script.parse(["--tiny"]), script.CPU, tmp_path / "none")["checks"] is None


def test_the_sanitizer_is_used_where_it_is(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.sanitize() is None
    for status in (0, 86):
        tool = tmp_path / script.SANITIZER
        tool.write_text(f'#!/bin/sh\n[ "$1" = --error-exitcode=86 ] && exit {status}\n')
        tool.chmod(0o755)
        assert script.sanitize() == status


def test_prompts_of_noise_are_ordinary_tokens(script: Any) -> None:
    tokens = script.noise(random.Random(1), 50)
    assert len(tokens) == 50 and set(tokens) <= set(script.ORDINARY) and tokens != script.noise(random.Random(2), 50)


def test_the_picture_needs_one_part_only(script: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, parts in enumerate([line(), {**line(), "shapes": None}, {**line(), "acceptance": None}]):
        script.picture(parts, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
