"""Nothing outside a run folder is read, written or deleted through it (D5)."""

import json
import os
import shutil

import pytest

from helpers.runs.expected import expected_from_runs, judge
from helpers.runs.folder import _held
from helpers.runs.paths import _OutsideError
from helpers.runs.recording import _forget
from helpers.runs.report import write_report
from helpers.runs.store import ResultError, _read_results, _read_status, read_manifest
from tests.unit.runs.test_report import run  # noqa: F401 (a fixture)

READERS = {
    "report": write_report,
    "judge": lambda folder: judge(folder, {}),
    "expect": lambda folder: expected_from_runs([folder]),
    "resume": read_manifest,
    "forget": lambda folder: _forget(folder, "00_a"),
}


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "a.txt").write_text("keep me")
    return folder


def change(folder, name, update):
    path = folder / f"{name}.json"
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", ["notebooks", "figures", "logs", "html", "loaded", "results.json", "report.html"])
def test_a_link_that_leads_out_is_refused(run, outside, name, reader):  # noqa: F811
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside if "." not in name else outside / "a.txt")
    with pytest.raises(_OutsideError, match="is a link to"):
        reader(run)
    assert [file.read_text() for file in outside.iterdir()] == ["keep me"]


@pytest.mark.parametrize("name", ["notebooks/00_a.ipynb", "figures/00_a_sizes.png", "logs/00_a.log"])
def test_a_linked_file_in_a_folder_of_the_run_is_refused(run, outside, name):  # noqa: F811
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "a.txt")
    with pytest.raises(_OutsideError, match="outside of the run folder"):
        write_report(run)
    with pytest.raises(_OutsideError), _held(run):
        pass


def test_links_within_the_run_and_to_the_run_are_fine(run, tmp_path):  # noqa: F811
    (run / "figures" / "00_a_sizes.png").rename(run / "figures" / "real.png")
    (run / "figures" / "00_a_sizes.png").symlink_to("real.png")
    (tmp_path / "latest").symlink_to(run)
    assert write_report(tmp_path / "latest").exists()


@pytest.mark.parametrize(
    ("file", "update"),
    [
        ("results", lambda content: content["figures"]["00_a"].update(sizes="../outside/a.txt")),
        ("results", lambda content: content["figures"]["00_a"].update(sizes="/etc/hostname")),
        ("results", lambda content: content["figures"]["00_a"].update(sizes="figures/../../outside/a.txt")),
        ("results", lambda content: content["figures"].update({"../x": {}})),
        ("results", lambda content: content["values"].update({"../x": {}})),
        ("status", lambda content: content["notebooks"].update({"../../outside": content["notebooks"]["00_a"]})),
        ("status", lambda content: content["notebooks"].update({"..": content["notebooks"]["00_a"]})),
        ("manifest", lambda content: content.update(profile="../../../outside")),
        ("manifest", lambda content: content.update(profile="/etc/x")),
        ("manifest", lambda content: content["notebooks"].update({"a/b": content["notebooks"]["00_a"]})),
    ],
)
def test_a_name_that_leads_out_is_refused(run, outside, file, update):  # noqa: F811
    change(run, file, update)
    read = {"results": _read_results, "status": _read_status, "manifest": read_manifest}[file]
    with pytest.raises(ResultError, match=f"{file}.json: .* is needed"):
        read(run)
    with pytest.raises(ResultError):
        write_report(run)
    assert (outside / "a.txt").read_text() == "keep me"


@pytest.mark.parametrize("name", [".lock", ".results.lock"])
def test_a_lock_that_is_another_file_too_is_refused(run, outside, name):  # noqa: F811
    """Who takes the lock empties the file."""
    (run / name).unlink(missing_ok=True)
    os.link(outside / "a.txt", run / name)
    with pytest.raises(_OutsideError, match="another name"), _held(run):
        pass
    assert (outside / "a.txt").read_text() == "keep me"


def test_a_figure_does_not_overwrite_another_name_of_a_file(run, outside, monkeypatch):  # noqa: F811
    from matplotlib.figure import Figure

    from helpers.runs import record_figure

    monkeypatch.setenv("WORKBOOK_RUN_DIR", str(run))
    monkeypatch.setenv("WORKBOOK_NOTEBOOK", "00_a")
    (run / "figures" / "00_a_sizes.png").unlink()
    os.link(outside / "a.txt", run / "figures" / "00_a_sizes.png")
    record_figure("sizes", Figure(figsize=(1, 1)))
    assert (outside / "a.txt").read_text() == "keep me"
