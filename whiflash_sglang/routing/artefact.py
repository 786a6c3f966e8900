"""The files of a neural router.

A folder with `model.safetensors` (`in.weight`, `in.bias`, `out.weight`, `out.bias`) and `config.json`:

    {"format": "whiflash-router", "format_version": 1, "models": {identity.py}, "hidden_state": "final",
     "positive_drafter": "e3", "threshold": 0.4, "acceptance_length": {"df": 5.1, "e3": 4.9}, "training": {...},
     "metrics": {...}}

or a bare `.safetensors` file with two linear layers of any names, as published by others. A bare file does not record
its models, positive drafter and threshold; flags set the latter two. Weights are read from safetensors only, which
cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.neural import Network
from whiflash_sglang.startup.config import FLAG_POSITIVE, FLAG_ROUTER_PATH, FLAG_ROUTER_THRESHOLD
from whiflash_sglang.startup.safetensors_header import check_file, read_json

FORMAT, FORMAT_VERSION = "whiflash-router", 1
HIDDEN_STATE = "final"
DEFAULT_BASE = 3.0  # acceptance length of a drafter if none is recorded

_TENSORS = {"in.weight": "weight_in", "in.bias": "bias_in", "out.weight": "weight_out", "out.bias": "bias_out"}
_FIELDS = {
    "format",
    "format_version",
    "models",
    "hidden_state",
    "positive_drafter",
    "threshold",
    "acceptance_length",
    "training",
    "metrics",
}
_TRAIN = "train one with `python -m whiflash_sglang.training.train_router`"


@dataclass(frozen=True)
class NeuralRouter:
    """A neural router that fits the served models."""

    network: Network  # predicts the positive drafter's gain over the other
    positive_drafter: str  # "df" or "e3"
    threshold: float  # on the gain, in tokens
    acceptance_length: Mapping[str, float]  # by drafter; empty if not recorded

    @property
    def e3_network(self) -> Network:
        """The network that predicts the gain of `e3` over `df`."""
        return self.network if self.positive_drafter == "e3" else self.network.negated()

    @property
    def e3_threshold(self) -> float:
        """The threshold on the gain of `e3` over `df`, in tokens."""
        return self.threshold if self.positive_drafter == "e3" else -self.threshold


def load_router(path: str, identity: Identity, positive: str | None, threshold: float | None) -> NeuralRouter:
    """Read a router and check that it fits the models. Raises CheckpointError.

    `positive` and `threshold` are the operator's flags, None if not given.
    """
    place = Path(path)
    if place.is_dir():
        config = _read_config(place, identity)
        if positive is not None and positive != config["positive_drafter"]:
            problem = f"its positive drafter is {config['positive_drafter']}, but {FLAG_POSITIVE} is {positive}"
            raise CheckpointError(FLAG_ROUTER_PATH, path, problem, f"remove {FLAG_POSITIVE}")
        network = _named(place / "model.safetensors", _read_tensors(place / "model.safetensors"), identity)
        return NeuralRouter(
            network,
            config["positive_drafter"],
            config["threshold"] if threshold is None else threshold,
            config["acceptance_length"],
        )
    if not place.is_file():
        raise CheckpointError(FLAG_ROUTER_PATH, path, "no such file or folder", _TRAIN)
    network = _bare(place, _read_tensors(place), identity)
    for flag, value, example in ((FLAG_POSITIVE, positive, "e3"), (FLAG_ROUTER_THRESHOLD, threshold, "1.0")):
        if value is None:
            problem = f"a bare file needs {flag}"
            raise CheckpointError(FLAG_ROUTER_PATH, path, problem, f"add e.g. {flag} {example}")
    assert positive is not None and threshold is not None
    return NeuralRouter(network, positive, threshold, {})


def save_router(folder: Path, router: NeuralRouter, identity: Identity, **about: Mapping[str, Any]) -> None:
    """Write the folder. `about`: `training` (source of the data) and `metrics` (results), for the config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(router.network, field).contiguous() for name, field in _TENSORS.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "models": identity.to_json(),
        "hidden_state": HIDDEN_STATE,
        "positive_drafter": router.positive_drafter,
        "threshold": router.threshold,
        "acceptance_length": dict(router.acceptance_length),
        **about,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_config(folder: Path, identity: Identity) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(FLAG_ROUTER_PATH, folder, "has no config.json", "use the output folder of train_router")
    config = read_json(FLAG_ROUTER_PATH, file)

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(FLAG_ROUTER_PATH, file, problem, _TRAIN)

    if config.get("format") != FORMAT:
        raise refuse(f"`format` is {config.get('format')!r}, not {FORMAT!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise refuse(f"`format_version` is {config.get('format_version')!r}; this version reads {FORMAT_VERSION}")
    if missing := sorted(_FIELDS - set(config)):
        raise refuse(f"lacks `{missing[0]}`")
    if config["hidden_state"] != HIDDEN_STATE:
        raise refuse(f"`hidden_state` is {config['hidden_state']!r}; this version reads {HIDDEN_STATE!r}")
    if config["positive_drafter"] not in ("df", "e3"):
        raise refuse(f"`positive_drafter` is {config['positive_drafter']!r}, not df or e3")
    if not is_number(config["threshold"]):
        raise refuse(f"`threshold` is {config['threshold']!r}, not a number")
    lengths = config["acceptance_length"]
    if not isinstance(lengths, dict) or not all(map(is_number, lengths.values())):
        raise refuse(f"`acceptance_length` is {lengths!r}, not numbers by drafter")
    identity.check(FLAG_ROUTER_PATH, file, config["models"])
    return config


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors file as float32. Raises CheckpointError on pickles, broken files, NaN and infinity."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(FLAG_ROUTER_PATH, file, "no such file", "use the output folder of train_router")
    if file.suffix in (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"):
        problem = "is a pickle by its name; pickles can run code when loaded"
        raise CheckpointError(FLAG_ROUTER_PATH, file, problem, "convert it with safetensors.torch.save_file")
    check_file(FLAG_ROUTER_PATH, file)
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(FLAG_ROUTER_PATH, file, f"{name} holds NaN or infinite values", "train it again")
    return tensors


def _named(file: Path, tensors: dict[str, torch.Tensor], identity: Identity) -> Network:
    if set(tensors) != set(_TENSORS):
        problem = f"must hold exactly {', '.join(_TENSORS)}, but holds {', '.join(sorted(tensors)) or 'nothing'}"
        raise CheckpointError(FLAG_ROUTER_PATH, file, problem, _TRAIN)
    return _checked(file, Network(**{field: tensors[name] for name, field in _TENSORS.items()}), identity)


def _bare(file: Path, tensors: dict[str, torch.Tensor], identity: Identity) -> Network:
    """Two linear layers, identified by shape: weights [width, hidden] and [1, width], optional biases [width], [1]."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    last = [tensor for tensor in weights.values() if tensor.shape[0] == 1]
    first = [tensor for tensor in weights.values() if tensor.shape[0] != 1]
    if len(first) != 1 or len(last) != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        problem = f"must hold two linear layers, [width, hidden] and [1, width], but holds {shapes}"
        raise CheckpointError(FLAG_ROUTER_PATH, file, problem, "use a router of this form")
    rows = {tensor.shape[0]: tensor for tensor in tensors.values() if tensor.dim() == 1}
    width = first[0].shape[0]
    bias_in, bias_out = rows.get(width, torch.zeros(width)), rows.get(1, torch.zeros(1))
    return _checked(file, Network(first[0], bias_in, last[0], bias_out), identity)


def _checked(file: Path, network: Network, identity: Identity) -> Network:
    width, hidden = network.weight_in.shape
    if hidden != identity.hidden_size:
        problem = f"reads hidden states of size {hidden}, but the target's are {identity.hidden_size}"
        raise CheckpointError(FLAG_ROUTER_PATH, file, problem, "use a router that was trained for this target")
    expected = ((width, hidden), (width,), (1, width), (1,))
    if tuple(tuple(tensor.shape) for tensor in network) != expected:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in network)
        raise CheckpointError(FLAG_ROUTER_PATH, file, f"its layers do not fit each other ({shapes})", _TRAIN)
    return network
