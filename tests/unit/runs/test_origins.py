"""A run of commit A, resumed at commit B and on another machine: each value keeps the origin that gave it (C9, F7)."""

import json
import shutil

import pytest

from helpers.runs import origins, write_report
from helpers.runs.schema import _GitState, _Origin
from tests.unit.runs.checkout import MACHINE, Checkout, read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("checkout") / "workbook")


@pytest.fixture(scope="module")
def mixed(checkout):
    """The run, and the commits A and B."""
    commit_a, run = checkout.git("rev-parse", "HEAD"), checkout.root / "runs" / "mixed"
    checkout.workbook("run", "--folder", run).ends(1, "passed 00_first", "FAILED 01_second", "--resume")
    checkout.change("helpers/base/units.py", "as it was", "mended")
    checkout.machine(**MACHINE | {"cpu_name": "Second CPU"})
    commit_b = checkout.commit()
    screen = checkout.workbook("run", "--resume", run).ends(0, "00_first (kept from an earlier start)", "--redo").screen
    assert "passed 01_second" in " ".join(screen.split())
    return run, commit_a, commit_b


def test_each_value_keeps_commit_and_machine_of_its_own_start(mixed):
    """C9, F7"""
    run, commit_a, commit_b = mixed
    manifest, values = read(run, "manifest"), read(run, "results")["values"]
    assert values["00_first"]["first"]["value"] == "as it was"
    assert values["01_second"]["second"]["value"] == "mended"
    of = {name: manifest["origins"][facts["origin"]] for name, facts in manifest["notebooks"].items()}
    assert {name: origin["git"] for name, origin in of.items()} == {
        "00_first": {"commit": commit_a, "dirty": False},
        "01_second": {"commit": commit_b, "dirty": False},
    }
    assert of["00_first"]["hardware"]["cpu_name"] == "First CPU"
    assert of["01_second"]["hardware"]["cpu_name"] == "Second CPU"
    assert of["00_first"]["code"] != of["01_second"]["code"]
    assert of["00_first"]["packages"] == manifest["packages"]
    assert list(of["00_first"]["models"]) == [manifest["models"]["falcon"]["label"]]


def test_the_report_says_which_value_is_whose(mixed):
    """C9, F7"""
    run, commit_a, commit_b = mixed
    page = " ".join(write_report(run).read_text().split())
    assert "The values are of 2 origins" in page
    for text in ("00_first: Commit " + commit_a[:12], "01_second: Commit " + commit_b[:12]):
        assert text in page
    assert '00_first</a> <a href="#origins">(origin 1)</a>' in page
    assert '01_second</a> <a href="#origins">(origin 2)</a>' in page
    assert page.index("CPU: First CPU, 2 cores") < page.index("CPU: Second CPU, 2 cores")


def test_check_diff_and_expect_say_it_too(mixed, checkout):
    """C9"""
    run, commit_a, commit_b = mixed
    told = ("The values are of 2 origins", f"00_first: Commit {commit_a[:12]}", f"01_second: Commit {commit_b[:12]}")
    checkout.workbook("expect", run).ends(0)
    expected = json.loads((checkout.root / "notebooks/expected/laptop.json").read_text())
    assert expected["00_first/first"]["source"] == f"run mixed (commit {commit_a[:12]})"
    assert expected["01_second/second"]["source"] == f"run mixed (commit {commit_b[:12]})"
    checkout.workbook("check", run).ends(0, *told)
    checkout.workbook("diff", run, run).ends(0, *told)


def test_the_code_of_values_that_differ_is_named_and_never_mixed_into_a_tolerance(mixed, checkout):
    """C9: the second of two runs is of the mended code alone."""
    run, commit_a, commit_b = mixed
    new = checkout.root / "runs" / "new"
    checkout.workbook("run", "--folder", new).ends(0)
    shown = checkout.workbook("diff", run, new).ends(1, "Changed: code").screen
    assert commit_a[:12] in shown
    assert commit_b[:12] in shown
    refused = checkout.workbook("expect", run, new).ends(2, "00_first/first comes from different code", "--redo").screen
    assert commit_a[:12] in refused
    assert "origins" not in write_report(new).read_text()


def test_redo_runs_again_what_is_of_another_origin(mixed, checkout, tmp_path):
    """C9, F7"""
    run, _, commit_b = mixed
    shutil.copytree(run, tmp_path / "again")
    checkout.workbook("run", "--resume", tmp_path / "again", "--redo").ends(0, "passed 00_first")
    manifest, values = read(tmp_path / "again", "manifest"), read(tmp_path / "again", "results")["values"]
    assert values["00_first"]["first"]["value"] == "mended"
    used = {manifest["origins"][facts["origin"]]["git"]["commit"] for facts in manifest["notebooks"].values()}
    assert used == {commit_b}
    assert "The values are of" not in write_report(tmp_path / "again").read_text()


def test_code_that_changes_while_a_run_runs_is_another_origin(checkout, tmp_path):
    """F7: somebody commits, or edits a file, between two notebooks of one run."""
    root = Checkout(tmp_path / "workbook")
    edit = f"path = {str(root.root / 'helpers/base/units.py')!r}\ntext = open(path).read()\n"
    edit += "open(path, 'w').write(text.replace('as it was', 'mended'))"
    root.notebook("00_first", "from helpers import runs\nruns.record('first', 1)", edit)
    root.commit()
    run = root.root / "runs" / "edited"
    root.workbook("run", "--folder", run).ends(0)
    manifest = read(run, "manifest")
    first, second = (manifest["origins"][manifest["notebooks"][name]["origin"]] for name in ("00_first", "01_second"))
    assert (first["git"]["dirty"], second["git"]["dirty"]) == (False, True)
    assert first["code"] != second["code"]
    assert "The values are of 2 origins" in write_report(run).read_text()


def an_origin(**changes):
    facts = {"since": "2026-01-31T12:00:00Z", "git": {"commit": "a" * 40, "dirty": False}, "code": "c" * 64,
             "python": "3.11.7", "packages": {"torch": "2.13.0"}, "hardware": MACHINE,
             "models": {"m": {"config.json": "ab"}}}  # fmt: skip
    return _Origin.model_validate(facts | changes)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"since": "2026-02-01T12:00:00Z"}, True),
        ({"hardware": MACHINE | {"ram_available_bytes": 5, "disk_free_bytes": 7}}, True),
        ({"git": {"commit": "b" * 40, "dirty": False}}, False),
        ({"git": {"commit": "a" * 40, "dirty": True}}, False),
        ({"code": "d" * 64}, False),
        ({"packages": {"torch": "2.14.0"}}, False),
        ({"packages": {"torch": "2.13.0", "zipp": "1"}}, False),
        ({"hardware": MACHINE | {"cpu_name": "x"}}, False),
        ({"hardware": {"error": "x"}}, False),
        ({"models": {"m": {"config.json": "cd"}}}, False),
        ({"python": "3.12.1"}, False),
    ],
)
def test_what_tells_two_origins_apart(changes, same):
    """C9: commit, uncommitted changes, packages, machine and models; not how much memory is free now."""
    found = [an_origin()]
    assert origins._place(found, an_origin(**changes)) == (0 if same else 1)
    assert len(found) == (1 if same else 2)


def test_the_hash_of_the_code_is_of_names_and_contents(tmp_path):
    """C9: it tells two sets of uncommitted changes apart."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "a.py").write_text("x")
    first = origins._code_hash(tmp_path)
    assert origins._code_hash(tmp_path) == first
    (tmp_path / "helpers" / "a.py").write_text("y")
    assert origins._code_hash(tmp_path) != first
    (tmp_path / "helpers" / "a.py").rename(tmp_path / "helpers" / "b.py")
    (tmp_path / "helpers" / "b.py").write_text("x")
    assert origins._code_hash(tmp_path) != first
    assert origins._commit(_GitState(commit=None, dirty=None)) == "not a git checkout"
