"""The contract against another release: what would have to change, and what is to be looked at again.

    changes = compare(terms, Source(folder))

A name that is gone is reported once, however much hangs on it; where it can be found in one other place, what hangs on
it is looked for there.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from contract.source import Found, Source, fingerprint, parameters
from contract.terms import Term, exists, shown_signature


class Change(NamedTuple):
    """`must`: our code would fail or be without effect; else somebody has to look whether it is still right."""

    must: bool
    name: str
    files: tuple[str, ...]
    text: str


def compare(terms: Iterable[Term], sglang: Source) -> list[Change]:
    comparison = Comparison(sglang)
    for term in terms:
        comparison.look_at(term)
    return sorted(set(comparison.changes()), key=lambda change: (not change.must, change))


class Comparison:
    """`gone`: by name, which of our files used it or what hangs on it; `moved`: where it is now."""

    def __init__(self, sglang: Source):
        self.sglang = sglang
        self.gone: dict[str, set[str]] = {}
        self.moved: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.found: list[Change] = []

    def changes(self) -> list[Change]:
        gone = [Change(True, name, tuple(sorted(files)), self.texts[name]) for name, files in self.gone.items()]
        return [*gone, *self.found]

    def look_at(self, term: Term) -> None:
        if ":" in term.name:
            self.look_at_mention(term)
            return
        found = self.sglang.find(self.now(term.name))
        if found is None:
            missing = self.first_missing(term)
            if missing not in self.gone:
                self.gone[missing] = set()
                self.texts[missing] = self.where_to(missing, term)
            self.gone[missing] |= {*term.files}
            found = self.sglang.find(self.now(term.name))
            if found is None:
                return
        self.look_at_calls(term, found)
        self.look_at_class(term, found)
        self.look_at_body(term, found)

    def look_at_mention(self, term: Term) -> None:
        module, _, word = term.name.partition(":")
        if not exists(self.sglang, term.name):
            places = self.sglang.mentioning(word)
            text = f"not named in {module} any more; " + (
                f"now in {', '.join(places[:3])}" if places else "nor elsewhere"
            )
            self.found.append(Change(True, term.name, term.files, text))

    def now(self, name: str) -> str:
        """A name with what has moved put in its new place."""
        for old, new in self.moved.items():
            if name == old or name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return name

    def first_missing(self, term: Term) -> str:
        """The shortest part of a name that is gone: of a module that is gone, what we use of it."""
        parts = term.name.split(".")
        first = len(term.module.split(".")) + 1
        for i in range(min(first, len(parts)), len(parts)):
            if self.sglang.find(self.now(".".join(parts[:i]))) is None:
                return ".".join(parts[:i])
        return term.name

    def where_to(self, name: str, term: Term) -> str:
        owner_name, _, last = name.rpartition(".")
        owner = self.sglang.find(self.now(owner_name))
        if owner is not None:
            beside = self.sglang.beside(owner, last)
            if beside:
                return f"gone; in the same file {', '.join(beside)} has it"
            close = get_close_matches(last, self.sglang.names(owner), n=3, cutoff=0.75)
            if close:
                return f"gone; similar there: {', '.join(close)}"
        places = self.sglang.elsewhere(last)
        if not places:
            return "gone"
        if len(places) == 1 and self.fits(places[0], name, term):
            self.moved[name] = places[0]
            return f"moved to {places[0]}"
        return f"gone; of this name there is {', '.join(places[:3])}"

    def fits(self, place: str, name: str, term: Term) -> bool:
        """Whether what is at `place` may be what we used as `name`: outside of classes, and called as we call it."""
        if self.sglang.module(place.rpartition(".")[0]) is None:
            return False
        found = self.sglang.find(place)
        signature = None if found is None or name != term.name else self.sglang.signature(found)
        return signature is None or not any(signature.refuses(call) for call in term.calls)

    def look_at_calls(self, term: Term, found: Found) -> None:
        signature = self.sglang.signature(found)
        if signature is None:
            return
        for call in term.calls:
            refused = signature.refuses(call)
            if refused is not None:
                self.note(True, term, f"{refused}: it is {signature} now")

    def look_at_class(self, term: Term, found: Found) -> None:
        """Of a class that one of ours derives from: what is new in it. What is gone is a name of its own."""
        if not term.members:
            return
        abstract = [name for name in self.sglang.abstract_members(found) if name not in term.abstract]
        new = [name for name in self.sglang.public_members(found) if name not in (*term.members, *abstract)]
        if abstract:
            self.note(True, term, f"has to be implemented: {', '.join(abstract)}")
        if new:
            self.note(False, term, f"new methods, which ours may have to override: {', '.join(new)}")

    def look_at_body(self, term: Term, found: Found) -> None:
        if term.fingerprint is None or fingerprint(found.node) == term.fingerprint:
            return
        signature = shown_signature(self.sglang, found)
        if signature != term.signature:
            is_other = parameters(signature) != parameters(term.signature)
            self.note(is_other, term, f"was {term.signature}, is {signature}")
        else:
            self.note(False, term, "its body has changed")

    def note(self, must: bool, term: Term, text: str) -> None:
        how = next((how for how in term.uses if how.startswith(("hook", "override"))), None)
        self.found.append(Change(must, self.now(term.name), term.files, text if how is None else f"{how}: {text}"))
