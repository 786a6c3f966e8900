"""Which package may import which: the layers of the server, and clients that know nothing of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = "whiflash_sglang"
ALLOWED = {
    "core": set(),
    "startup": {"core"},
    "routing": {"core", "startup"},
    "drafters": {"core", "startup"},
    "cpu": {"startup"},
    "bridge": {"core", "startup", "drafters"},
    "serving": {"core", "startup", "routing", "drafters", "bridge"},
    "plugin": {"startup", "cpu", "bridge", "serving"},
    "launch_server": {"core", "startup", "routing", "cpu", "bridge"},
    "training": {"core", "startup", "routing", "serving", "launch_server", "whiflash_workloads"},
    "calibrate": {"core", "startup", "routing", "training", "whiflash_workloads"},
}
WITHOUT_SGLANG = {"core", "routing", "startup", "training", "calibrate", "plugin"}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it, without SGLang's types for type checkers."""
    tree = ast.parse(file.read_text())
    typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    types = {node for block in typing for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node in types and node.module.startswith("sglang."):
                continue
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def arrows(package: str) -> set[str]:
    """What a sub-package or module of the server imports: others of the server, and packages beside it."""
    place = ROOT / SERVER / package
    found = set()
    for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for name in imports(file):
            first, _, rest = name.partition(".")
            found.add(rest.partition(".")[0] if first == SERVER else first)
    return found - {package}


def test_every_package_has_its_layer() -> None:
    entries = {path.stem for path in (ROOT / SERVER).iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert entries - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    others = {*ALLOWED, "whiflash_agents", "whiflash_workloads", "tests"}
    assert arrows(package) & others <= ALLOWED[package]
    if package in WITHOUT_SGLANG:
        assert "sglang" not in arrows(package)


def test_the_layers_have_no_circle() -> None:
    left = dict(ALLOWED)
    while left:
        lowest = [name for name, below in left.items() if not below & set(left)]
        assert lowest, left
        for name in lowest:
            del left[name]


@pytest.mark.parametrize("client", ["agents", "workloads"])
def test_clients_import_nothing_of_the_server(client: str) -> None:
    for file in (ROOT / client).rglob("*.py"):
        found = [name for name in imports(file) if name.partition(".")[0] in (SERVER, "sglang")]
        assert not found, file
