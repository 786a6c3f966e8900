"""Serve a model with WHIFLASH. Takes our flags and all flags of SGLang's server.

    python -m whiflash_sglang.launch_server --model-path Qwen/Qwen3-8B \\
        --speculative-draft-model-path DFLASH --whiflash-eagle-draft EAGLE3 [SGLang's flags]
    python -m whiflash_sglang.launch_server --demo --port 30000

Flags, ports and checkpoints are checked before SGLang is imported, which takes many seconds. Errors are one line, with
exit status 2. `--whiflash-router off` starts SGLang without speculation, as a baseline. The scheduler is a spawned
process and gets our config from the environment, so importing this module must have no side effects.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whiflash_sglang.core.errors import ConfigError, WhiFlashError
from whiflash_sglang.startup import bounds, command_line, demo, hub, ports, progress
from whiflash_sglang.startup.checkpoints import (
    FLAG_TARGET,
    check_weights,
)
from whiflash_sglang.startup.config import (
    ENVIRONMENT_VARIABLE,
    FLAG_DFLASH,
    FLAG_EAGLE,
    FLAG_ROUTER,
    WhiFlashConfig,
    add_arguments,
)
from whiflash_sglang.startup.gpu_memory import surely_none
from whiflash_sglang.startup.model_checks import check_checkpoints, check_room
from whiflash_sglang.startup.refused_flags import (
    CPU_REFUSALS,
    CUDA_REFUSALS,
    FLAG_WIDTH,
    REFUSALS,
    Given,
    refuse,
    typed,
)

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

ALGORITHM = "WHIFLASH"
PROGRAM = "python -m whiflash_sglang.launch_server"
# Overridable like those of the demo. At level `info` SGLang logs its arguments alone with 14 KB.
QUIET = "--log-level=warning"

SPINS = "10000"  # about 50 microseconds

# Printed by SGLang's imports on a CPU, in every process.
WARNINGS_OF_IMPORTS = ("Triton is not supported on current platform", "Only CUDA")

FLAG_ALGORITHM = "--speculative-algorithm"


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then serve until the server ends. Raises SystemExit(2) for invalid flags or models."""
    argv = list(sys.argv[1:] if argv is None else argv)
    wait_without_spinning(os.environ)
    try:
        if importlib.util.find_spec("sglang") is None:
            fix = "run `pip install 'whiflash-sglang[server]'` or `make`"
            raise ConfigError("SGLang", None, "is not installed", fix)
        if "-h" in argv or "--help" in argv:
            print_help()
            return
        look_over(argv)
        if "--config" in argv:
            argv = with_config_file(argv)
            look_over(argv)
        config, sglang_argv = build_argv(argv)
        progress.say("importing SGLang")
        if surely_none() and "--log-level" not in command_line.read(argv):
            silence_imports()
        refuse_unsupported(argv)
    except WhiFlashError as error:
        raise refused(error) from error
    os.environ.pop(ENVIRONMENT_VARIABLE, None)
    if config.router == "off":
        # Without a config in the environment, the plugin registers nothing.
        print(f"{FLAG_ROUTER} off: SGLang without speculation, speculative flags are dropped", flush=True)
    else:
        config.to_environ(os.environ)
    serve(sglang_argv)


def refused(error: Exception) -> SystemExit:
    """Print the error as one line and return the SystemExit to raise."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return SystemExit(2)


def look_over(argv: Sequence[str]) -> None:
    """Check flags, numbers and ports from the raw command line, without importing SGLang or torch. Raises
    ConfigError."""
    flags, rest = build_parser().parse_known_args(list(argv))
    given = command_line.read(rest)
    if flags.whiflash_router != "off":
        refuse(REFUSALS, typed(given))
    if surely_none():
        refuse(CPU_REFUSALS, typed(given))
    bounds.check(given)
    ports.check(command_line.read([*demo.DEMO_DEFAULTS, *rest]) if flags.demo else given)


def wait_without_spinning(environment: MutableMapping[str, str]) -> None:
    """Limit OpenMP's spinning at barriers. Must run before torch is imported; respects the operator's OMP_WAIT_POLICY.

    By default threads spin for over a millisecond at every barrier. If another process is busy, they spin while the
    thread they wait for is not scheduled, and the server slows down 15x. Not spinning at all costs an undisturbed
    server a third, as barriers are microseconds apart.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def silence_imports() -> None:
    """Suppress warnings about missing accelerator kernels, in this process and its children."""
    for message in WARNINGS_OF_IMPORTS:
        warnings.filterwarnings("ignore", message, UserWarning)
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{text}:UserWarning" for text in WARNINGS_OF_IMPORTS))


def with_config_file(argv: Sequence[str]) -> list[str]:
    """Expand `--config FILE` into flags, including ours; flags on the command line win. Raises ConfigError."""
    if "--config" not in argv:
        return list(argv)
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.server_args_config_parser import ConfigArgumentMerger
    from yaml import YAMLError  # type: ignore[import-untyped]

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--demo", action="store_true")
    try:
        return list(ConfigArgumentMerger(parser).merge_config_with_args(list(argv)))
    except (ValueError, OSError, YAMLError) as error:
        raise ConfigError("--config", None, str(error), "give one YAML file of flags and values") from error


def refuse_unsupported(argv: Sequence[str]) -> None:
    """Raise ConfigError for SGLang flags that WHIFLASH or the CPU platform does not support; see `refusals`, `bounds`.

    The exact check after `look_over`: uses SGLang's parser, which resolves abbreviations, and knows if there is a GPU.
    """
    from whiflash_sglang.cpu import activate

    flags, rest = build_parser().parse_known_args(list(argv))
    given = given_flags(rest)
    if flags.whiflash_router != "off":
        refuse(REFUSALS, given)
    if activate() is not None:
        refuse(CPU_REFUSALS, given)
    elif flags.whiflash_router != "off":
        refuse(CUDA_REFUSALS, given)
    values = {flag: one.value for flag, one in given.items() if one.value != one.default}
    bounds.check({flag: value if isinstance(value, list) else [value] for flag, value in values.items()})


def given_flags(argv: Sequence[str]) -> dict[str, Given]:
    """Every SGLang flag with its value and default, as parsed by SGLang's own parser."""
    parser = sglang_parser()
    # SGLang's parser requires the target's path, which our parser has already consumed.
    values, _ = parser.parse_known_args([*argv, *_pass_on(FLAG_TARGET, "")])
    return {
        flag: Given(getattr(values, action.dest), action.default)
        for action in parser._actions
        for flag in action.option_strings
        if hasattr(values, action.dest)
    }


@functools.cache
def sglang_parser() -> argparse.ArgumentParser:
    """SGLang's argument parser; cached, as building it takes a third of a second."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog=PROGRAM, usage=argparse.SUPPRESS)
    ServerArgs.add_cli_args(parser)
    return parser


def build_argv(argv: Sequence[str]) -> tuple[WhiFlashConfig, list[str]]:
    """Build our config and SGLang's command line. Checks checkpoints and downloads hub ids. Raises WhiFlashError."""
    flags, rest = build_parser().parse_known_args(list(argv))
    _refuse_what_sglang_would_misread(flags, rest)
    if flags.demo:
        demo.fill_defaults(flags)
    config = WhiFlashConfig.from_namespace(flags)
    defaults = list(demo.DEMO_DEFAULTS) if flags.demo else []
    if flags.model_path is None:
        raise ConfigError(FLAG_TARGET, None, "missing", "give the target model's folder or hub id, or --demo")
    given = command_line.read(rest)
    if config.router == "off":
        check_room(1, given)
        if Path(flags.model_path).is_dir():
            check_weights(FLAG_TARGET, flags.model_path)
        return config, [
            *defaults,
            *_pass_on(FLAG_TARGET, flags.model_path),
            *_shared(flags),
            *_without_speculation(rest),
        ]

    # Download code only if the operator allows running it.
    patterns = (*hub.WHOLE_TARGET, "*.py") if "--trust-remote-code" in rest else hub.WHOLE_TARGET
    target_path = hub.resolve(
        FLAG_TARGET, flags.model_path, revision=flags.revision, cache_dir=flags.download_dir, patterns=patterns
    )
    config = _with_local_drafters(config, flags)
    width = check_checkpoints(config, target_path, flags.speculative_num_draft_tokens, given)
    _check_learned(config, target_path)
    if target_path != flags.model_path:
        defaults += _pass_on("--served-model-name", flags.model_path)
    speculation = [
        *_pass_on(FLAG_ALGORITHM, ALGORITHM),
        *_pass_on(FLAG_DFLASH, next(iter(config.draft_paths.values()))),
        *_pass_on(FLAG_WIDTH, str(width)),
        # Otherwise SGLang applies the target's --quantization to the drafters.
        *_pass_on("--speculative-draft-model-quantization", "unquant"),
    ]
    return config, [*defaults, *_pass_on(FLAG_TARGET, target_path), *_shared(flags), *rest, *speculation]


def build_parser() -> argparse.ArgumentParser:
    """A parser for our flags and the SGLang flags that they depend on."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s --model-path TARGET [WhiFlash's flags] [SGLang's flags]",
        allow_abbrev=False,
        add_help=False,
    )
    add_arguments(parser).add_argument(
        "--demo",
        action="store_true",
        help="serve the bundled models with defaults for a CPU; other flags override these",
    )
    hidden = argparse.SUPPRESS
    parser.add_argument(FLAG_TARGET, "--model", default=None, help=hidden)
    parser.add_argument("--revision", default=None, help=hidden)
    parser.add_argument("--download-dir", default=None, help=hidden)
    parser.add_argument("--speculative-draft-model-revision", default=None, help=hidden)
    parser.add_argument(FLAG_ALGORITHM, default=None, help=hidden)
    parser.add_argument(FLAG_WIDTH, default=None, help=hidden)
    return parser


def print_help() -> None:
    """Print our flags, then SGLang's help."""
    print(build_parser().format_help())
    print("---- SGLang's flags " + "-" * 60)
    sglang_parser().print_help()


def serve(sglang_argv: Sequence[str]) -> None:
    """Run SGLang's server in this process until it ends, then kill its child processes."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    is_ours = ENVIRONMENT_VARIABLE in os.environ
    load_plugins()
    try:
        server_args = prepare_server_args([QUIET, *sglang_argv])
        copy.deepcopy(server_args).check_server_args()  # on a copy: it has side effects, and run_server calls it too
        if is_ours:
            from whiflash_sglang.bridge.http_hooks import install_http
            from whiflash_sglang.bridge.memory_checks import check_accelerator

            check_accelerator(server_args)
    # Conflicting flags, found by SGLang or by us (bridge/, cpu/platform.py).
    except (ValueError, TypeError, AssertionError, NotImplementedError, OSError, WhiFlashError) as error:
        raise refused(error) from error
    if is_ours:
        install_http(server_args)
    progress.say(f"loading the target {server_args.model_path} in a separate process")
    # The ready message comes from SGLang's warm-up thread. A thread of ours would exist before the processes are
    # started and prevent forking them on a CPU.
    HookRegistry.register(
        "sglang.srt.entrypoints.http_server._wait_and_warmup",
        functools.partial(_say_when_ready, demo.curl(server_args)),
        HookType.AFTER,
    )
    HookRegistry.apply_hooks()
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _say_when_ready(request: str, result: None, server_args: ServerArgs, *args: Any, **kwargs: Any) -> None:
    progress.say_when_ready(server_args, request)


def _refuse_what_sglang_would_misread(flags: argparse.Namespace, rest: Sequence[str]) -> None:
    algorithm = flags.speculative_algorithm
    if algorithm is not None and algorithm.upper() != ALGORITHM:
        fix = "drop the flag, or use `python -m sglang.launch_server`"
        raise ConfigError(FLAG_ALGORITHM, algorithm, f"this launcher serves {ALGORITHM} only", fix)
    own = [flag for action in build_parser()._actions for flag in action.option_strings]
    for token in rest:
        name = token.partition("=")[0]
        # SGLang's parser accepts abbreviations, which would bypass the checks here.
        if name.startswith(("--spec", "--whiflash")) and (full := [flag for flag in own if flag.startswith(name)]):
            raise ConfigError(name, None, "abbreviated flag", f"write out {' or '.join(full)}")
        if name.startswith("--whiflash"):
            raise ConfigError(name, None, "unknown flag", "see --help")


def _with_local_drafters(config: WhiFlashConfig, flags: argparse.Namespace) -> WhiFlashConfig:
    """The config with hub ids replaced by local folders. Downloads them; raises CheckpointError."""

    def resolve(flag: str, path: str | None, revision: str | None) -> str | None:
        if path is None:
            return None
        return hub.resolve(flag, path, revision=revision, cache_dir=flags.download_dir, patterns=hub.WHOLE_DRAFTER)

    dflash = resolve(FLAG_DFLASH, config.dflash_draft, flags.speculative_draft_model_revision)
    return replace(config, dflash_draft=dflash, eagle_draft=resolve(FLAG_EAGLE, config.eagle_draft, None))


def _check_learned(config: WhiFlashConfig, target_path: str) -> None:
    """Check that router, calibration and priors fit the models, before SGLang is started."""
    if config.neural_router_path is None and config.calibration is None and config.priors is None:
        return  # avoids importing torch
    from whiflash_sglang.routing import Learned

    Learned.load(config, target_path)


def _pass_on(flag: str, value: str) -> list[str]:
    return [f"{flag}={value}"]


def _shared(flags: argparse.Namespace) -> list[str]:
    """SGLang flags that are used here and passed on unchanged."""
    shared = {"--revision": flags.revision, "--download-dir": flags.download_dir}
    return [argument for flag, value in shared.items() if value is not None for argument in _pass_on(flag, value)]


def _without_speculation(rest: Sequence[str]) -> list[str]:
    """`rest` without `--speculative-...` flags and their values."""
    kept: list[str] = []
    dropping = False
    for token in rest:
        if token.startswith("-"):
            dropping = token.startswith("--speculative-")
        if not dropping:
            kept.append(token)
    return kept


if __name__ == "__main__":
    main()
