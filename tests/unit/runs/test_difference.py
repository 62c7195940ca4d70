"""Two runs compared: what counts as a difference, what explains one, and how it is shown."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from rich.console import Console
from typer.testing import CliRunner

from helpers.cli import app
from helpers.runs import (
    BEYOND,
    NOISE,
    ONLY_A,
    ONLY_B,
    SAME,
    SLOW,
    WITHIN,
    DifferenceError,
    Request,
    RunFolderError,
    difference,
    difference_views,
    execution,
    folder,
)
from helpers.runs.expected import _relative_change

LABEL = "falcon-mini (stand-in for tiiuae/falcon-180B)"


def value(number, unit="", **changes):
    plain = {"claim": None, "expected": None, "tolerance": None, "source": None, "verdict": "unmeasured",
             "floor": None, "agrees": None, "model": None}  # fmt: skip
    return {"value": number, "unit": unit} | plain | changes


def entry(status="passed", **changes):
    return {
        "status": status, "reason": None, "cell": 5, "cells": 5, "line": "x", "seconds": 12.0, "budget_seconds": 120,
        "expected_seconds": 60, "started": "2026-01-31T12:00:00Z", "peak_bytes": 2**30, "inputs": "same",
    } | changes  # fmt: skip


def model(name):
    return {
        "id": f"env/models/{name}", "label": f"{name} (stand-in for tiiuae/falcon-180B)", "source": "embedded",
        "file": None, "revision": None, "commit": None, "licence": "", "stand_in_for": "tiiuae/falcon-180B",
        "sha256": {"model.safetensors": "ab" * 32},
    }  # fmt: skip


VALUES = {
    "00_a": {"size": value(2.5, "x", expected=2.5, tolerance=0.1, claim="A22", agrees=True), "layers": value(80)},
    "01_b": {"speed": value(10.0, "tokens/s"), "reply": value("a saddle", model=LABEL), "quantized": value(False)},
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two folders of the same finished run, A and B, and no expected values."""
    monkeypatch.setattr(difference, "NOTEBOOKS", tmp_path / "notebooks")
    manifest = {
        "profile": "laptop", "description": "two cores", "command": ["workbook", "run"], "parameters": {},
        "started": "2026-01-31T12:00:00Z", "finished": "2026-01-31T12:03:00Z", "seeds": {},
        "notebooks": {name: {"sha256": "cd" * 32, "parameters": {"seed": 7}} for name in VALUES},
        "models": {"falcon": model("falcon-mini"), "falcon_chat": model("falcon-mini")},
        "git": {"commit": "0123456789abcdef", "dirty": False}, "python": "3.11.7",
        "packages": {"torch": "2.13.0", "zipp": "3.0"},
        "hardware": {"gpus": [], "ram_bytes": 8 * 2**30, "cpu_count": 2, "cpu_name": "A processor", "system": "Linux"},
    }  # fmt: skip
    status = {"state": "finished", "notebooks": {name: entry() for name in VALUES}}
    folders = tmp_path / "A", tmp_path / "B"
    for each in folders:
        each.mkdir()
        for name, content in {
            "manifest": manifest,
            "status": status,
            "results": {"values": VALUES, "figures": {}},
        }.items():
            (each / f"{name}.json").write_text(json.dumps(content))
    return folders


def change(run, name, update):
    path = run / f"{name}.json"
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))


def set_value(run, notebook, name, **changes):
    change(run, "results", lambda results: results["values"][notebook].setdefault(name, value(0)).update(changes))


def line(found, name):
    (only,) = [each for each in found.lines if each.name == name]
    return only


def test_a_run_does_not_differ_from_its_copy(runs):
    found = difference.compare_runs(*runs)
    assert found.differing == 0
    assert [each.verdict for each in found.lines] == [SAME] * 5
    assert (found.warnings, found.changes, found.claims) == ((), {}, ())
    assert found.outcome == "no difference beyond tolerance"


@pytest.mark.parametrize(
    ("name", "number", "verdict"),
    [
        ("size", 2.6, WITHIN),  # its tolerance is 0.1
        ("size", 2.4, WITHIN),
        ("size", 2.61, BEYOND),
        ("size", 2.5 + 1e-12, SAME),  # rounding
        ("size", "2.5", BEYOND),
        ("layers", 81, BEYOND),
        ("layers", True, BEYOND),
    ],
)
def test_numbers_are_judged_by_their_tolerance(runs, name, number, verdict):
    set_value(runs[1], "00_a", name, value=number)
    found = difference.compare_runs(*runs)
    assert line(found, name).verdict == verdict
    assert found.differing == (verdict == BEYOND)


@pytest.mark.parametrize(("name", "changed"), [("reply", "a Saddle"), ("quantized", True), ("quantized", 0)])
def test_texts_and_answers_have_no_tolerance(runs, name, changed):
    set_value(runs[1], "01_b", name, value=changed)
    found = difference.compare_runs(*runs)
    assert (line(found, name).verdict, found.differing) == (BEYOND, 1)


def test_the_larger_tolerance_of_both_runs_counts(runs):
    set_value(runs[1], "00_a", "size", value=2.68, tolerance=0.2)
    assert line(difference.compare_runs(*runs), "size").verdict == WITHIN
    set_value(runs[0], "00_a", "size", tolerance=0.01)
    set_value(runs[1], "00_a", "size", tolerance=0.01, floor=0.15)
    assert line(difference.compare_runs(*runs), "size").noise == 0.15
    assert line(difference.compare_runs(*runs), "size").verdict == BEYOND


def test_a_value_without_a_tolerance_takes_its_profiles_and_then_one_percent(runs, tmp_path):
    for run, number in zip(runs, (100.0, 100.9), strict=True):
        set_value(run, "00_a", "loss", value=number)
    assert line(difference.compare_runs(*runs), "loss").verdict == WITHIN
    set_value(runs[1], "00_a", "loss", value=101.1)
    assert line(difference.compare_runs(*runs), "loss").verdict == BEYOND
    (tmp_path / "notebooks" / "expected").mkdir(parents=True)
    expected = {"00_a/loss": {"value": 100, "tolerance": 1.5, "source": "run x"}}
    (tmp_path / "notebooks" / "expected" / "laptop.json").write_text(json.dumps(expected))
    assert line(difference.compare_runs(*runs), "loss").verdict == WITHIN


@pytest.mark.parametrize(
    ("number", "verdict"), [(19.9, NOISE), (20, NOISE), (5.0, NOISE), (4.9, SLOW), (20.1, SLOW), (0, SLOW)]
)
def test_times_are_the_machines(runs, number, verdict):
    set_value(runs[1], "01_b", "speed", value=number, tolerance=0.001)
    found = difference.compare_runs(*runs)
    assert (line(found, "speed").verdict, found.differing) == (verdict, 0)
    assert difference.compare_runs(*runs, strict_times=True).differing == (verdict == SLOW)


def test_what_only_one_run_recorded_is_a_difference(runs):
    change(runs[1], "results", lambda results: results["values"]["01_b"].pop("reply"))
    change(runs[0], "results", lambda results: results["values"]["01_b"].pop("speed"))  # a time: it does not count
    set_value(runs[1], "00_a", "new", value=1)
    found = difference.compare_runs(*runs)
    shown = {each.name: (each.verdict, each.counts) for each in found.lines if each.verdict != SAME}
    assert shown == {"reply": (ONLY_A, True), "speed": (ONLY_B, False), "new": (ONLY_B, True)}
    assert found.differing == 2


def test_a_notebook_that_failed_in_one_run_is_a_difference(runs):
    change(runs[1], "status", lambda status: status["notebooks"]["01_b"].update(status="failed"))
    found = difference.compare_runs(*runs)
    assert found.differing == 1
    assert found.outcome == "1 difference beyond tolerance"
    assert [pair.what for pair in found.statuses if pair.differs] == ["01_b"]


def test_a_notebook_of_one_run_alone_is_named_and_left_out(runs):
    change(runs[1], "status", lambda status: status["notebooks"].pop("01_b"))
    change(runs[1], "results", lambda results: results["values"].pop("01_b"))
    found = difference.compare_runs(*runs)
    assert found.differing == 0
    assert found.warnings == ("only A is made of 01_b: left out of the comparison",)
    assert {each.notebook for each in found.lines} == {"00_a"}


def test_another_unit_or_model_or_judgement_is_named(runs):
    set_value(runs[1], "00_a", "size", unit="times", agrees=False)
    set_value(runs[1], "01_b", "reply", model="falcon-180B")
    found = difference.compare_runs(*runs)
    assert line(found, "size").verdict == BEYOND
    assert line(found, "size").notes == ("unit: x → times", "agrees with A22: yes → no")
    assert line(found, "reply").notes == (f"model: {LABEL} → falcon-180B",)
    (claim,) = found.claims
    assert claim.what.startswith("A22: ")
    assert (claim.first, claim.second) == ("confirmed", "not confirmed")


def test_what_explains_a_difference(runs):
    def update(manifest):
        manifest["packages"] = {"torch": "2.14.0", "aaa": "1"}
        manifest["notebooks"]["00_a"] = {"sha256": "ef" * 32, "parameters": {"seed": 8}}
        manifest["notebooks"]["01_b"]["sha256"] = "ef" * 32
        manifest["models"]["falcon"]["sha256"]["model.safetensors"] = "01" * 32
        manifest["git"]["commit"] = "f" * 40
        manifest["hardware"]["cpu_name"] = "Another"

    change(runs[1], "manifest", update)
    change(runs[1], "status", lambda status: status["notebooks"]["00_a"].update(inputs="other"))
    found = difference.compare_runs(*runs)
    assert found.differing == 0
    changes = {group: {p.what: (p.first, p.second) for p in pairs} for group, pairs in found.changes.items()}
    assert changes == {
        "Parameters": {"00_a: seed": ("7", "8")},
        "Notebooks": {
            "00_a.ipynb": ("cd" * 6, "ef" * 6),
            "01_b.ipynb (same cells, other saved outputs)": ("cd" * 6, "ef" * 6),
        },
        "Models": {f"{LABEL}: model.safetensors": ("ab" * 6, "01" * 6)},
        "Packages": {"torch": ("2.13.0", "2.14.0"), "zipp": ("3.0", "–"), "aaa": ("–", "1")},
    }
    facts = {pair.what: pair.second for pair in found.facts if pair.differs}
    assert facts == {"Commit": "f" * 12, "CPU": "Another, 2 cores"}


def test_another_model_is_named_by_its_role_and_not_by_its_files(runs):
    change(runs[1], "manifest", lambda manifest: manifest["models"].update(falcon=model("other")))
    (pair,) = difference.compare_runs(*runs).changes["Models"]
    assert (pair.what, pair.first, pair.second) == ("Falcon, base", LABEL, "other (stand-in for tiiuae/falcon-180B)")


def test_what_a_reader_has_to_know_first(runs):
    change(runs[1], "manifest", lambda manifest: manifest.update(profile="8x80gb", git={"commit": None, "dirty": None}))
    change(runs[1], "status", lambda status: status.update(state="interrupted"))
    first, second = difference.compare_runs(*runs).warnings
    assert first.startswith("the profiles are not the same, laptop and 8x80gb")
    assert second == "B did not finish: it is interrupted"
    for run in runs:
        change(run, "manifest", lambda manifest: manifest.update(git={"commit": "f" * 40, "dirty": True}))
    assert any("uncommitted changes" in warning for warning in difference.compare_runs(*runs).warnings)


def test_what_cannot_be_compared(runs, tmp_path):
    with pytest.raises(RunFolderError, match="not a run folder"):
        difference.compare_runs(runs[0], tmp_path)
    change(runs[1], "manifest", lambda manifest: manifest.update(rehearsal={}))
    for pair in (runs, runs[::-1]):
        with pytest.raises(DifferenceError, match="B is a rehearsal and the other run is not"):
            difference.compare_runs(*pair)
    change(runs[0], "manifest", lambda manifest: manifest.update(rehearsal={}))
    assert "both runs are rehearsals" in difference.compare_runs(*runs).warnings[0]
    change(runs[1], "status", lambda status: status.update(notebooks={"05_x": entry()}))
    with pytest.raises(DifferenceError, match="share no notebook: A has 00_a, 01_b; B has 05_x"):
        difference.compare_runs(*runs)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (2.0, 2.1, "+5%"), (2.0, 1.0, "-50%"), (-2.0, -1.0, "+50%"), (1.0, 20.0, "× 20"), (1000.0, 1000.2, "+0.02%"),
        (0, 5, ""), (5, 5, ""), ("a", "b", ""), (True, False, ""), (None, 1, ""), (1, -19, "-2,000%"), (4, 0, "-100%"),
    ],
)  # fmt: skip
def test_relative_changes(first, second, text):
    assert _relative_change(first, second) == text


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.ids, self.links, self.style = "", set(), set(), set(), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.style = tag == "style"
        self.ids |= {text for name, text in attrs if name == "id"}
        self.links |= {text for name, text in attrs if name in ("href", "src")}

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        self.text += "" if self.style else f" {' '.join(data.split())} "


def differing(runs):
    """B differs from A in every way at once."""
    set_value(runs[1], "00_a", "size", value=3.5, agrees=False)
    set_value(runs[1], "01_b", "reply", value="<b>a saddle</b> [red]")
    set_value(runs[1], "01_b", "speed", value=1.0)
    change(runs[1], "manifest", lambda manifest: manifest["packages"].update(torch="2.14.0"))
    change(runs[1], "status", lambda status: status["notebooks"]["01_b"].update(status="failed"))
    return difference.compare_runs(*runs)


def test_the_page_says_all_and_loads_nothing(runs):
    path = difference_views.write_page(differing(runs))
    assert path == runs[1] / "diff-A.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for shown in ("B beside A", "3 differences beyond tolerance", "2.5 x", "3.5 x", "+40%", "± 0.1", "agrees with A22",
                  "<b>a saddle</b> [red]", "beyond machine noise", "2.14.0", "not confirmed", "failed"):  # fmt: skip
        assert shown in page.text
    assert page.text.index("reply") < page.text.index("quantized")  # what differs comes first
    assert page.links == {"#runs", "#notebooks", "#values", "#claims", "#changes"}
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert not {"script", "link", "iframe", "img"} & page.tags
    assert not re.findall(r"url\(|@import|://", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_two_equal_runs(runs):
    page = Page(difference_views.write_page(difference.compare_runs(*runs)).read_text(encoding="utf-8"))
    assert "no difference beyond tolerance" in page.text
    assert "Parameters, notebooks, models and packages are the same." in page.text
    assert "#claims" not in page.links


def test_a_page_that_cannot_be_written_names_the_way_out(runs, tmp_path):
    with pytest.raises(DifferenceError, match="--html"):
        difference_views.write_page(difference.compare_runs(*runs), tmp_path / "nowhere" / "x.html")


@pytest.mark.parametrize("width", [80, 160])
def test_the_text_fits_the_terminal_and_loses_nothing(runs, width):
    set_value(runs[0], "01_b", "reply", value="a long reply without end " * 8)
    console = Console(width=width, record=True, file=io.StringIO())
    for part in difference_views.tables(differing(runs)):
        console.print(part)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    for shown in (
        "size",
        "2.5",
        "3.5",
        "+40%",
        "[red]",
        "beyond tolerance",
        "2.14.0",
        "A22: ",
        "1 beyond machine noise",
    ):
        assert shown in text
    assert text.count("without end") == 8
    assert "3 differences beyond tolerance. 5 values: 2 the same" in text.lower()


def workbook(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_and_its_exit_codes(runs, tmp_path):
    same = workbook("diff", *runs)
    assert same.exit_code == 0
    assert same.stdout.splitlines()[-1] == f"Page: {runs[1] / 'diff-A.html'}"
    set_value(runs[1], "01_b", "speed", value=1.0)
    assert workbook("diff", *runs).exit_code == 0
    assert workbook("diff", *runs, "--strict-times").exit_code == 1
    set_value(runs[1], "00_a", "layers", value=81)
    page = tmp_path / "own.html"
    assert workbook("diff", *runs, "--html", page).exit_code == 1
    assert page.exists()
    nowhere = workbook("diff", runs[0], tmp_path / "nowhere")
    assert nowhere.exit_code == 2
    assert "not a run folder" in nowhere.stderr


@pytest.mark.slow
def test_two_real_runs(tmp_path, monkeypatch):
    cells = [
        {"cell_type": "code", "id": f"c{index}", "metadata": {"tags": tags}, "source": text, "outputs": [],
         "execution_count": None}
        for index, (text, tags) in enumerate([
            ('profile = "laptop"\nseed = 0', ["parameters"]),
            ("import time\nfrom helpers import runs\n"
             "runs.record('drawn', seed * 1.5, claim='A22', agrees=seed < 2)\n"
             "runs.record('clock', time.perf_counter(), 's')", []),
        ])
    ]  # fmt: skip
    document = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start_here.ipynb").write_text(json.dumps(document))
    for module in (execution, difference):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")  # importing torch would take most of the time
    run = [tmp_path / name for name in "abc"]
    execution.run(Request(parameters=["seed=1"], only=["00"], folder=run[0]))
    execution.run(Request(parameters=["seed=2"], only=["00"], folder=run[1]))
    shutil.copytree(run[0], run[2])
    assert difference.compare_runs(run[0], run[2]).differing == 0
    found = difference.compare_runs(*run[:2])
    assert [(each.name, each.change) for each in found.lines if each.counts] == [("drawn", "+100%")]
    assert {pair.what for pair in found.changes["Parameters"]} == {"00_start_here: seed"}
    assert list(found.changes) == ["Parameters"]
    assert [pair.second for pair in found.claims] == ["not confirmed"]
