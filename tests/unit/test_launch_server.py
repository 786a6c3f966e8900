"""The launcher's command line: what reaches SGLang, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import tiny_models
from whiflash_sglang import launch_server
from whiflash_sglang.core.errors import CheckpointError, ConfigError, WhiFlashError
from whiflash_sglang.launch_server import build_argv
from whiflash_sglang.routing.artefact import NeuralRouter, save_router
from whiflash_sglang.routing.calibration import Calibration, save_calibration
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.neural import Network
from whiflash_sglang.routing.priors import Priors, save_priors
from whiflash_sglang.startup import demo as bundled
from whiflash_sglang.startup.config import ENVIRONMENT_VARIABLE, WhiFlashConfig
from whiflash_workloads.demo.expert import SYSTEM
from whiflash_workloads.demo.world import TOOL_SCHEMAS
from whiflash_workloads.server import free_port


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.TinyModels:
    return tiny_models.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def both(tiny: tiny_models.TinyModels) -> list[str]:
    """A whole command line with both drafters."""
    paths = {"--model-path": tiny.target, "--speculative-draft-model-path": tiny.dflash}
    paths["--whiflash-eagle-draft"] = tiny.eagle3
    return [part for flag, path in paths.items() for part in (flag, str(path))]


@pytest.fixture
def demo(tiny: tiny_models.TinyModels, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the bundled models."""
    monkeypatch.setattr(bundled, "DEMO_MODELS", tiny.target.parent)
    return tiny.target.parent


def value(argv: list[str], flag: str) -> str | None:
    """What argparse would take for `flag`: the last value."""
    found = [argument.partition("=")[2] for argument in argv if argument.startswith(f"{flag}=")]
    found += [argv[i + 1] for i, argument in enumerate(argv) if argument == flag]
    return found[-1] if found else None


def test_both_drafters_and_sglangs_own_flags(tiny: tiny_models.TinyModels, both: list[str]) -> None:
    config, argv = build_argv([*both, "--port", "31000", "--dtype=float32", "--disable-radix-cache"])
    assert config == WhiFlashConfig("df-e3", str(tiny.dflash), str(tiny.eagle3), "entropy")
    assert value(argv, "--model-path") == str(tiny.target)
    assert value(argv, "--speculative-algorithm") == "WHIFLASH"
    assert value(argv, "--speculative-draft-model-path") == str(tiny.dflash)
    assert value(argv, "--speculative-num-draft-tokens") == "8"
    assert argv[1:5] == ["--port", "31000", "--dtype=float32", "--disable-radix-cache"]
    assert not any(argument.startswith("--whiflash") for argument in argv)


def test_one_drafter_fills_sglangs_draft_path(tiny: tiny_models.TinyModels) -> None:
    target = ["--model-path", str(tiny.target)]
    config, argv = build_argv([*target, "--whiflash-drafters", "e3", "--whiflash-eagle-draft", str(tiny.eagle3)])
    assert (config.router, value(argv, "--speculative-draft-model-path")) == ("fixed:e3", str(tiny.eagle3))
    assert value(argv, "--speculative-num-draft-tokens") == "6"
    config, argv = build_argv([*target, "--whiflash-drafters=df", f"--speculative-draft-model={tiny.dflash}"])
    assert (config.router, value(argv, "--speculative-draft-model-path")) == ("fixed:df", str(tiny.dflash))


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        ([], "8"),
        (["--whiflash-eagle-steps", "3"], "8"),
        (["--whiflash-eagle-steps", "12"], "13"),
        (["--speculative-num-draft-tokens", "10"], "10"),
    ],
)
def test_the_verify_width_holds_the_longest_draft(both: list[str], flags: list[str], width: str) -> None:
    assert value(build_argv([*both, *flags])[1], "--speculative-num-draft-tokens") == width


@pytest.mark.parametrize(("drafters", "width"), [("df-e3", 8), ("e3", 6)])
def test_the_backlog_bound_may_be_the_verify_width(
    both: list[str], tiny: tiny_models.TinyModels, drafters: str, width: int
) -> None:
    eagle = ["--model-path", str(tiny.target), "--whiflash-eagle-draft", str(tiny.eagle3)]
    argv = both if drafters == "df-e3" else [*eagle, "--whiflash-drafters", drafters]
    config, _ = build_argv([*argv, "--whiflash-max-backlog", str(width)])
    assert config.max_backlog == width
    with pytest.raises(ConfigError, match=f"--whiflash-max-backlog {width - 1}: below the verify width"):
        build_argv([*argv, "--whiflash-max-backlog", str(width - 1)])


def test_router_off_is_sglang_without_any_speculative_flag(both: list[str], tiny: tiny_models.TinyModels) -> None:
    speculative = [
        "--speculative-attention-mode",
        "decode",
        "--speculative-adaptive",
        "--speculative-algorithm=WHIFLASH",
    ]
    _, argv = build_argv([*both, "--whiflash-router", "off", *speculative, "--port", "31000"])
    assert argv == [f"--model-path={tiny.target}", "--port", "31000"]


def test_router_off_reads_no_drafter() -> None:
    _, argv = build_argv(["--model", "org/name", "--whiflash-router", "off", "--revision", "v1"])
    assert argv == ["--model-path=org/name", "--revision=v1"]


def test_hub_ids_become_folders_and_the_model_keeps_its_name(
    both: list[str], tiny: tiny_models.TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = {"org/target": str(tiny.target), "org/eagle": str(tiny.eagle3), "org/dflash": str(tiny.dflash)}
    asked = []

    def resolve(flag: str, path: str, *, revision: str | None, cache_dir: str | None, patterns: tuple) -> str:
        asked.append((flag, revision, cache_dir))
        return fetched[path]

    monkeypatch.setattr(launch_server.hub, "resolve", resolve)
    flags = ["--revision", "t1", "--speculative-draft-model-revision", "d1", "--download-dir", "/data"]
    models = [
        "--model-path=org/target",
        "--speculative-draft-model-path=org/dflash",
        "--whiflash-eagle-draft=org/eagle",
    ]
    config, argv = build_argv([*models, *flags])
    assert asked == [
        ("--model-path", "t1", "/data"),
        ("--speculative-draft-model-path", "d1", "/data"),
        ("--whiflash-eagle-draft", None, "/data"),
    ]
    assert config.draft_paths == {"df": str(tiny.dflash), "e3": str(tiny.eagle3)}
    assert value(argv, "--model-path") == str(tiny.target)
    assert value(argv, "--served-model-name") == "org/target"
    assert value(argv, "--revision") == "t1"


def test_demo_serves_the_bundled_models(learned: Path, demo: Path) -> None:
    config, argv = build_argv(["--demo"])
    assert config.draft_paths == {"df": str(demo / "dflash"), "e3": str(demo / "eagle3")}
    assert value(argv, "--model-path") == str(demo / "target")
    assert value(argv, "--host") == "127.0.0.1"
    assert value(argv, "--dtype") == "float32"
    assert "--enable-cache-report" in argv


def test_flags_given_beside_demo_win(demo: Path, tiny: tiny_models.TinyModels) -> None:
    given = [
        "--dtype",
        "bfloat16",
        "--context-length=4096",
        "--model-path",
        str(tiny.target),
        "--whiflash-drafters",
        "df",
    ]
    config, argv = build_argv(["--demo", *given])
    assert config.drafter_names == ("df",)
    assert argv.index("--dtype") > argv.index("--dtype=float32")
    assert value(argv, "--context-length") == "4096"


@pytest.fixture
def learned(demo: Path) -> Path:
    """Stand-ins for what was learned about the bundled models, beside them."""
    drafters = {"df": str(demo / "dflash"), "e3": str(demo / "eagle3")}
    identity = Identity.of(str(demo / "target"), drafters, WhiFlashConfig.eagle_steps)
    lengths = {"df": 5.0, "e3": 5.0}
    save_calibration(demo / "calibration.json", Calibration(lengths, 0.1, (0.1,), (-1.0, 1.0), 0.5), identity)
    weights = (torch.zeros(4, identity.hidden_size), torch.zeros(4), torch.zeros(1, 4), torch.zeros(1))
    router = NeuralRouter(Network(*weights), "e3", 0.5, lengths)
    save_router(demo / "router", router, identity, training={}, metrics={})
    save_priors(demo / "priors.json", {"entropy": Priors(), "neural": Priors()}, identity)
    return demo


def test_the_demo_knows_what_was_learned_about_its_models(learned: Path) -> None:
    config, _ = build_argv(["--demo"])
    assert (config.router, config.calibration) == ("entropy", str(learned / "calibration.json"))
    assert config.priors == str(learned / "priors.json")
    assert config.weighs_costs
    config, _ = build_argv(["--demo", "--whiflash-router", "neural"])
    assert config.neural_router_path == str(learned / "router")
    assert config.weighs_costs
    config, _ = build_argv(["--demo", "--whiflash-router", "fixed:e3"])
    assert (config.neural_router_path, config.calibration, config.priors) == (None, None, None)


@pytest.mark.parametrize(
    "flags",
    [
        ["--whiflash-priors", "none"],
        ["--whiflash-objective", "acceptance"],
        ["--whiflash-entropy-threshold", "0.3"],
    ],
)
def test_no_priors_where_they_are_not_wanted_or_do_not_fit(learned: Path, flags: list[str]) -> None:
    config, _ = build_argv(["--demo", *flags])
    assert config.priors is None


def test_the_bundled_calibration_is_not_used_with_another_neural_router(learned: Path, tmp_path: Path) -> None:
    shutil.copytree(learned / "router", tmp_path / "router")
    flags = ["--whiflash-router", "neural", "--whiflash-neural-router-path", str(tmp_path / "router")]
    config, _ = build_argv(["--demo", *flags])
    assert (config.calibration, config.priors) == (None, None)


def test_priors_need_a_score_in_tokens(learned: Path) -> None:
    flags = ["--demo", "--whiflash-entropy-threshold", "0.3", "--whiflash-priors", "learned"]
    with pytest.raises(
        ConfigError, match=r"--whiflash-priors learned: are in tokens, but this router's score is in nats"
    ):
        build_argv(flags)
    with pytest.raises(ConfigError, match=r"--whiflash-priors learned: has no effect with --whiflash-router fixed:e3"):
        build_argv(["--demo", "--whiflash-router", "fixed:e3", "--whiflash-priors", "learned"])


def test_a_given_threshold_is_the_plain_policy(learned: Path) -> None:
    config, _ = build_argv(["--demo", "--whiflash-entropy-threshold", "0"])
    assert (config.entropy_threshold, config.calibration, config.weighs_costs) == (0, None, False)
    with pytest.raises(ConfigError, match="--whiflash-entropy-threshold"):
        build_argv(["--demo", "--whiflash-entropy-threshold", ""])
    config, _ = build_argv(["--demo", "--whiflash-router", "neural", "--whiflash-neural-router-threshold", "1"])
    assert not config.weighs_costs


def test_what_was_learned_about_the_bundled_models_is_not_used_for_others(
    learned: Path, tiny: tiny_models.TinyModels, tmp_path: Path
) -> None:
    copy = tmp_path / "eagle3"
    shutil.copytree(tiny.eagle3, copy)
    config, _ = build_argv(["--demo", "--whiflash-eagle-draft", str(copy)])
    assert config.calibration is None
    with pytest.raises(ConfigError, match=r"--whiflash-neural-router-path: missing"):
        build_argv(["--demo", "--whiflash-eagle-draft", str(copy), "--whiflash-router", "neural"])


def test_a_router_of_other_models_is_refused_before_serving(learned: Path, both: list[str], tmp_path: Path) -> None:
    other = tiny_models.build(tmp_path, seed=9)
    flags = ["--model-path", str(other.target), "--speculative-draft-model-path", str(other.dflash)]
    flags += ["--whiflash-eagle-draft", str(other.eagle3), "--whiflash-router", "neural"]
    with pytest.raises(CheckpointError, match="made for another target"):
        build_argv([*flags, "--whiflash-neural-router-path", str(learned / "router")])
    with pytest.raises(CheckpointError, match=r"--whiflash-calibration .*made for another target"):
        build_argv([*flags[:-2], "--whiflash-calibration", str(learned / "calibration.json")])


def test_demo_without_speculation_keeps_the_demos_defaults(demo: Path) -> None:
    _, argv = build_argv(["--demo", "--whiflash-router", "off"])
    assert argv[:-1] == list(bundled.DEMO_DEFAULTS)
    assert argv[-1] == f"--model-path={demo / 'target'}"


def test_demo_without_its_models_says_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "DEMO_MODELS", tmp_path)
    with pytest.raises(ConfigError, match=r"--demo: .*scripts/train_demo_models\.py"):
        build_argv(["--demo"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speculative-algorithm", "EAGLE3"], "--speculative-algorithm EAGLE3: this launcher serves WHIFLASH only"),
        (["--speculative-algo", "EAGLE3"], "--speculative-algo: abbreviated flag; write out --speculative-algorithm"),
        (["--whiflash-rout=off"], "--whiflash-rout: abbreviated flag; write out --whiflash-router"),
        (["--whiflash-budget", "3"], "--whiflash-budget: unknown flag; see --help"),
        (
            ["--speculative-num-draft-tokens", "4"],
            "--speculative-num-draft-tokens 4: the drafters need a verify width of 8",
        ),
        (["--speculative-num-draft-tokens", "many"], "--speculative-num-draft-tokens many: not a whole number"),
        (["--whiflash-router", "neutral"], "--whiflash-router neutral: unknown router"),
        (
            ["--whiflash-max-backlog", "7"],
            "--whiflash-max-backlog 7: below the verify width, which is 8 for these drafters",
        ),
        (["--whiflash-max-backlog", "5"], "--whiflash-max-backlog 5: below the verify width"),
    ],
)
def test_flags_that_are_refused(both: list[str], flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_argv([*both, *flags])
    assert said in str(refusal.value)


def test_a_missing_target_is_named() -> None:
    with pytest.raises(ConfigError, match="--model-path: missing; give the target model's folder or hub id, or --demo"):
        build_argv(["--whiflash-router", "off"])


def test_a_missing_drafter_is_found_before_sglang_starts(both: list[str]) -> None:
    with pytest.raises(CheckpointError, match="--whiflash-eagle-draft /nowhere: no such folder"):
        build_argv([*both, "--whiflash-eagle-draft", "/nowhere"])


def test_the_error_is_one_line_and_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch_server.main(["--whiflash-router", "neutral", "--port", str(free_port())])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --whiflash-router neutral") and captured.err.count("\n") == 1
    assert isinstance(end.value.__cause__, WhiFlashError)


def refusals_without_imports(lines: list[list[str]]) -> list[str]:
    """What the launcher says to each command line, in a process in which it must import neither SGLang nor torch."""
    program = (
        "import json, sys\n"
        "from whiflash_sglang import launch_server\n"
        "for argv in json.loads(sys.stdin.read()):\n"
        "    try: launch_server.main(argv)\n"
        "    except SystemExit as end: assert end.code == 2, end.code\n"
        "    imported = {'sglang', 'torch'} & set(sys.modules)\n"
        "    assert not imported, f'{imported} for {argv}'\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    assert len(said) == len(lines), said
    return said


def test_what_is_refused_is_said_before_sglang_is_imported(tiny: tiny_models.TinyModels, both: list[str]) -> None:
    """Its import takes many seconds. Each of these was a traceback after a minute or two of loading, or was taken."""
    port = ["--port", str(free_port())]
    demo, off = ["--demo", *port], ["--model-path", str(tiny.target), "--whiflash-router", "off", *port]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        cases = {
            "--max-total-tokens 1: is too small": [*demo, "--max-total-tokens", "1"],
            "--max-total-tokens -5: must be": [*demo, "--max-total-tokens", "-5"],
            "--max-total-tokens 0: must be": [*demo, "--max-total-tokens=0"],
            "--max-total-tokens 7: is too small for verify windows of 8 tokens; give 17": [
                *both,
                *port,
                "--max-total-tokens=7",
            ],
            "--max-total-tokens 48: is too small": [*both, *port, "--max-total-tokens=48", "--page-size=64"],
            "--context-length 9: is too small": [*both, *port, "--context-length=9"],
            "--max-total-tokens 2: is too small": [*off, "--max-total-tokens=2"],
            "--mem-fraction-static nan: must be": [*off, "--mem-fraction-static", "nan"],
            "--mem-fraction-static 1.5: must be": [*demo, "--mem-fraction-static", "1.5"],
            "--max-running-requests 0: must be": [*demo, "--max-running-requests", "0"],
            "--port 99999: must be": ["--demo", "--port", "99999"],
            f"--port {taken}: is in use on 127.0.0.1": ["--demo", "--port", taken],
            "--host 192.0.2.1: is not an address of this machine": [*demo, "--host", "192.0.2.1"],
            "--tp-size 3 does not divide": [*both, *port, "--tp", "3"],
            "--enable-lora: the drafters expect features": [*demo, "--enable-lora"],
            "--pipeline-parallel-size 2: the drafters need": [*demo, "--pp-size=2"],
            "--whiflash-router neutral: unknown router": [*demo, "--whiflash-router", "neutral"],
            "--model-path: missing": ["--whiflash-router", "off", *port],
        }
        said = refusals_without_imports(list(cases.values()))
    for expected, line in zip(cases, said, strict=True):
        assert line.startswith("error: ") and expected in line


def test_a_checkpoint_that_is_not_whole_is_said_before_sglang_is_imported(
    tiny: tiny_models.TinyModels, both: list[str], tmp_path: Path
) -> None:
    port = ["--port", str(free_port())]
    target, eagle3 = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (tiny.target, tiny.eagle3))
    for folder in (target, eagle3):
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    cut = [*both, *port, "--model-path", str(target)]
    lines = [cut, [*cut, "--whiflash-router", "off"], [*both, *port, "--whiflash-eagle-draft", str(eagle3)]]
    files = [target, target, eagle3]
    for line, folder in zip(refusals_without_imports(lines), files, strict=True):
        assert f"{folder / 'model.safetensors'}: is truncated" in line


def test_dummy_weights_need_no_file(both: list[str], tiny: tiny_models.TinyModels, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny.target, tmp_path / "target"))
    (target / "model.safetensors").unlink()
    build_argv([*both, "--model-path", str(target), "--load-format=dummy"])
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        build_argv([*both, "--model-path", str(target)])


def test_without_sglang_the_launcher_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        launch_server.main(["--demo"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: SGLang: is not installed; run `pip install")


@pytest.mark.parametrize("error", [ValueError("flags\ndo not go together"), AssertionError("no"), TypeError("no")])
def test_what_sglang_refuses_is_one_line_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(argv: list[str]) -> None:
        assert argv == [launch_server.QUIET, "--port=1"]  # the operator's own --log-level would come later, and win
        raise error

    monkeypatch.setattr("sglang.srt.server_args.prepare_server_args", refuse)
    with pytest.raises(SystemExit) as end:
        launch_server.serve(["--port=1"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_the_demo_request_is_the_order_desks_own() -> None:
    """Word for word: the bundled models know nothing else."""
    request = json.loads(bundled.DEMO_REQUEST.read_text())
    assert request["messages"][0] == {"role": "system", "content": SYSTEM}
    assert request["tools"] == TOOL_SCHEMAS
    assert "--served-model-name=" + request["model"] in bundled.DEMO_DEFAULTS


def test_a_command_to_ask_another_model_is_whole_and_shows_no_key() -> None:
    args = SimpleNamespace(
        model_path="/models/it's", served_model_name="it's", api_key="secret", url=lambda: "http://127.0.0.1:31000"
    )
    command = bundled.curl(args)
    assert "secret" not in command and '-H "Authorization: Bearer $API_KEY"' in command
    words = shlex.split(command)
    assert words[1] == "http://127.0.0.1:31000/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "it's"


def test_only_a_speculating_server_leaves_a_configuration_behind(
    both: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plugin registers nothing where it finds none, so that `off` is SGLang as it is: the honest baseline."""
    served = []
    monkeypatch.setattr(launch_server, "serve", served.append)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "left by another server")
    both = [*both, "--port", str(free_port())]
    launch_server.main([*both, "--whiflash-router", "off"])
    assert ENVIRONMENT_VARIABLE not in os.environ
    assert "without speculation" in capsys.readouterr().out
    launch_server.main(both)
    assert WhiFlashConfig.from_environ(os.environ).router == "entropy"
    assert ["--speculative-algorithm=WHIFLASH" in argv for argv in served] == [False, True]


def test_a_config_file_is_read_before_the_flags_are_judged(
    tiny: tiny_models.TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[list[str]] = []
    monkeypatch.setattr(launch_server, "serve", served.append)
    file = tmp_path / "serve.yaml"
    port = free_port()
    file.write_text(
        f"model-path: {tiny.target}\nspeculative-draft-model-path: {tiny.dflash}\nwhiflash-drafters: df\n"
        "port: 31000\ndisable-radix-cache: true\n"
    )
    launch_server.main(["--config", str(file), "--port", str(port)])
    assert WhiFlashConfig.from_environ(os.environ).draft_paths == {"df": str(tiny.dflash)}
    assert "--disable-radix-cache" in served[0] and "--config" not in served[0]
    ports = [served[0][i + 1] for i, flag in enumerate(served[0]) if flag == "--port"]
    assert ports == ["31000", str(port)], "the last one counts: that of the command line"


@pytest.mark.parametrize(("content", "said"), [("- 1", "dictionary"), ("a: [", "--config"), (None, "not found")])
def test_a_bad_config_file_is_named(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as end:
        launch_server.main(["--config", str(file), "--port", str(free_port())])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --config") and said in error


@pytest.mark.slow  # it starts a program that imports SGLang
def test_flags_that_do_not_go_together_are_one_line() -> None:
    command = [sys.executable, "-m", "whiflash_sglang.launch_server", "--demo", "--attention-backend", "triton"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "error: --attention-backend triton" in result.stderr
    assert "Traceback" not in result.stderr


def test_our_flags_come_first_in_one_group() -> None:
    text = launch_server.build_parser().format_help()
    assert text.count("WhiFlash:") == 1
    for flag in ("--whiflash-drafters", "--whiflash-eagle-draft", "--whiflash-router", "--whiflash-entropy-threshold"):
        assert flag in text
    assert "--demo" in text and "--download-dir" not in text


@pytest.mark.slow  # it starts a program that imports SGLang
def test_help_goes_on_with_sglangs_own() -> None:
    command = [sys.executable, "-m", "whiflash_sglang.launch_server", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert 0 < text.index("--whiflash-router") < text.index("--tensor-parallel-size")


def test_importing_the_launcher_loads_neither_sglang_nor_torch() -> None:
    """Spawned processes import the main module again."""
    program = "import sys, whiflash_sglang.launch_server; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": launch_server.SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_do_not_spin_for_long_unless_told_to(given: dict[str, str], then: dict[str, str]) -> None:
    """Two servers on two cores ran at a fourteenth of the speed of one alone."""
    launch_server.wait_without_spinning(given)
    assert given == then


def test_waiting_is_settled_before_torch_reads_it() -> None:
    program = """
import os, sys
from whiflash_sglang import launch_server
told = lambda *argv: sys.exit(os.environ.get("GOMP_SPINCOUNT", "none") + str("torch" in sys.modules))
launch_server.look_over = told
launch_server.main(["--demo"])
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP"))}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stderr.strip() == f"{launch_server.SPINS}False", ended.stderr


@pytest.mark.slow  # it starts a program that imports SGLang
def test_no_thread_of_ours_keeps_processes_from_being_forked() -> None:
    """A thread that waited to say that the server is ready made every process of a CPU server import SGLang again."""
    program = """
import sys, threading
from sglang import launch_server as sglang_server
from whiflash_sglang import launch_server
from whiflash_sglang.cpu.processes import other_threads
sglang_server.run_server = lambda server_args: sys.exit(f"{other_threads()}")
launch_server.main(["--demo", "--port", sys.argv[1]])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stderr.splitlines()[-1] == "[]", ended.stderr
