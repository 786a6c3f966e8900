"""What another release of SGLang would change for our server; used by `make compat VERSION=0.5.18`.

    python scripts/compat.py 0.5.18      compare the installed release with 0.5.18 (needs the network the first time)
    python scripts/compat.py --record    write tests/unit/fingerprints.json for the installed release

Both releases are read and never imported; the other one lies in .runs/compat/VERSION, without its requirements.

types          a type checker reads our code with either release; findings are the errors that only the other one has
fingerprints   of the functions that we hook, override or lean on (compat.toml)
new members    of the classes that ours derive from
mentions       words and flags that SGLang's code must hold (compat.toml)

Exit status 0: nothing has to change; 1: something has to; 2: the release could not be checked.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "whiflash_sglang"
RUNS = ROOT / ".runs" / "compat"
FINGERPRINTS = ROOT / "tests" / "unit" / "fingerprints.json"
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
CHECKER = "basedpyright==1.40.2"  # infers the types of code without annotations, which mypy does not
RULES = (
    "reportAbstractUsage",
    "reportAttributeAccessIssue",
    "reportCallIssue",
    "reportImplicitAbstractClass",
    "reportIncompatibleMethodOverride",
    "reportIncompatibleVariableOverride",
    "reportMissingImports",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Body = ast.Module | ast.ClassDef


class Finding(NamedTuple):
    """`must`: our code has to change; else somebody has to check that it is still right."""

    must: bool
    name: str
    text: str
    files: tuple[str, ...]


class Found(NamedTuple):
    """A definition and the module that holds it."""

    node: ast.AST
    module: str


class Release:
    """The source of the package `sglang` in the folder `root`."""

    def __init__(self, root: Path):
        self.root, self.srt = root, root / "sglang" / "srt"
        self.tree = cache(lambda module: ast.parse(self.text(module)))

    def text(self, module: str) -> str:
        """A module's code; empty if there is none."""
        path = self.root.joinpath(*module.split("."))
        files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((file.read_text() for file in files if file.is_file()), "")

    def find(self, name: str) -> Found | None:
        """The definition of a member of a module or class, through re-exports and base classes."""
        owner, _, last = name.rpartition(".")
        if not owner.startswith("sglang"):
            return None
        tree = self.tree(owner)
        if not tree.body:
            return next((Found(cls[last], module) for cls, module in self.lineage(owner) if last in cls), None)
        if last in (own := members(tree)):
            return Found(own[last], owner)
        return self.find(imports(tree, owner).get(last, ""))

    def lineage(self, name: str) -> Iterator[tuple[dict[str, ast.AST], str]]:
        """The members and the module of a class and of each of its bases within the package, nearest first."""
        found = self.find(name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return
        yield members(found.node), found.module
        known = imports(self.tree(found.module), found.module)
        for base in map(ast.unparse, found.node.bases):
            yield from self.lineage(known.get(base, f"{found.module}.{base}"))

    def where_now(self, name: str) -> str:
        """The files that have this name, or define a class or function of it."""
        defined = re.compile(rf"^ *(class|def|async def) {re.escape(name)}\b", re.MULTILINE)
        files = [
            file for file in sorted(self.srt.rglob("*.py")) if file.stem == name or defined.search(file.read_text())
        ]
        return f"; now in {', '.join(str(file.relative_to(self.srt)) for file in files[:3])}" if files else ""

    def has_flag(self, flag: str) -> bool:
        """Whether ServerArgs has a flag or, since 0.5.20 in other files, the field of a flag."""
        fields = "".join(file.read_text() for file in self.srt.glob("arg_groups/fields/*.py"))
        text = self.text("sglang.srt.server_args") + fields
        field = flag.removeprefix("--").replace("-", "_")
        return f'"{flag}"' in text or re.search(rf"^    {field}:", text, re.MULTILINE) is not None


@cache
def members(node: Body) -> dict[str, ast.AST]:
    """What a module or a class defines, also under `if` and `try`."""
    found: dict[str, ast.AST] = {}
    for statement in flat(node.body):
        if isinstance(statement, Function | ast.ClassDef):
            is_setter = any(ast.unparse(decorator).endswith(".setter") for decorator in statement.decorator_list)
            found |= {} if is_setter else {statement.name: statement}
        for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, statement)  # ServerArgs = put_together(ServerArgs)
    return found


def flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            handlers = [inner for handler in getattr(statement, "handlers", []) for inner in handler.body]
            yield from flat([*statement.body, *statement.orelse, *handlers])


@cache
def imports(tree: ast.Module, module: str = "") -> dict[str, str]:
    """Names that `from ... import` binds, in functions too, and what they stand for."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    full = {node: ".".join([*module.split(".")[: -node.level], node.module or ""]) for node in nodes if node.level}
    return {alias.asname or alias.name: f"{full.get(n, n.module)}.{alias.name}" for n in nodes for alias in n.names}


def fingerprint(node: ast.AST) -> str:
    """A hash of code without its comments, docstrings and layout."""
    node = copy.deepcopy(node)
    for inner in ast.walk(node):
        if isinstance(inner, Body | Function):
            inner.body = [one for one in inner.body if not (isinstance(one, ast.Expr) and is_text(one.value))]
    dump = ast.dump(node).replace(", type_params=[]", "")  # new in Python 3.12
    return hashlib.sha256(dump.encode()).hexdigest()[:12]


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def parameters(node: ast.AST) -> str:
    """The parameters of a function without their types; empty for anything else."""
    if not isinstance(node, Function):
        return ""
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


class Used(NamedTuple):
    """Names of SGLang -> (how we use them, our file): functions, and classes that ours derive from."""

    names: dict[str, tuple[str, str]]
    bases: dict[str, str]


def used(release: Release, ours: Path = OURS, leans_on: Mapping[str, list[str]] = TABLE["leans_on"]) -> Used:
    """What our code hooks, overrides or leans on."""
    names = {f"{cls}.{name}": ("by name", "") for cls, own in leans_on.items() for name in own}
    bases: dict[str, str] = {}
    for path in sorted(ours.rglob("*.py")):
        file, tree = str(path.relative_to(ours)), ast.parse(path.read_text())
        names |= {name: (f"hook {how}", file) for name, how in hooks(tree) if name.startswith("sglang.")}
        known = imports(tree)
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for base in (known.get(ast.unparse(base), "") for base in cls.bases):
                offered = {name for own, _ in release.lineage(base) for name in own if not name.startswith("__")}
                names |= {f"{base}.{name}": ("override", file) for name in {*members(cls)} & offered}
                bases |= {base: file} if offered else {}
    return Used(names, bases)


def hooks(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(target, kind) of every hook, written as (target, function, HookType.kind) in a call or a table."""
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_text(node.value)]
    texts = {ast.unparse(target): node.value.value for node in constants for target in node.targets}
    for node in ast.walk(tree):
        entry = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        if len(entry) == 3 and (kind := ast.unparse(entry[2])).startswith("HookType."):
            yield eval(ast.unparse(entry[0]), {}, texts), kind.removeprefix("HookType.")


def fingerprints(release: Release) -> dict[str, str]:
    """Name -> fingerprint of everything that we hook, override or lean on; "gone" if it is not there."""
    found = {name: release.find(name) for name in sorted(used(release).names)}
    return {name: "gone" if one is None else fingerprint(one.node) for name, one in found.items()}


def compare(ours: Used, made_for: Release, other: Release) -> Iterator[Finding]:
    """What has changed in what we hook, override or lean on, and in the classes that ours derive from."""
    for name, (how, file) in ours.names.items():
        old, new = made_for.find(name), other.find(name)
        if old is None or new is None:
            yield Finding(True, name, f"{how}: gone{other.where_now(name.rpartition('.')[2])}", (file,))
        elif parameters(old.node) != parameters(new.node):  # of overrides, the type checker tells what must change
            text = f"{how}: was {parameters(old.node)}, is {parameters(new.node)}"
            yield Finding(how.startswith("hook"), name, text, (file,))
        elif fingerprint(old.node) != fingerprint(new.node):
            yield Finding(False, name, f"{how}: its body has changed", (file,))
    for base, file in ours.bases.items():
        old_names, new_names = ({name for own, _ in one.lineage(base) for name in own} for one in (made_for, other))
        if new_members := sorted(name for name in new_names - old_names if not name.startswith("_")):
            yield Finding(False, base, f"new members, to override? {', '.join(new_members)}", (file,))


def missing_words(release: Release) -> Iterator[Finding]:
    """Words and flags that SGLang's code has to hold and does not."""
    for module, words in TABLE["mentions"].items():
        for word in words:
            if re.search(rf"\b{re.escape(word)}\b", release.text(module)) is None:
                yield Finding(True, f"{module}: {word}", f"not named there{release.where_now(word)}", ())
    for file in TABLE["flags"]["files"]:
        texts = [node.value for node in ast.walk(ast.parse((OURS / file).read_text())) if is_text(node)]
        flags = {found[1] for text in texts if (found := re.fullmatch(r"(--[a-z-]*[a-z])(=\S*)?", text))}
        for flag in sorted(flags.union(TABLE["flags"]["set"])):
            if not re.fullmatch(TABLE["flags"]["own"], flag) and not release.has_flag(flag):
                yield Finding(True, flag, "no such flag", (file,))


def new_errors(made_for: Release, other: Release) -> Iterator[Finding]:
    """The type checker's errors in our code that it has with `other` and not with `made_for`, one per message."""
    places: dict[str, list[str]] = {}
    for message, place in sorted(errors(other) - errors(made_for)):
        places.setdefault(message, []).append(place)
    for message, where in places.items():
        name = "".join(re.findall(r'^(?:Cannot access attribute |Import )?"(?:\w+\.)*(\w+)"', message))
        if not name or 'class "ServerArgs' not in message or not other.has_flag(name):
            yield Finding(True, message, other.where_now(name).removeprefix("; ") if name else "", tuple(where))


def errors(release: Release) -> set[tuple[str, str]]:
    """(message, file:line) of every error in our code, as type checked with a release."""
    config = RUNS / f"{release.root.name}.json"
    ours = {"include": [str(OURS)], "exclude": [str(OURS / "training")], "extraPaths": [str(release.root), str(ROOT)]}
    environment = {"venvPath": str(RUNS), "venv": others().name, "pythonVersion": "3.11"}
    config.write_text(json.dumps({"typeCheckingMode": "off", **dict.fromkeys(RULES, "error"), **ours, **environment}))
    checker = os.environ | {"PYTHONPATH": str(installed(CHECKER, "--target", str(RUNS / "checker")))}
    command = [sys.executable, "-m", "basedpyright", "-p", config, "--outputjson"]
    output = subprocess.run(command, env=checker, stdout=subprocess.PIPE, text=True, check=False).stdout
    found = set()
    for error in json.loads(output)["generalDiagnostics"]:
        message = error["message"].replace("Cannot assign to", "Cannot access")
        if message.startswith("Cannot access") and "is unknown" not in message:
            continue  # another type is assigned
        found.add(
            (message.splitlines()[0], f"{Path(error['file']).relative_to(OURS)}:{error['range']['start']['line'] + 1}")
        )
    return found


def others() -> Path:
    """A virtual environment for the type checker with links to all installed packages but SGLang.

    In its torch, nn.Module has no `__getattr__`: its type says that every module has every attribute.
    """
    folder, site = RUNS / "others", Path(str(metadata.distribution("torch").locate_file("")))
    site_copy, patched = folder / "lib" / "python3.11" / "site-packages", Path("torch/nn/modules/module.py")
    if not (site_copy / patched).exists():
        for parent in reversed(patched.parents):
            (site_copy / parent).mkdir(parents=True, exist_ok=True)
            for path in (site / parent).iterdir():
                if path != site / "sglang" and not (site / patched).is_relative_to(path):
                    (site_copy / parent / path.name).symlink_to(path)
        (site_copy / patched).write_text((site / patched).read_text().replace("def __getattr__(", "def _getattr("))
    return folder


def installed(requirement: str, *options: str) -> Path:
    """Install a package into a folder of its own, once."""
    folder = Path(options[-1])
    if not (folder / ".complete").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, *options, requirement], check=True)
        (folder / ".complete").touch()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="What another release of SGLang would change for our server.")
    parser.add_argument("version", nargs="?", default="")
    parser.add_argument("--record", action="store_true", help="write the fingerprints of the installed release")
    arguments = parser.parse_args()
    site = Path(str(metadata.distribution("sglang").locate_file("")))
    if arguments.record:
        FINGERPRINTS.write_text(json.dumps(fingerprints(Release(site)), indent=0) + "\n")
        return 0
    if not re.fullmatch(r"\d+(\.\d+)*((rc|\.post)\d+)?", arguments.version):
        parser.error(f"{arguments.version!r} is no release of SGLang; name one, e.g. make compat VERSION=0.5.18")
    here = RUNS / "installed"
    here.mkdir(parents=True, exist_ok=True)
    if not (here / "sglang").exists():
        (here / "sglang").symlink_to(site / "sglang")
    try:
        folder = installed(f"sglang=={arguments.version}", "--no-deps", "--target", str(RUNS / arguments.version))
        made_for, other = Release(here), Release(folder)
        ours = used(made_for)
        found = [*new_errors(made_for, other), *compare(ours, made_for, other), *missing_words(other)]
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for must, title in ((True, "has to change"), (False, "look at it again")):
        print(f"\n{title}:")
        for finding in (one for one in found if one.must == must):
            print(f"  {finding.name}", *filter(None, [finding.text, ", ".join(finding.files)]), sep="\n      ")
    musts = sum(finding.must for finding in found)
    print(f"\nSGLang {arguments.version}: {musts} to change, {len(found) - musts} to look at again")
    return 1 if musts else 0


if __name__ == "__main__":
    sys.exit(main())
