"""The files of a neural router: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.learned import HIDDEN, identity, network
from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.routing.artefact import NeuralRouter, load_router, save_router
from whiflash_sglang.routing.neural import Folded, NeuralScore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    router = NeuralRouter(network(), "e3", 0.75, {"df": 5.5, "e3": 5.0})
    save_router(tmp_path / "router", router, identity(), training={"sessions": 3}, metrics={})
    return tmp_path / "router"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_is_saved_is_loaded(folder: Path) -> None:
    router = load_router(str(folder), identity(), None, None)
    assert (router.positive_drafter, router.threshold, router.acceptance_length["df"]) == ("e3", 0.75, 5.5)
    assert all(torch.equal(a, b) for a, b in zip(router.network, network(), strict=True))


def test_a_given_threshold_wins(folder: Path) -> None:
    assert load_router(str(folder), identity(), None, -0.5).threshold == -0.5


def test_the_network_is_linear_gelu_linear() -> None:
    hidden = torch.randn(3, HIDDEN)
    weight_in, bias_in, weight_out, bias_out = network()
    expected = torch.nn.functional.gelu(hidden @ weight_in.T + bias_in) @ weight_out.T + bias_out
    assert torch.allclose(network()(hidden), expected[:, 0], atol=1e-6)


def test_a_router_of_the_other_sign_decides_the_same() -> None:
    """df as the positive drafter: what it says is turned round, threshold and all."""
    turned = NeuralRouter(network().negated(), "df", -0.75, {})
    hidden = torch.randn(50, HIDDEN)
    assert torch.allclose(turned.e3_network(hidden), network()(hidden), atol=1e-6)
    assert turned.e3_threshold == 0.75


def test_scores_are_kept_by_request() -> None:
    score = NeuralScore(network(), 8)
    hidden = torch.randn(2, HIDDEN)
    score.keep([6, 1], score.observe(torch.zeros(2, 3), hidden, torch.arange(2)).tolist())
    assert score.read([1, 6]) == pytest.approx(network()(hidden).flip(0).tolist(), abs=1e-5)


def test_the_folded_network_is_the_same_function() -> None:
    hidden = 3 * torch.randn(400, HIDDEN)
    assert torch.allclose(Folded.of(network())(hidden), network()(hidden), atol=1e-4)


@pytest.mark.parametrize("with_biases", [True, False])
def test_a_bare_file_with_any_names(tmp_path: Path, with_biases: bool) -> None:
    names = ("head.fc2.w", "head.fc1.w", "b1", "b2")
    weight_in, bias_in, weight_out, bias_out = network()
    tensors = dict(zip(names, (weight_out, weight_in, bias_in, bias_out), strict=True))
    if not with_biases:
        tensors = {name: tensors[name] for name in names[:2]}
    save_file(tensors, tmp_path / "router.safetensors")
    router = load_router(str(tmp_path / "router.safetensors"), identity(), "df", 1.0)
    assert (router.positive_drafter, router.threshold) == ("df", 1.0)
    assert torch.equal(router.network.weight_in, weight_in)
    assert bool(router.network.bias_in.any()) == with_biases


@pytest.mark.parametrize(
    ("positive", "threshold", "flag"),
    [(None, 1.0, "--whiflash-positive-drafter"), ("e3", None, "--whiflash-neural-router-threshold")],
)
def test_a_bare_file_needs_what_it_does_not_say(
    tmp_path: Path, positive: str | None, threshold: float | None, flag: str
) -> None:
    file = tmp_path / "router.safetensors"
    save_file({"a": network().weight_in, "b": network().weight_out}, file)
    with pytest.raises(CheckpointError, match=f"a bare file needs {flag}; add"):
        load_router(str(file), identity(), positive, threshold)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "another format": (lambda folder: edit(folder, format="x"), "`format` is 'x'"),
    "a newer version": (lambda folder: edit(folder, format_version=2), "`format_version` is 2"),
    "another state": (lambda folder: edit(folder, hidden_state="layer 3"), "`hidden_state` is 'layer 3'"),
    "no drafter": (lambda folder: edit(folder, positive_drafter="ddt"), "`positive_drafter` is 'ddt'"),
    "no number": (lambda folder: edit(folder, threshold="high"), "`threshold` is 'high'"),
    "lengths": (lambda folder: edit(folder, acceptance_length={"df": None}), "`acceptance_length`"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "cut short": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x02}"), "truncated"),
    "other tensors": (
        lambda folder: save_file({"x": torch.zeros(2)}, folder / "model.safetensors"),
        "must hold exactly in.weight",
    ),
    "NaN": (
        lambda folder: save_network(folder, network()._replace(bias_in=torch.full((4,), float("nan")))),
        "in.bias holds NaN",
    ),
    "another size": (
        lambda folder: save_network(folder, network()._replace(weight_in=torch.zeros(4, 9))),
        "hidden states of size 9, but the target's are 6",
    ),
    "layers that do not fit": (
        lambda folder: save_network(folder, network()._replace(weight_out=torch.zeros(1, 3))),
        "do not fit each other",
    ),
}


def save_network(folder: Path, changed: Any) -> None:
    names = ("in.weight", "in.bias", "out.weight", "out.bias")
    save_file(dict(zip(names, changed, strict=True)), folder / "model.safetensors")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(folder: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    spoil(folder)
    with pytest.raises(CheckpointError, match="--whiflash-neural-router-path") as caught:
        load_router(str(folder), identity(), None, None)
    assert message in str(caught.value)
    assert ";" in str(caught.value), "a fix is named"


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (identity(hidden_size=8), "hidden size 6, but this one's is 8"),
        (identity(target="o" * 16), "made for another target"),
        (identity(drafters={"df": "o" * 16, "e3": "e" * 16}), "made for other drafters"),
        (replace(identity(), drafters={"df": "d" * 16}), "made for other drafters"),
        (identity(eagle_steps=3), "made with --whiflash-eagle-steps 5, but 3 are served"),
    ],
)
def test_made_for_other_models(folder: Path, served: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_router(str(folder), served, None, None)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "router.pt"
    torch.save({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is a pickle by its name"):
        load_router(str(file), identity(), "e3", 1.0)
    disguised = file.rename(tmp_path / "router.safetensors")
    with pytest.raises(CheckpointError, match=r"not a safetensors file|corrupt header"):
        load_router(str(disguised), identity(), "e3", 1.0)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_router(str(tmp_path / "nowhere"), identity(), None, None)


def test_a_bare_file_of_another_form(tmp_path: Path) -> None:
    file = tmp_path / "router.safetensors"
    save_file({"a": torch.zeros(4, HIDDEN), "b": torch.zeros(4, 4), "c": torch.zeros(1, 4)}, file)
    with pytest.raises(CheckpointError, match="must hold two linear layers"):
        load_router(str(file), identity(), "e3", 1.0)
