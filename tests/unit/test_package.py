"""What an installation promises: a base install without servers, pins in agreement, an import order that holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHERS_WITHOUT_SGLANG = (
    *("launch_server", "bridge.http_routes", "bridge.replicas", "bridge.shutdown", "drafters.ingest_kernel"),
    *("serving.metrics", "serving.ranks"),
)
HEAVY = {"sglang", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton"}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "server.lock").read_text().splitlines()
    pins = [line.partition(";")[0].strip().partition("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, _, version in pins}


def test_the_base_install_is_for_clients() -> None:
    assert not {name_of(requirement) for requirement in PROJECT["dependencies"]} & HEAVY


def test_the_server_extra_pins_sglang() -> None:
    assert "sglang==0.5.17" in PROJECT["optional-dependencies"]["server"]


def test_the_lock_pins_everything_that_the_project_names() -> None:
    extras = {
        name: extra for name, extra in PROJECT["optional-dependencies"].items() if name != "gateway"
    }  # not installed
    named = [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]
    pins = locked()
    assert {name_of(requirement) for requirement in named} <= set(pins)
    assert all(pins.values())


def test_the_lock_holds_the_versions_that_sglang_was_tried_with() -> None:
    pins = locked()
    versions = {name: pins[name] for name in ("sglang", "torch", "transformers", "openai")}
    assert versions == {"sglang": "0.5.17", "torch": "2.11.0", "transformers": "5.12.1", "openai": "2.6.1"}


def test_the_lock_names_no_host() -> None:
    text = (ROOT / "requirements" / "server.lock").read_text()
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", text)


def imports_of(statement: str, forbidden: set[str]) -> list[str]:
    """Which of `forbidden` a fresh interpreter has loaded after `statement`."""
    program = f"{statement}; import sys; print(*sorted({forbidden!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    return result.stdout.split()


def modules_of(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("package", ["whiflash_agents", "whiflash_workloads"])
def test_clients_import_neither_sglang_nor_torch(package: str) -> None:
    assert imports_of("import " + ", ".join(modules_of(package)), {"sglang", "torch", "transformers"}) == []


@pytest.mark.slow  # it starts a program that imports torch and all of the core
def test_the_core_imports_without_sglang() -> None:
    client_side = [name for part in ("core", "routing", "startup") for name in modules_of(f"whiflash_sglang/{part}")]
    others = [f"whiflash_sglang.{name}" for name in OTHERS_WITHOUT_SGLANG]
    modules = [*client_side, *others]
    assert imports_of("import " + ", ".join(modules), {"sglang"}) == []


def test_the_flag_and_error_modules_import_without_torch() -> None:
    core = ("errors", "hints", "spans")
    modules = ", ".join([*modules_of("whiflash_sglang/startup"), *(f"whiflash_sglang.core.{name}" for name in core)])
    assert imports_of(f"import {modules}", {"sglang", "torch"}) == []
