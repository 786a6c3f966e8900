"""The contract with SGLang: it names what our code uses, the installed release keeps it, and another one is told apart.

The checker itself is tried on packages of a few lines, `engine`, and on code of ours that uses them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from contract import terms
from contract.changes import Change, compare
from contract.source import Source, fingerprint
from contract.words import CONTRACT, Words

ROOT = Path(__file__).parents[2]
MEND = "run `make contract` and look at what has changed in contract/terms.json"

ENGINE = {
    "engine/__init__.py": "",
    "engine/batch.py": '''
from dataclasses import dataclass
from engine.request import Request


@dataclass
class Batch:
    requests: list[Request]
    size: int = 0

    def merge(self, other, keep=True):
        """Merge."""
        return other  # the larger one
''',
    "engine/request.py": """
class Request:
    def __init__(self, rid):
        self.rid = rid
        self.tokens = []
""",
    "engine/worker.py": """
from abc import ABC, abstractmethod
from engine.batch import Batch


class Worker(ABC):
    @abstractmethod
    def forward(self, batch: Batch): ...

    def warm_up(self, rounds): ...


def reserve(batch, tokens):
    return tokens + 1
""",
    "engine/hooks.py": """
class HookType:
    AFTER = 1


def register(target, hook, how): ...
""",
}

OURS = """
from typing import Any
from engine.batch import Batch
from engine.hooks import HookType, register
from engine.worker import Worker

PLACE = "engine.worker"
register(f"{PLACE}.reserve", lambda result: result, HookType.AFTER)


class OurWorker(Worker):
    def forward(self, batch: Any):
        other = Batch([], size=1)
        batch.merge(other, keep=False)
        return [request.rid for request in batch.requests]

    def warm_up(self, rounds): ...
"""

WORDS = Words(names={"batch": "engine.batch.Batch"})

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a release of the package; `(file, old, new)` is what it has changed, new files come whole."""

    def written(name: str, *edits: tuple[str, str, str], **files: str) -> Path:
        texts = {**ENGINE, **{f"engine/{file}.py": text for file, text in files.items()}}
        for file, old, new in edits:
            assert old in texts[f"engine/{file}.py"]
            texts[f"engine/{file}.py"] = texts[f"engine/{file}.py"].replace(old, new)
        for file, text in texts.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    return written


def read(write: Write, ours: str, words: Words = WORDS) -> tuple[list[terms.Term], list[str]]:
    folder = write("made_for")
    (folder / "ours.py").write_text(ours)
    return terms.terms_of({"ours.py": folder / "ours.py"}, Source(folder, "engine"), words)


def changes(write: Write, *edits: tuple[str, str, str], **files: str) -> list[Change]:
    entries, unknown = read(write, OURS)
    assert unknown == []
    return compare(entries, Source(write("other", *edits, **files), "engine"))


def only(found: list[Change]) -> tuple[bool, str, str]:
    assert len(found) == 1, found
    assert found[0].files == ("ours.py",)
    return found[0].must, found[0].name, found[0].text


# Our code and the installed SGLang


@pytest.fixture(scope="module")
def installed() -> tuple[str, list[terms.Term], list[str]]:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    return terms.current()


def test_nothing_that_is_used_is_unknown(installed: tuple[str, list[terms.Term], list[str]]) -> None:
    assert installed[2] == [], "explain these in contract/words.py, or fix our code"


def test_the_contract_names_what_our_code_uses(installed: tuple[str, list[terms.Term], list[str]]) -> None:
    recorded = {term.name: (term.uses, term.files, term.calls) for term in terms.load()[1]}
    used = {term.name: (term.uses, term.files, term.calls) for term in installed[1]}
    assert sorted(used.keys() - recorded.keys()) == [], f"used, and not in the contract; {MEND}"
    assert sorted(recorded.keys() - used.keys()) == [], f"in the contract, and not used any more; {MEND}"
    assert [name for name in used if used[name] != recorded[name]] == [], f"used in another way; {MEND}"


def test_the_installed_sglang_keeps_the_contract(installed: tuple[str, list[terms.Term], list[str]]) -> None:
    version, recorded = terms.load()
    assert version == installed[0]
    assert compare(recorded, Source(terms.installed(), assembled=CONTRACT.assembled)) == []


def test_hooks_overrides_and_attributes_are_in_the_contract() -> None:
    """One of each kind that is easily missed: a target in an f-string, one in a table, an attribute behind others."""
    uses = {term.name.removeprefix("sglang.srt."): term.uses for term in terms.load()[1]}
    components = "model_executor.model_runner_components"
    assert "hook AROUND" in uses[f"{components}.spec_aux_hidden_state.resolve_spec_aux_hidden_state_config"]
    assert "hook REPLACE" in uses["layers.quantization.unquant.UnquantizedLinearMethod.apply"]
    assert "override" in uses["speculative.base_spec_worker.BaseSpecWorker.alloc_memory_pool"]
    assert "attribute" in uses["managers.schedule_batch.ReqKvInfo.kv_allocated_len"]
    assert "mention" in uses["managers.scheduler:create_future_map"]
    assert "flag" in uses["server_args:--max-total-tokens"]


def test_no_other_folder_uses_sglang() -> None:
    """The contract is read from the server's code alone."""
    for folder in ("agents", "workloads", "scripts", "benchmarks", "whiflash_sglang/training"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            assert not [line for line in lines if line.startswith(("from sglang", "import sglang"))], path


# What is read from our code


def test_uses_are_read_from_code(write: Write) -> None:
    entries, unknown = read(write, OURS)
    assert unknown == []
    uses = {entry.name: entry.uses for entry in entries}
    assert uses["engine.worker.reserve"] == ("hook AFTER",)
    assert uses["engine.worker.Worker"] == ("import", "subclass")
    assert uses["engine.worker.Worker.warm_up"] == ("override",)
    assert uses["engine.batch.Batch.merge"] == ("attribute", "call")
    assert uses["engine.batch.Batch.requests"] == ("attribute",)
    assert uses["engine.request.Request.rid"] == ("attribute",)  # by SGLang's annotation of `requests`


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        (
            "from engine.batch import Batch\ndef f(batch: Batch):\n    batch.sise",
            "engine.batch.Batch.sise is not in SGLang's source",
        ),
        ("from typing import Any\ndef f(thing: Any): ...", "f.thing is annotated Any"),
        ("from engine.batch import Bag", "engine.batch.Bag is not in SGLang's source"),
        ("from engine.request import Request\nRequest(1).tokens[0]", "what is engine.request.Request.tokens?"),
        ("from engine.hooks import HookType, register\nregister(input(), print, HookType.AFTER)", "is no constant"),
        ("from engine.worker import Worker\nclass Ours(Worker):\n    def cool(self): ...", "Ours.cool: who calls it?"),
    ],
)
def test_what_cannot_be_read_is_told(write: Write, ours: str, told: str) -> None:
    _, unknown = read(write, ours, Words())
    assert len(unknown) == 1 and told in unknown[0], unknown


def test_names_listed_by_hand_have_to_be_used(write: Write) -> None:
    words = Words(
        by_name={"ours.py": ("engine.batch.Batch.size",)}, mentions=(("ours.py", "engine.worker", "reserve"),)
    )
    assert read(write, "NAMES = ('size', 'reserve')", words)[1] == []
    _, unknown = read(write, "NAMES = ()", words)
    assert [line.partition(": ")[2] for line in unknown] == [
        "engine.batch.Batch.size is no longer used in ours.py",
        "engine.worker:reserve is no longer used in ours.py",
    ]


def test_words_that_stand_for_nothing_are_told(write: Write) -> None:
    words = Words(names={**WORDS.names, "lot": "engine.batch.Batch"}, values={"engine.request.Request.tokens": "-"})
    assert read(write, "def f(batch):\n    batch.size", words)[1] == [
        "words.py: our code has no engine.request.Request.tokens any more",
        "words.py: our code has no lot any more",
    ]


# What another release changes


def test_the_same_release_changes_nothing(write: Write) -> None:
    assert changes(write) == []


def test_comments_docstrings_and_layout_change_nothing(write: Write) -> None:
    edits = (
        (
            "worker",
            "    return tokens + 1",
            '    """Reserve."""\n\n    # one more\n    return (tokens +\n            1)',
        ),
    )
    assert changes(write, *edits) == []


def test_a_missing_attribute_is_reported(write: Write) -> None:
    found = only(changes(write, ("request", "self.rid = rid", "self.request_id = rid")))
    assert found == (True, "engine.request.Request.rid", "gone")


def test_a_renamed_attribute_is_reported_with_its_like(write: Write) -> None:
    found = only(changes(write, ("batch", "requests:", "requests_:")))
    assert found == (True, "engine.batch.Batch.requests", "gone; similar there: requests_")


def test_an_attribute_that_another_class_of_the_file_has_now(write: Write) -> None:
    moved = "self.info = Info()\n        self.info.id = 1\n\n\nclass Info:\n    rid = 0\n"
    found = only(changes(write, ("request", "self.rid = rid", moved), ("request", "\n        self.tokens = []", "")))
    assert found == (True, "engine.request.Request.rid", "gone; in the same file Info has it")


def test_what_has_moved_is_reported_once_and_looked_at_in_its_new_place(write: Write) -> None:
    text = ENGINE["engine/batch.py"].replace("keep=True", "hold=True")
    found = changes(write, ("batch", "class Batch", "class Lot"), ("worker", "engine.batch", "engine.lots"), lots=text)
    assert [(change.must, change.name, change.text) for change in found] == [
        (True, "engine.batch.Batch", "moved to engine.lots.Batch"),
        (True, "engine.lots.Batch.merge", "takes no argument keep: it is (other, hold=) now"),
    ]


def test_a_signature_that_refuses_our_call_is_reported(write: Write) -> None:
    found = only(changes(write, ("batch", "size: int = 0", "size: int = 0\n    owner: str = field()")))
    assert found == (True, "engine.batch.Batch", "needs owner: it is (requests, size=, owner) now")


def test_a_hooked_function_with_other_parameters_is_reported(write: Write) -> None:
    found = only(changes(write, ("worker", "def reserve(batch, tokens)", "def reserve(tokens)")))
    assert found == (True, "engine.worker.reserve", "hook AFTER: was (batch, tokens), is (tokens)")


def test_an_override_with_other_parameters_is_reported(write: Write) -> None:
    found = only(changes(write, ("worker", "def warm_up(self, rounds)", "def warm_up(self, rounds, device)")))
    assert found == (True, "engine.worker.Worker.warm_up", "override: was (rounds), is (rounds, device)")


def test_an_override_that_nobody_would_call_is_reported(write: Write) -> None:
    found = changes(write, ("worker", "def warm_up(self, rounds)", "def prepare(self, rounds)"))
    assert [(change.must, change.name) for change in found] == [
        (True, "engine.worker.Worker.warm_up"),
        (False, "engine.worker.Worker"),
    ]
    assert "prepare" in found[1].text


def test_a_new_abstract_method_has_to_be_implemented(write: Write) -> None:
    new = "    @abstractmethod\n    def cool(self): ...\n\n    def warm_up"
    found = only(changes(write, ("worker", "    def warm_up", new)))
    assert found == (True, "engine.worker.Worker", "has to be implemented: cool")


def test_a_changed_body_is_to_be_looked_at_again(write: Write) -> None:
    found = only(changes(write, ("worker", "return tokens + 1", "return tokens + 2")))
    assert found == (False, "engine.worker.reserve", "hook AFTER: its body has changed")


def test_the_body_of_what_is_only_called_may_change(write: Write) -> None:
    assert changes(write, ("batch", "return other", "return None")) == []


def test_a_word_that_is_named_elsewhere_now_is_reported(write: Write) -> None:
    words = Words(mentions=(("ours.py", "engine.worker", "reserve"),))
    entries, _ = read(write, "NAME = 'reserve'", words)
    other = write("other", ("worker", "def reserve", "def spare"), pool="def reserve(): ...")
    text = "not named in engine.worker any more; now in engine.pool"
    assert only(compare(entries, Source(other, "engine"))) == (True, "engine.worker:reserve", text)


# Reading a package


def test_names_are_followed_through_reexports_and_bases(write: Write) -> None:
    folder = write(
        "made_for",
        core="from engine.request import Request as Base\nclass Request(Base): ...",
        api="from .core import *",
    )
    found = Source(folder, "engine").find("engine.api.Request.rid")
    assert found is not None and found.name == "engine.request.Request.rid"


def test_a_class_that_is_put_together_at_run_time(write: Write) -> None:
    write("made_for", args="class Args:\n    def check(self): ...\nArgs = assemble(Args)")
    folder = write("made_for", fields="class Model:\n    path: str")
    (folder / "engine/parts").mkdir()
    (folder / "engine/fields.py").rename(folder / "engine/parts/model.py")
    assembled = {"engine.args.Args": "engine.parts"}
    assert Source(folder, "engine").find("engine.args.Args.path") is None
    source = Source(folder, "engine", assembled)
    assert source.find("engine.args.Args.path") is not None and source.find("engine.args.Args.check") is not None
    assert source.holds_word("engine.args", "--path") and not source.holds_word("engine.args", "--size")


def test_a_dataclass_takes_the_fields_of_dataclasses_only(write: Write) -> None:
    """The fields of a base that is none counted as parameters, so that our calls seemed to lack some."""
    text = "class Base:\n    kind: int = 0\n@dataclass\nclass Info(Base):\n    size: int"
    source = Source(write("made_for", info=text), "engine")
    found = source.find("engine.info.Info")
    assert found is not None and str(source.signature(found)) == "(size)"


def test_fingerprints_tell_code_apart(write: Write) -> None:
    source = Source(write("made_for", two="def f(a):\n    return a\ndef g(a):\n    return -a"), "engine")
    f, g = source.find("engine.two.f"), source.find("engine.two.g")
    assert f is not None and g is not None
    assert fingerprint(f.node) != fingerprint(g.node)


# The commands


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "contract", *arguments]
    wide = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(program, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=120)


def test_the_command_fails_for_a_release_without_what_we_use(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    (tmp_path / "sglang-9.9.9.dist-info").mkdir()
    result = command(str(tmp_path))
    assert result.returncode == 1
    assert "SGLang 9.9.9" in result.stdout and "engine._set_envs_and_config" in result.stdout


def test_the_command_names_a_folder_without_sglang(tmp_path: Path) -> None:
    result = command(str(tmp_path))
    assert result.returncode == 2
    assert f"error: {tmp_path} has no package `sglang`" in result.stderr


@pytest.mark.parametrize("version", ["", "newest", "0.5.18; true", "../x"])
def test_the_script_refuses_what_is_no_version(version: str) -> None:
    script = ["bash", "scripts/compat.sh", sys.executable, version]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"VERSION '{version}'" in result.stderr and "VERSION=0.5.18" in result.stderr
