"""Hashes beside the files: every difference is named, and an unchanged file is read once."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from helpers.base import hashes
from helpers.base.hashes import HASHES, changes, file_hash, share_hashes, write_hashes


@pytest.fixture
def recorded(tmp_path):
    """A folder of three files that libraries read, one that they do not, and its record."""
    for name, text in {"config.json": "{}", "weights.safetensors": "abcdefgh", "README.md": "words"}.items():
        (tmp_path / name).write_text(text)
    write_hashes(tmp_path, "tiny")
    return tmp_path


def settle(*files):
    """Let the files be older than the time in which a second change could go unseen."""
    newest = max(file.stat().st_ctime_ns for file in files)
    time.sleep(max(0, (newest + hashes._SETTLED - time.time_ns()) / 1e9 + 0.01))


def test_a_record_holds_the_published_hashes(recorded):
    told = json.loads((recorded / HASHES).read_text())
    assert told == {
        "of": "tiny",
        "sha256": {
            "config.json": hashlib.sha256(b"{}").hexdigest(),
            "weights.safetensors": hashlib.sha256(b"abcdefgh").hexdigest(),
        },
    }
    assert changes(recorded) == changes(recorded, "tiny") == []


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda folder: (folder / "weights.safetensors").write_text("abcdefgx"), "weights.safetensors is not the file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json does not belong"),
        (lambda folder: (folder / HASHES).unlink(), f"{HASHES} is missing"),
        (lambda folder: (folder / HASHES).write_text('{"of": "tiny", "sha'), f"{HASHES} is damaged"),
        (lambda folder: (folder / HASHES).write_text('{"of": "tiny", "sha256": []}'), f"{HASHES} is damaged"),
        (lambda folder: (folder / HASHES).write_text('{"of": "", "sha256": {"../a": "b"}}'), f"{HASHES} is damaged"),
    ],
)
def test_every_difference_is_named(recorded, change, phrase):
    change(recorded)
    (told,) = changes(recorded, "tiny")
    assert told.startswith(phrase)


def test_the_record_of_another_model_is_refused(recorded):
    assert changes(recorded, "other") == [f"{HASHES} is of tiny, not of other"]


def test_documentation_may_change(recorded):
    (recorded / "README.md").write_text("other words")
    (recorded / ".DS_Store").write_text("")
    assert changes(recorded) == []


def test_a_change_that_keeps_size_and_time_is_found(recorded):
    weights = recorded / "weights.safetensors"
    settle(weights)
    before = weights.stat()
    assert changes(recorded) == []
    weights.write_text("abcdefgx")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changes(recorded) == ["weights.safetensors is not the file that was recorded"]


def test_two_changes_within_a_step_of_the_clock_are_both_found(tmp_path):
    file = tmp_path / "file"
    for content in (b"a", b"b", b"c") * 20:
        file.write_bytes(content)
        assert file_hash(file) == hashlib.sha256(content).hexdigest()


def test_the_processes_of_a_run_share_what_they_hashed(tmp_path, monkeypatch):
    """A child in the same run reads no byte: the file may even be unreadable by then (here: another answer)."""
    run, file = tmp_path / "run", tmp_path / "file"
    run.mkdir()
    file.write_text("content")
    settle(file)
    digest = file_hash(file)
    share_hashes(run)
    kept = json.loads((run / ".hashed.json").read_text())
    (state,) = [state for state, known in kept.items() if known == digest]
    (run / ".hashed.json").write_text(json.dumps({state: "told by the run"}))
    command = "import pathlib; from helpers.base.hashes import file_hash; print(file_hash(pathlib.Path('file')))"

    def hashed(**environment):
        call = [sys.executable, "-c", command]
        return subprocess.check_output(call, cwd=tmp_path, env={**os.environ, **environment}, text=True).strip()

    assert hashed(WORKBOOK_RUN_DIR=str(run)) == "told by the run"
    assert hashed() == digest
