"""The files of a run: what is read and written, which versions, and how a file that is not valid is refused."""

import copy
import json

import pytest
from typer.testing import CliRunner

from helpers import runs
from helpers.base import WorkbookError
from helpers.base.files import read_json
from helpers.cli import app
from helpers.runs import REDACTED, ResultError, RunFolderError, expected_from_runs, judge, store
from helpers.runs.schema import _Claim, _ExpectedValue, _Manifest, _NotebookStatus, _RecordedValue, _Status

# A run folder as the workbook wrote it before its files had a version: a real run, cut to two values.
MODEL = {
    "id": "env/models/falcon-mini", "family": "falcon", "format": "plain", "source": "embedded", "revision": None,
    "file": None, "stand_in_for": "tiiuae/falcon-180B", "licence": "Apache-2.0", "download_bytes": None, "shards": None,
    "rehearsed": False, "label": "falcon-mini (stand-in for tiiuae/falcon-180B)", "sha256": {"config.json": "ab" * 32},
    "commit": None,
}  # fmt: skip
MANIFEST = {
    "profile": "laptop", "description": "Two CPU cores", "command": ["workbook", "run"],
    "started": "2026-11-27T20:25:07Z", "finished": "2026-11-27T20:29:39Z", "parameters": {"seed": "0"},
    "seeds": {"00_start_here": 0},
    "notebooks": {"00_start_here": {"sha256": "ce" * 32, "parameters": {"profile": "laptop", "seed": 0, "sizes": [1]}}},
    "models": {"falcon": MODEL, "falcon_chat": MODEL, "llama_chat": MODEL},
    "git": {"commit": "b1479aee90af89d3d643129db8cb172dc45f7263", "dirty": False}, "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "hardware": {
        "gpus": [{"index": 0, "name": "A100", "total_bytes": 85899345920, "free_bytes": 85000000000,
                  "compute_capability": [8, 0]}],
        "ram_bytes": 25276518400, "ram_available_bytes": 24627445760, "disk_free_bytes": 82618298368, "cpu_count": 2,
        "cpu_name": "AMD EPYC", "system": "Linux 6.18.44 x86_64", "python": "3.11.7", "rehearsed": False,
        "cache_free_bytes": 82618298368,
    },
}  # fmt: skip
STATUS = {
    "state": "finished", "peak_bytes": 4488146944,
    "notebooks": {
        "00_start_here": {
            "status": "passed", "reason": None, "cell": 29, "cells": 29, "line": "longest_context = ...",
            "seconds": 9.21, "started": "2026-11-27T20:25:08Z", "budget_seconds": 120.0, "expected_seconds": 15.0,
            "peak_bytes": 680751104, "inputs": "7f" * 32,
        },
    },
}  # fmt: skip
RESULTS = {
    "values": {
        "00_start_here": {
            "parameters_tied": {
                "value": 178557088768, "unit": "parameters", "claim": "A1", "expected": 178557088768, "tolerance": 0,
                "source": "run 20261124T105642Z-laptop", "verdict": "as expected", "floor": None, "agrees": True,
                "model": None,
            },
            "loss": {
                "value": 2.5, "unit": "nats", "claim": None, "expected": None, "tolerance": None, "source": None,
                "verdict": "unmeasured", "floor": 0.05, "agrees": None, "model": MODEL["label"],
            },
        },
    },
    "figures": {},
}  # fmt: skip
CONTENT = {"manifest": MANIFEST, "status": STATUS, "results": RESULTS}


@pytest.fixture
def earlier_run(tmp_path):
    """A run folder without version numbers."""
    folder = tmp_path / "20261127T202507Z-laptop"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def change(run, name, update):
    path = run / f"{name}.json"
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))


def workbook(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_of_the_version_before_is_reported_checked_and_compared(earlier_run):
    shown = runs.write_report(earlier_run).read_text(encoding="utf-8")
    for text in ("all 1 notebooks passed", "178,557,088,768 parameters", "2.5 nats", "1 × A100 (80.0 GiB)", "4.2 GiB"):
        assert text in shown
    expected = {
        "00_start_here/parameters_tied": _ExpectedValue(value=178557088768, tolerance=0, source="run x"),
        "00_start_here/loss": _ExpectedValue(value=2.4, tolerance=0.05, source="run x"),
    }
    judged = judge(earlier_run, expected)
    assert (judged.within, judged.passed) == (1, False)
    assert judged.differing == ("differs: 00_start_here/loss is 2.5 nats, expected 2.4 ± 0.05 nats (run x)",)
    assert runs.compare_runs(earlier_run, earlier_run).differing == 0
    assert workbook("report", earlier_run).exit_code == 0
    assert "1 as expected" in workbook("check", earlier_run).stdout
    assert workbook("diff", earlier_run, earlier_run).exit_code == 0
    assert list(expected_from_runs([earlier_run])) == ["00_start_here/loss", "00_start_here/parameters_tied"]


def test_what_is_written_again_has_a_version_and_the_same_content(earlier_run):
    store._write_manifest(earlier_run, runs.read_manifest(earlier_run))
    store._write_status(earlier_run, store._read_status(earlier_run))
    with store._changed_results(earlier_run):
        pass
    for name, content in CONTENT.items():
        assert json.loads((earlier_run / f"{name}.json").read_text()) == {"version": 2, **content}
        # 0 and 0.0 are equal, but not the same text.
        text = (earlier_run / f"{name}.json").read_text()
        assert sorted(text.split()) == sorted(json.dumps({"version": 2, **content}, indent=2).split())
    assert runs.write_report(earlier_run).exists()


def test_facts_that_only_some_runs_have_are_written_for_those_alone(earlier_run):
    manifest = runs.read_manifest(earlier_run)
    assert not {"rehearsal", "resumed", "commits"} & set(manifest.model_dump())
    manifest.resumed, manifest.commits = ["2026-11-28T00:00:00Z"], {"org/tiny": "5f" * 20}
    store._write_manifest(earlier_run, manifest)
    written = json.loads((earlier_run / "manifest.json").read_text())
    assert (written["resumed"], written["commits"]) == (["2026-11-28T00:00:00Z"], {"org/tiny": "5f" * 20})
    assert runs.read_manifest(earlier_run) == manifest


def set_at(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


NOTEBOOK = ("notebooks", "00_start_here")
LOSS = ("values", "00_start_here", "loss")


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("version", [99, 0, "2", True, None, 1.5])
@pytest.mark.parametrize("command", ["report", "check", "diff"])
def test_another_version_is_refused_with_one_sentence(earlier_run, name, version, command):
    change(earlier_run, name, lambda content: content.update(version=version))
    refused = workbook(command, *[earlier_run] * (2 if command == "diff" else 1))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"Error: {earlier_run / name}.json: the field version is {version!r}, ")
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", CONTENT)
def test_a_cut_file_is_refused_with_one_sentence(earlier_run, name):
    path = earlier_run / f"{name}.json"
    path.write_text(path.read_text()[:-20])
    for command in ("report", "check"):
        refused = workbook(command, earlier_run)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"Error: {path} is not valid JSON (")
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        ("manifest", ("profile",), None, "profile is not valid (input should be a valid string)"),
        ("manifest", ("models", "falcon", "sha256"), 1, "models.falcon.sha256 is not valid"),
        ("manifest", ("surprise",), 1, "surprise is unknown"),
        ("status", ("state",), "done", "state is not valid (input should be 'running', 'finished' or 'interrupted')"),
        ("status", (*NOTEBOOK, "seconds"), "long", f"{'.'.join(NOTEBOOK)}.seconds is not valid"),
        ("status", (*NOTEBOOK, "cel"), 3, f"{'.'.join(NOTEBOOK)}.cel is unknown"),
        ("results", (*LOSS, "value"), [1], f"{'.'.join(LOSS)}.value is not valid (a number, a text, true or false"),
        ("results", (*LOSS, "tolerance"), -1, f"{'.'.join(LOSS)}.tolerance is not valid (a number from 0 up"),
        ("results", (*LOSS, "floor"), True, f"{'.'.join(LOSS)}.floor is not valid (a number from 0 up"),
        ("results", (*LOSS, "verdict"), "good", f"{'.'.join(LOSS)}.verdict is not valid"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_valid_is_named_with_its_file(earlier_run, name, path, value, complaint):
    change(earlier_run, name, lambda content: set_at(content, path, value))
    with pytest.raises(ResultError) as refused:
        runs.write_report(earlier_run)
    assert str(refused.value).startswith(f"{earlier_run / name}.json: the field {complaint}")


@pytest.mark.parametrize(
    ("name", "path"),
    [("manifest", ("git",)), ("manifest", ("models", "falcon", "label")), ("status", (*NOTEBOOK, "inputs")),
     ("results", (*LOSS, "unit"))],
)  # fmt: skip
def test_a_missing_field_is_named_with_its_file(earlier_run, name, path):
    def remove(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    change(earlier_run, name, remove)
    with pytest.raises(ResultError, match=rf"{name}\.json: the field {'.'.join(path)} is missing\."):
        runs.write_report(earlier_run)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_file_without_fields_is_refused(earlier_run, content):
    (earlier_run / "status.json").write_text(content)
    with pytest.raises(ResultError, match=r"status\.json holds no fields"):
        store._read_status(earlier_run)


def test_a_folder_without_a_run_is_refused_and_one_without_results_is_not(earlier_run):
    (earlier_run / "results.json").unlink()
    assert store._read_results(earlier_run).values == {}
    for name, read in (("status", store._read_status), ("manifest", runs.read_manifest)):
        (earlier_run / f"{name}.json").unlink()
        with pytest.raises(RunFolderError, match=rf"is not a run folder: it has no {name}\.json"):
            read(earlier_run)


def test_a_number_blanked_for_a_secret_s_digits_leaves_the_run_readable(earlier_run):
    change(earlier_run, "manifest", lambda content: set_at(content, ("hardware", "ram_bytes"), REDACTED))
    change(earlier_run, "status", lambda content: set_at(content, (*NOTEBOOK, "peak_bytes"), REDACTED))
    change(earlier_run, "results", lambda content: set_at(content, (*LOSS, "floor"), REDACTED))
    change(earlier_run, "results", lambda content: set_at(content, (*LOSS, "value"), REDACTED))
    assert runs.read_manifest(earlier_run).hardware.ram_bytes == 0
    assert store._read_results(earlier_run).values["00_start_here"]["loss"].value == REDACTED
    assert runs.write_report(earlier_run).exists()


def test_what_redacts_sees_the_whole_file(tmp_path):
    status = _Status(
        state="running", notebooks={"00_a": _NotebookStatus(status="pending", budget_seconds=9, inputs="")}
    )
    seen = []
    store._write_status(tmp_path, status, lambda content: seen.append(copy.deepcopy(content)) or content)
    assert seen == [json.loads((tmp_path / "status.json").read_text())]


@pytest.mark.parametrize("value", [True, False, 0, 1, 1.0, 0.5, 178_557_088_768, 2**70, "1", "", "a saddle"])
def test_a_value_keeps_its_type(tmp_path, value):
    runs.write_expected(tmp_path / "x.json", {"01_x/v": _ExpectedValue(value=value, source="run a")})
    read = runs.read_expected(tmp_path / "x.json")["01_x/v"].value
    assert (read, type(read)) == (value, type(value))


def test_expected_values_are_sorted_and_versioned(tmp_path):
    path = tmp_path / "laptop.json"
    values = {name: _ExpectedValue(value=1, tolerance=0, source=f"{name} x") for name in ("run", "citation")}
    runs.write_expected(path, values)
    written = json.loads(path.read_text())
    assert list(written) == ["version", "citation", "run"]
    assert written["run"] == {"value": 1, "tolerance": 0, "source": "run x"}
    assert [key for key, entry in runs.read_expected(path).items() if entry.cited] == ["citation"]
    assert runs.read_expected(tmp_path / "none.json") == {}
    with pytest.raises(ResultError, match=r"none\.json is missing"):
        runs.read_expected(tmp_path / "none.json", required=True)
    path.write_text(json.dumps(written | {"run": {"value": 1}}))
    with pytest.raises(ResultError, match=r"laptop\.json: the field run\.source is missing"):
        runs.read_expected(path)


def test_claims_are_read_or_refused_by_field(tmp_path):
    path = tmp_path / "claims.yaml"
    claim = "version: 2\nA1:\n  statement: a\n  published: b\n  source: c\n  test: model\n  how: d\n"
    path.write_text(claim)
    assert store._read_claims_file(path) == {
        "A1": _Claim(statement="a", published="b", source="c", test="model", how="d")
    }
    path.write_text(claim + "  hwo: e\n")
    with pytest.raises(ResultError, match=r"claims\.yaml: the field A1\.hwo is unknown"):
        store._read_claims_file(path)
    path.write_text(claim.replace("version: 2", "version: 99"))
    with pytest.raises(ResultError, match=r"claims\.yaml: the field version is 99"):
        store._read_claims_file(path)
    path.write_text("A1: [")
    with pytest.raises(ResultError, match=r"claims\.yaml is not valid YAML"):
        store._read_claims_file(path)


def test_a_model_refuses_what_its_file_would(earlier_run):
    with pytest.raises(ValueError, match="surprise"):
        _Manifest.model_validate(MANIFEST | {"surprise": 1})
    with pytest.raises(ValueError, match="a number from 0 up"):
        _RecordedValue(value=1, unit="", tolerance=float("nan"))


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(WorkbookError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
