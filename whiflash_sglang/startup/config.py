"""WhiFlash's flags: defaults, bounds, and the environment variable that carries them to spawned processes.

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    config = WhiFlashConfig.from_namespace(parser.parse_args())     # ConfigError names flag, value and fix
    config.to_environ(os.environ)                                   # the launcher
    config = WhiFlashConfig.from_environ(os.environ)                # the scheduler process

A config is validated once, on construction, and frozen afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from whiflash_sglang.core.errors import ConfigError

ENVIRONMENT_VARIABLE = "WHIFLASH_CONFIG"

Number = TypeVar("Number", int, float)

DRAFTERS = {"df-e3": ("df", "e3"), "df": ("df",), "e3": ("e3",)}
ROUTERS = "entropy, neural, fixed:e3, fixed:df, alternate, random:SEED or off"
SCORED = ("entropy", "neural")  # routers that decide by a score
MAX_EAGLE_STEPS = 15
DEFAULT_ENTROPY_THRESHOLD = 0.5  # nats, without a calibration
LEARNED = "learned"  # priors that start empty
OBJECTIVES = ("tokens_per_ms", "acceptance")
POSITIVE_DRAFTERS = ("e3", "df")

FLAG_DRAFTERS = "--whiflash-drafters"
FLAG_DFLASH = "--speculative-draft-model-path"
FLAG_EAGLE = "--whiflash-eagle-draft"
FLAG_ROUTER = "--whiflash-router"
FLAG_THRESHOLD = "--whiflash-entropy-threshold"
FLAG_ROUTER_PATH = "--whiflash-neural-router-path"
FLAG_ROUTER_THRESHOLD = "--whiflash-neural-router-threshold"
FLAG_POSITIVE = "--whiflash-positive-drafter"
FLAG_OBJECTIVE = "--whiflash-objective"
FLAG_CALIBRATION = "--whiflash-calibration"
FLAG_PRIORS = "--whiflash-priors"
FLAG_STEPS = "--whiflash-eagle-steps"
FLAG_BACKLOG = "--whiflash-max-backlog"

WITHOUT_DRAFTERS = f"or {FLAG_ROUTER} off to serve without speculation"


@dataclass(frozen=True)
class WhiFlashConfig:
    """The operator's settings. Paths are local folders or hub ids."""

    drafters: str = "df-e3"
    dflash_draft: str | None = None
    eagle_draft: str | None = None
    router: str = "entropy"
    entropy_threshold: float | None = None  # nats; above it `e3` drafts, else `df`
    neural_router_path: str | None = None
    neural_router_threshold: float | None = None  # tokens that the positive drafter is expected to gain, at least
    positive_drafter: str | None = None  # for router files that do not name one
    objective: str | None = None
    calibration: str | None = None
    priors: str | None = None  # LEARNED, or a file
    eagle_steps: int = 5  # draft tokens of one EAGLE-3 chain
    max_backlog: int = 128  # tokens per request

    def __post_init__(self) -> None:
        self.validate()

    @property
    def drafter_names(self) -> tuple[str, ...]:
        """The drafters to load, in the order that tables and reports use. Empty if the router is `off`."""
        return () if self.router == "off" else DRAFTERS[self.drafters]

    @property
    def draft_paths(self) -> dict[str, str]:
        """Drafter name -> checkpoint path, for the drafters to load."""
        paths = {"df": self.dflash_draft, "e3": self.eagle_draft}
        return {name: path for name in self.drafter_names if (path := paths[name]) is not None}

    def validate(self) -> None:
        """Raise ConfigError for the first invalid or contradictory flag."""
        if self.drafters not in DRAFTERS:
            raise ConfigError(FLAG_DRAFTERS, self.drafters, "unknown drafters", f"use one of {', '.join(DRAFTERS)}")
        self._validate_router()
        self._validate_paths()
        self._validate_policy()
        self._validate_numbers()

    def _validate_router(self) -> None:
        kind, colon, argument = self.router.partition(":")
        names = DRAFTERS[self.drafters]
        if kind not in (*SCORED, "fixed", "alternate", "random", "off"):
            raise ConfigError(FLAG_ROUTER, self.router, "unknown router", f"use {ROUTERS}")
        if colon and kind not in ("fixed", "random"):
            raise ConfigError(FLAG_ROUTER, self.router, f"`{kind}` takes no argument", f"use `{kind}`")
        if kind == "fixed" and argument not in names:
            choices = " or ".join(f"fixed:{name}" for name in names)
            problem = f"{FLAG_DRAFTERS} {self.drafters} has no drafter `{argument}`"
            raise ConfigError(FLAG_ROUTER, self.router, problem, f"use {choices}")
        if kind == "random" and not (argument.isascii() and argument.isdigit()):
            raise ConfigError(FLAG_ROUTER, self.router, "the seed must be a whole number >= 0", "use e.g. random:0")
        if kind in (*SCORED, "alternate", "random") and len(names) == 1:
            problem = f"nothing to choose between, {FLAG_DRAFTERS} {self.drafters} is one drafter"
            raise ConfigError(FLAG_ROUTER, self.router, problem, f"use fixed:{names[0]} or {FLAG_DRAFTERS} df-e3")

    def _validate_paths(self) -> None:
        flags = {"df": (FLAG_DFLASH, self.dflash_draft, "DFlash"), "e3": (FLAG_EAGLE, self.eagle_draft, "EAGLE-3")}
        if self.router == "off":
            return  # unused, but allowed: switching routers then means changing one flag
        for name, (flag, path, title) in flags.items():
            needed = name in self.drafter_names
            asked = f"{FLAG_DRAFTERS} {self.drafters}"
            if needed and not path:
                others = [other for other, (_, given, _) in flags.items() if given and other in self.drafter_names]
                alone = f"or {FLAG_DRAFTERS} {others[0]} to draft with {flags[others[0]][2]} alone" if others else None
                fix = (
                    f"give the {title} drafter's folder or hub id, {alone or WITHOUT_DRAFTERS}; "
                    "docs/routers.md explains how to train one"
                )
                raise ConfigError(flag, None, f"missing, but {asked} needs it", fix)
            if path and not needed:
                fix = f"drop it or use {FLAG_DRAFTERS} df-e3"
                raise ConfigError(flag, path, f"given, but {asked} would not load it", fix)

    def _validate_policy(self) -> None:
        """Flags of the routers that decide by a score, and of their objective."""
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ConfigError(FLAG_OBJECTIVE, self.objective, "unknown objective", f"use {' or '.join(OBJECTIVES)}")
        if self.positive_drafter is not None and self.positive_drafter not in POSITIVE_DRAFTERS:
            fix = f"use {' or '.join(POSITIVE_DRAFTERS)}"
            raise ConfigError(FLAG_POSITIVE, self.positive_drafter, "unknown drafter", fix)
        if self.router == "off":
            return  # see _validate_paths
        if self.router == "neural" and self.neural_router_path is None:
            fix = "give the router's folder or .safetensors file"
            raise ConfigError(FLAG_ROUTER_PATH, None, f"missing, but {FLAG_ROUTER} neural needs it", fix)
        for flag, value, routers in (
            (FLAG_ROUTER_PATH, self.neural_router_path, ("neural",)),
            (FLAG_ROUTER_THRESHOLD, self.neural_router_threshold, ("neural",)),
            (FLAG_POSITIVE, self.positive_drafter, ("neural",)),
            (FLAG_THRESHOLD, self.entropy_threshold, ("entropy",)),
            (FLAG_OBJECTIVE, self.objective, SCORED),
            (FLAG_CALIBRATION, self.calibration, SCORED),
            (FLAG_PRIORS, self.priors, SCORED),
        ):
            if value is not None and self.router not in routers:
                fix = f"drop it, or use {FLAG_ROUTER} {' or '.join(routers)}"
                raise ConfigError(flag, value, f"has no effect with {FLAG_ROUTER} {self.router}", fix)
        threshold = self.neural_router_threshold if self.router == "neural" else self.entropy_threshold
        if self.objective == "tokens_per_ms" and threshold is not None:
            flag = FLAG_ROUTER_THRESHOLD if self.router == "neural" else FLAG_THRESHOLD
            fix = f"drop it, or use {FLAG_OBJECTIVE} acceptance"
            raise ConfigError(flag, threshold, f"has no effect with {FLAG_OBJECTIVE} tokens_per_ms", fix)
        if self.objective == "tokens_per_ms" and self.router == "entropy" and self.calibration is None:
            problem = "needs a calibration of gain by entropy"
            fix = f"give {FLAG_CALIBRATION}, as written by `python -m whiflash_sglang.calibrate`"
            raise ConfigError(FLAG_OBJECTIVE, self.objective, problem, fix)
        if self.priors is not None and self.router == "entropy" and not self.weighs_costs:
            problem = "are in tokens, but this router's score is in nats"
            fix = f"use {FLAG_CALIBRATION} without a threshold, {FLAG_ROUTER} neural, or {FLAG_PRIORS} none"
            raise ConfigError(FLAG_PRIORS, self.priors, problem, fix)

    @property
    def weighs_costs(self) -> bool:
        """Whether the router maximizes tokens per millisecond. This is the default where it can and no threshold is
        given."""
        if self.router not in SCORED:
            return False
        if self.objective is not None:
            return self.objective == "tokens_per_ms"
        if self.router == "neural":
            return self.neural_router_threshold is None
        return self.entropy_threshold is None and self.calibration is not None

    def _validate_numbers(self) -> None:
        threshold = self.entropy_threshold
        if threshold is not None and not _is_number(threshold):
            raise ConfigError(FLAG_THRESHOLD, threshold, "not a number", "give nats, e.g. 0.5")
        if threshold is not None and (not math.isfinite(threshold) or threshold < 0):
            fix = "give nats, e.g. 0.5; for one drafter always use fixed:df or fixed:e3"
            raise ConfigError(FLAG_THRESHOLD, threshold, "must be a finite number >= 0", fix)
        threshold = self.neural_router_threshold
        if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
            raise ConfigError(FLAG_ROUTER_THRESHOLD, threshold, "must be a finite number", "give tokens, e.g. 1.0")
        steps = self.eagle_steps
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise ConfigError(FLAG_STEPS, steps, "not a whole number", "give draft tokens a round, e.g. 5")
        if not 1 <= steps <= MAX_EAGLE_STEPS:
            raise ConfigError(FLAG_STEPS, steps, "out of bounds", f"use 1 to {MAX_EAGLE_STEPS}")
        backlog = self.max_backlog
        if isinstance(backlog, bool) or not isinstance(backlog, int):
            raise ConfigError(FLAG_BACKLOG, backlog, "not a whole number", "give tokens, e.g. 128")
        if backlog < 1 + steps:
            problem = f"below the verify width, which {FLAG_STEPS} {steps} makes {1 + steps} or more"
            raise ConfigError(FLAG_BACKLOG, backlog, problem, "give tokens, e.g. 128")

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> WhiFlashConfig:
        """Inverse of `to_json`. Raises ConfigError."""
        known = {field.name for field in fields(cls)}
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(ENVIRONMENT_VARIABLE, text, f"not JSON ({error})", _START_FIX) from error
        if not isinstance(content, dict) or set(content) != known:
            raise ConfigError(ENVIRONMENT_VARIABLE, text, f"must have exactly the fields {sorted(known)}", _START_FIX)
        return cls(**content)

    def to_environ(self, environ: MutableMapping[str, str]) -> None:
        """Store the config for spawned processes."""
        environ[ENVIRONMENT_VARIABLE] = self.to_json()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> WhiFlashConfig:
        """Read what `to_environ` stored. Raises ConfigError if it is missing or invalid."""
        if ENVIRONMENT_VARIABLE not in environ:
            raise ConfigError(ENVIRONMENT_VARIABLE, None, "not set in this process", _START_FIX)
        return cls.from_json(environ[ENVIRONMENT_VARIABLE])

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> WhiFlashConfig:
        """Build the config from flags parsed with `add_arguments`. Raises ConfigError."""
        drafters = namespace.whiflash_drafters
        if drafters not in DRAFTERS:
            raise ConfigError(FLAG_DRAFTERS, drafters, "unknown drafters", f"use one of {', '.join(DRAFTERS)}")
        names = DRAFTERS[drafters]
        default_router = cls.router if len(names) > 1 else f"fixed:{names[0]}"
        threshold, steps = namespace.whiflash_entropy_threshold, namespace.whiflash_eagle_steps
        neural_threshold = namespace.whiflash_neural_router_threshold
        return cls(
            drafters=drafters,
            dflash_draft=namespace.speculative_draft_model_path,
            eagle_draft=namespace.whiflash_eagle_draft,
            router=default_router if namespace.whiflash_router is None else namespace.whiflash_router,
            entropy_threshold=None if threshold is None else _number(float, FLAG_THRESHOLD, threshold, 0.5),
            neural_router_path=namespace.whiflash_neural_router_path,
            neural_router_threshold=None
            if neural_threshold is None
            else _number(float, FLAG_ROUTER_THRESHOLD, neural_threshold, 1.0),
            positive_drafter=namespace.whiflash_positive_drafter,
            objective=namespace.whiflash_objective,
            calibration=namespace.whiflash_calibration,
            priors=None if namespace.whiflash_priors == "none" else namespace.whiflash_priors,
            eagle_steps=_number(int, FLAG_STEPS, steps, cls.eagle_steps),
            max_backlog=_number(int, FLAG_BACKLOG, namespace.whiflash_max_backlog, cls.max_backlog),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_START_FIX = "start the server with `python -m whiflash_sglang.launch_server`"


def _number(kind: Callable[[str], Number], flag: str, text: str | None, default: Number) -> Number:
    if text is None:
        return default
    try:
        return kind(text)
    except ValueError as error:
        what = "number" if kind is float else "whole number"
        raise ConfigError(flag, text, f"not a {what}", f"give e.g. {default}") from error


def add_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add our flags as one group and return it. Values stay text; `WhiFlashConfig.from_namespace` validates them."""
    group = parser.add_argument_group("WhiFlash")
    group.add_argument(
        FLAG_DRAFTERS,
        metavar="{df-e3,df,e3}",
        default=WhiFlashConfig.drafters,
        help="drafters to load: DFlash (df), EAGLE-3 (e3) or both (default: %(default)s)",
    )
    group.add_argument(
        FLAG_DFLASH,
        "--speculative-draft-model",
        metavar="PATH",
        default=None,
        help="DFlash drafter, a folder or hub id",
    )
    group.add_argument(FLAG_EAGLE, metavar="PATH", default=None, help="EAGLE-3 drafter, a folder or hub id")
    group.add_argument(
        FLAG_ROUTER,
        metavar="ROUTER",
        default=None,
        help=f"policy that picks a drafter per request and round: {ROUTERS}. `off` serves without speculation "
        "(default: entropy, or fixed:NAME with one drafter)",
    )
    group.add_argument(
        FLAG_THRESHOLD,
        metavar="NATS",
        default=None,
        help="router entropy: EAGLE-3 drafts above this threshold, DFlash otherwise (default: the calibration's, else "
        f"{DEFAULT_ENTROPY_THRESHOLD})",
    )
    group.add_argument(
        FLAG_ROUTER_PATH,
        metavar="PATH",
        default=None,
        help="router neural: its folder, or a bare .safetensors file with two linear layers",
    )
    group.add_argument(
        FLAG_ROUTER_THRESHOLD,
        metavar="TOKENS",
        default=None,
        help="router neural: use the positive drafter if its expected gain exceeds this (default: maximize tokens per "
        "millisecond instead)",
    )
    group.add_argument(
        FLAG_POSITIVE,
        metavar="{e3,df}",
        default=None,
        help="router neural from a bare file: the drafter whose gain the router predicts",
    )
    group.add_argument(
        FLAG_OBJECTIVE,
        metavar="{tokens_per_ms,acceptance}",
        default=None,
        help="routers entropy and neural: maximize expected tokens per millisecond (round costs are measured at "
        "startup; not drafting is a third choice), or use the plain threshold (default: tokens_per_ms with neural or "
        f"{FLAG_CALIBRATION} if no threshold is given)",
    )
    group.add_argument(
        FLAG_CALIBRATION,
        metavar="FILE",
        default=None,
        help="output of `python -m whiflash_sglang.calibrate` for these models on this machine",
    )
    group.add_argument(
        FLAG_PRIORS,
        metavar="{FILE,learned,none}",
        default=None,
        help="corrections to the router's score by context kind, span and tool: the output of `python -m "
        "whiflash_sglang.calibrate --priors FILE`, or start empty (learned). Both are updated while serving; see GET "
        "/whiflash/priors (default: none)",
    )
    group.add_argument(
        FLAG_STEPS,
        metavar="K",
        default=None,
        help=f"draft tokens per EAGLE-3 chain, 1 to {MAX_EAGLE_STEPS} (default: {WhiFlashConfig.eagle_steps})",
    )
    group.add_argument(
        FLAG_BACKLOG,
        metavar="TOKENS",
        default=None,
        help="maximum backlog per request and drafter; catch-up is forced at this size. At least the verify width "
        f"(default: {WhiFlashConfig.max_backlog})",
    )
    return group


def active_config() -> WhiFlashConfig:
    """The config that the launcher stored in this process's environment. Raises ConfigError."""
    return WhiFlashConfig.from_environ(os.environ)
