"""The contract as a record: each name, how and where we use it, and what it is in the release that we are made for.

Fingerprints are of functions whose body we rely on: those that are hooked or overridden, and those named in `words.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from contract.source import Call, Found, Function, Source, fingerprint
from contract.uses import OVERRIDE, SUBCLASS, Use, read
from contract.words import CONTRACT, Words

ROOT = Path(__file__).parents[1]
TERMS = Path(__file__).with_name("terms.json")
PACKAGE = ROOT / "whiflash_sglang"


@dataclass(frozen=True)
class Term:
    """One name of SGLang's."""

    name: str
    uses: tuple[str, ...]  # "hook AFTER", "call", ...
    files: tuple[str, ...]
    module: str  # the part of the name that is a module
    calls: tuple[Call, ...] = ()
    signature: str | None = None
    fingerprint: str | None = None
    members: tuple[str, ...] = ()  # of classes that ours derive from: what they offer
    abstract: tuple[str, ...] = ()


def our_files() -> dict[str, Path]:
    """The server's files that may hold objects of SGLang: training has none."""
    paths = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {shown: path for shown, path in paths.items() if not shown.startswith("training/")}


def installed() -> Path:
    """The folder of the installed SGLang, which is not imported."""
    return Path(str(metadata.distribution("sglang").locate_file("")))


def terms_of(files: Mapping[str, Path], sglang: Source, words: Words) -> tuple[list[Term], list[str]]:
    """The contract of our files with a release, and what stands in its way: what `words.py` does not say."""
    uses, unknown = read(files, sglang, words)
    by_name: dict[str, list[Use]] = {}
    for use in uses:
        by_name.setdefault(use.name, []).append(use)
    missing = [f"{', '.join(files_of(by_name[name]))}: {name} is not in SGLang's source" for name in by_name
               if not exists(sglang, name)]  # fmt: skip
    return [term(name, by_name[name], sglang) for name in sorted(by_name)], sorted([*unknown, *missing])


def term(name: str, uses: list[Use], sglang: Source) -> Term:
    found = sglang.find(name)
    hows = {use.how for use in uses}
    is_base = found is not None and SUBCLASS in hows
    is_relied_on = found is not None and isinstance(found.node, Function) and any(map(relies_on_body, hows))
    return Term(
        name=name,
        uses=tuple(sorted(hows)),
        files=files_of(uses),
        module=module_of(name, sglang),
        calls=tuple(sorted({use.call for use in uses if use.call is not None})),
        signature=shown_signature(sglang, found) if found is not None and is_relied_on else None,
        fingerprint=fingerprint(found.node) if found is not None and is_relied_on else None,
        members=sglang.public_members(found) if found is not None and is_base else (),
        abstract=sglang.abstract_members(found) if found is not None and is_base else (),
    )


def relies_on_body(how: str) -> bool:
    return how in (OVERRIDE, "by name") or how.startswith("hook")


def exists(sglang: Source, name: str) -> bool:
    """Whether a name is there. "MODULE:WORD" is a word in the code of a module."""
    module, is_mention, word = name.partition(":")
    return sglang.holds_word(module, word) if is_mention else sglang.find(name) is not None


def shown_signature(sglang: Source, found: Found) -> str | None:
    signature = sglang.signature(found)
    return None if signature is None else str(signature)


def module_of(name: str, sglang: Source) -> str:
    parts = name.partition(":")[0].split(".")
    return next((".".join(parts[:i]) for i in range(len(parts), 0, -1) if sglang.module(".".join(parts[:i]))), "")


def files_of(uses: Iterable[Use]) -> tuple[str, ...]:
    return tuple(sorted({use.file for use in uses}))


def write(path: Path, version: str, terms: Iterable[Term]) -> None:
    """One line for each name, so that a change of the contract can be read."""
    lines = [json.dumps({k: v for k, v in asdict(entry).items() if v}) for entry in terms]
    path.write_text(f'{{"sglang": {json.dumps(version)}, "terms": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path: Path = TERMS) -> tuple[str, list[Term]]:
    """The release that the contract was recorded with, and its terms."""
    document = json.loads(path.read_text())
    return document["sglang"], [from_json(entry) for entry in document["terms"]]


def from_json(entry: dict[str, Any]) -> Term:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
    calls = [Call(positional, tuple(keywords), is_open) for positional, keywords, is_open in entry.get("calls", ())]
    return Term(**{**values, "calls": tuple(calls)})


def current() -> tuple[str, list[Term], list[str]]:
    """The contract of our code as it is with the installed SGLang; see `terms_of`."""
    terms, unknown = terms_of(our_files(), Source(installed(), assembled=CONTRACT.assembled), CONTRACT)
    return metadata.version("sglang"), terms, unknown
