"""What we hook, override or lean on in SGLang is as it was when our code was written.

`scripts/compat.py` is tested with a package of a few lines, `sglang`, and code of ours that uses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tests.scripts import load_script

compat = load_script("compat")

SGLANG = {
    "batch.py": "from sglang.request import Request\n",
    "request.py": """
class Request:
    def end(self, reason):
        '''End.'''
        return reason
""",
    "worker.py": "from sglang.batch import Request\n\n\nclass Worker(Request):\n    def warm_up(self, rounds): ...\n",
}
OURS = """
from sglang.worker import Worker

PLACE = "sglang.worker"
register(f"{PLACE}.Worker.end", print, HookType.AFTER)


class Ours(Worker):
    def warm_up(self, rounds): ...
"""


def release(folder: Path, **files: str) -> compat.Release:
    """A release of the package, with the given files instead of its own."""
    (folder / "sglang").mkdir(parents=True)
    for name, text in {**SGLANG, **{f"{name}.py": text for name, text in files.items()}}.items():
        (folder / "sglang" / name).write_text(text)
    return compat.Release(folder)


Findings = Callable[..., list[tuple[bool, str, str]]]


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    """Compare the package with a release of it that has other files: [(must, name, text)]."""
    made_for = release(tmp_path / "made_for")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "ours.py").write_text(OURS)

    def compared(**files: str) -> list[tuple[bool, str, str]]:
        ours = compat.used(made_for, tmp_path / "ours", {})
        return [found[:3] for found in compat.compare(ours, made_for, release(tmp_path / "other", **files))]

    return compared


def test_the_installed_sglang_is_what_our_code_was_written_for() -> None:
    site = Path(str(metadata.distribution("sglang").locate_file("")))
    now, recorded = compat.fingerprints(compat.Release(site)), json.loads(compat.FINGERPRINTS.read_text())
    changed = [name for name in sorted(now | recorded) if now.get(name) != recorded.get(name)]
    assert not changed, "check these, then run `python scripts/compat.py --record`"
    assert "gone" not in now.values()
    assert list(compat.missing_words(compat.Release(site))) == []


def test_hooks_and_overrides_are_recorded() -> None:
    names = {name.removeprefix("sglang.srt.") for name in json.loads(compat.FINGERPRINTS.read_text())}
    assert "layers.quantization.unquant.UnquantizedLinearMethod.apply" in names  # of a table
    assert "managers.tokenizer_manager.TokenizerManager.sigterm_watchdog" in names  # of an f-string
    assert "speculative.base_spec_worker.BaseSpecWorker.alloc_memory_pool" in names  # overridden
    assert "sampling.sampling_batch_info.SamplingBatchInfo.top_ps" in names  # of the table


def test_comments_docstrings_and_layout_change_nothing(findings: Findings) -> None:
    request = SGLANG["request.py"].replace("End.", "Finish.").replace("return reason", "return (reason)  # why")
    assert findings(request=request) == []


@pytest.mark.parametrize(
    "old, new, must, text",
    [
        ("return reason", "return None", False, "hook AFTER: its body has changed"),
        ("self, reason", "self, why=None", True, "hook AFTER: was (self, reason), is (self, why=None)"),
        ("def end", "def finish", True, "hook AFTER: gone"),
    ],
)
def test_a_hooked_method_that_changes_is_found(findings: Findings, old: str, new: str, must: bool, text: str) -> None:
    """Through a base class and a re-export."""
    found = findings(request=SGLANG["request.py"].replace(old, new))
    assert found[0] == (must, "sglang.worker.Worker.end", text)


def test_an_override_and_new_members_are_to_be_looked_at(findings: Findings) -> None:
    worker = SGLANG["worker.py"].replace("rounds): ...", "rounds, device): ...\n\n    def cool(self): ...")
    assert findings(worker=worker) == [
        (False, "sglang.worker.Worker.warm_up", "override: was (self, rounds), is (self, rounds, device)"),
        (False, "sglang.worker.Worker", "new members, to override? cool"),
    ]


def test_only_new_errors_of_the_type_checker_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_for, other = release(tmp_path / "made_for"), release(tmp_path / "other")
    (other.root / "sglang" / "srt").mkdir()
    (other.root / "sglang" / "srt" / "server_args.py").write_text("class ServerArgs:\n    port: int\n")
    (other.root / "sglang" / "srt" / "workers.py").write_text("class Worker: ...\n")
    known = ("Expected 1 positional argument", "a.py:1")
    of_arguments = [f'Cannot access attribute "{name}" for class "ServerArgs"' for name in ("port", "url")]
    moved = '"Worker" is unknown import symbol'
    new = {(moved, "a.py:2"), (moved, "b.py:3"), *((message, "b.py:4") for message in of_arguments)}
    monkeypatch.setattr(compat, "errors", {made_for: {known}, other: {known, *new}}.__getitem__)
    assert sorted(compat.new_errors(made_for, other)) == [
        (True, moved, "now in workers.py", ("a.py:2", "b.py:3")),
        (True, of_arguments[1], "", ("b.py:4",)),  # a field is put into ServerArgs when it is imported
    ]


@pytest.mark.parametrize("version", ["", "main", "0.5.18; ls"])
def test_other_words_than_a_release_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compat.py", version])
    with pytest.raises(SystemExit) as stopped:
        compat.main()
    assert stopped.value.code == 2
