"""python -m contract: see the package's docstring. Exit status 0: nothing has to change; 1: something has to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from contract import terms
from contract.changes import Change, compare
from contract.source import Source
from contract.words import CONTRACT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contract", description="The contract with SGLang.")
    parser.add_argument("folder", nargs="?", type=Path, help="the folder that the package `sglang` lies in")
    parser.add_argument("--record", action="store_true", help="write terms.json for the installed SGLang")
    arguments = parser.parse_args()
    if arguments.record == (arguments.folder is not None):
        parser.error("give either a folder or --record")
    sys.exit(record() if arguments.record else check(arguments.folder))


def record() -> int:
    version, entries, unknown = terms.current()
    if unknown:
        print("explain these in contract/words.py, or fix our code:", *unknown, sep="\n  ", file=sys.stderr)
        return 1
    terms.write(terms.TERMS, version, entries)
    print(f"{len(entries)} names of SGLang {version}")
    return 0


def check(folder: Path) -> int:
    if not (folder / "sglang" / "__init__.py").is_file():
        print(f"error: {folder} has no package `sglang`; give the folder that it lies in", file=sys.stderr)
        return 2
    made_for, entries = terms.load()
    changes = compare(entries, Source(folder, assembled=CONTRACT.assembled))
    console = Console()
    version = version_in(folder)
    for must, title in ((True, "has to change"), (False, "look at it again")):
        chosen = [change for change in changes if change.must == must]
        if chosen:
            console.print(table(f"{title}: {made_for} to {version}", chosen))
    musts = sum(change.must for change in changes)
    console.print(
        f"SGLang {version}, of {len(entries)} names: {musts} to change, {len(changes) - musts} to look at again "
        f"(made for {made_for})",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if musts else 0


def table(title: str, changes: list[Change]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("name", "used in", "what"):
        made.add_column(column, overflow="fold")
    for change in changes:
        made.add_row(change.name, ", ".join(change.files), change.text)
    return made


def version_in(folder: Path) -> str:
    """The release in a folder, by the name of its metadata."""
    found = sorted(folder.glob("sglang-*.dist-info"))
    return found[0].name.removeprefix("sglang-").removesuffix(".dist-info") if found else "of unknown version"


if __name__ == "__main__":
    main()
