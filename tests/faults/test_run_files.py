"""Files of a run that are damaged, of another type, or not to be read: one sentence each, and nothing lost (C8, E5)."""

import copy
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.cli import app
from helpers.runs import claims, difference, execution
from tests.unit.runs.checkout import MACHINE
from tests.unit.runs.test_schema import CONTENT, LOSS, MODEL, NOTEBOOK

from .judge import Fault, Outcome, kept, refused, same

COMMANDS = ("report", "check", "diff", "expect", "resume")
NAME = "00_start_here"
ORIGIN = {"since": "2026-11-27T20:25:07Z", "git": {"commit": "a" * 40, "dirty": False}, "code": "c" * 64,
          "python": "3.11.7", "packages": {"torch": "2.13.0"}, "hardware": MACHINE, "models": {}}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run with its executed notebook, its expected values and its claims; the checkout's are not touched."""
    notebooks = tmp_path / "notebooks"
    (notebooks / "expected").mkdir(parents=True)
    monkeypatch.setattr(execution, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(difference, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(claims, "CLAIMS", Path(shutil.copy(claims.CLAIMS, notebooks / "claims.yaml")))
    source = 'profile = "laptop"\nseed = 0\nsizes = [1]'
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": source, "outputs": [],
            "execution_count": 1}  # fmt: skip
    notebook = json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]})
    folder = tmp_path / "run"
    (folder / "notebooks").mkdir(parents=True)
    for path in (notebooks, folder / "notebooks"):
        (path / f"{NAME}.ipynb").write_text(notebook)
    content = copy.deepcopy(CONTENT)
    content["manifest"]["origins"] = [ORIGIN]
    content["manifest"]["notebooks"][NAME]["origin"] = 0
    content["status"]["notebooks"][NAME]["recorded"] = 2
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps({"version": 2, **value}))
    expected = {"version": 2, f"{NAME}/loss": {"value": 2.5, "tolerance": 0.1, "source": "run x"}}
    (notebooks / "expected" / "laptop.json").write_text(json.dumps(expected))
    return folder


def call(*arguments):
    """The command in this process: a thousandth of the time of one of its own."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise Fault("traceback", f"{type(done.exception).__name__}: {done.exception}") from done.exception
    return Outcome(done.exit_code, done.stdout + done.stderr)


def command(name, run):
    return {"report": ("report", run), "check": ("check", run), "diff": ("diff", run, run), "expect": ("expect", run),
            "resume": ("run", "--resume", run)}[name]  # fmt: skip


def edit(name, *path, value):
    """A mutation that sets a field of a file."""

    def mutate(run):
        target = file_of(run, name)
        content = json.loads(target.read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        target.write_text(json.dumps(content))

    return mutate


def text(name, change):
    """A mutation of a file's text or bytes."""

    def mutate(run):
        target = file_of(run, name)
        content = change(target.read_text())
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return mutate


def replaced(name, make):
    def mutate(run):
        target = file_of(run, name)
        target.unlink()
        make(target)

    return mutate


def file_of(run, name):
    if name == "expected":
        return run.parent / "notebooks" / "expected" / "laptop.json"
    return run.parent / "notebooks" / "claims.yaml" if name == "claims" else run / f"{name}.json"


READ_BY = {"manifest": COMMANDS, "status": COMMANDS, "results": COMMANDS, "expected": ("check", "diff", "expect"),
           "claims": ("report", "diff")}  # fmt: skip
DAMAGE = {
    "cut": lambda content: content[:-20],
    "empty": lambda content: "",
    "blank": lambda content: " \n",
    "zeros": lambda content: b"\0" * 4096,
    "utf16": lambda content: content.encode("utf-16"),
    "bom": lambda content: b"\xef\xbb\xbf" + content.encode(),
    "latin1": lambda content: content.encode()[:-1] + b"\xe9}",
    "list": lambda content: "[1]",
    "null": lambda content: "null",
    "nan": lambda content: content[:-1] + ', "x": NaN}',
    "twice": lambda content: content[:-1] + ', "version": 2}',
    "deep": lambda content: "[" * 100_000,
    "digits": lambda content: "9" * 5000,
    "text-after": lambda content: content + "}",
    "half-letter": lambda content: content[:-1] + ', "x": "\\ud800"}',
}
FIELDS = [
    ("manifest", ("profile",), "../../outside", "profile"),
    ("manifest", ("started",), "yesterday", "started"),
    ("manifest", ("finished",), 5, "finished"),
    ("manifest", ("resumed",), ["x"], "resumed"),
    ("manifest", ("hardware", "ram_bytes"), 10**400, "ram_bytes"),
    ("manifest", ("hardware", "cpu_count"), -1, "cpu_count"),
    ("manifest", ("hardware", "gpus", 0, "total_bytes"), 1e300, "total_bytes"),
    ("manifest", ("models",), [], "models"),
    ("manifest", ("models", "falcon"), None, "models.falcon"),
    ("manifest", ("notebooks", NAME, "origin"), 7, f"the origin of {NAME}"),
    ("manifest", ("notebooks", NAME, "origin"), -1, "origin"),
    ("manifest", ("origins", 0, "since"), "", "origins.0.since"),
    ("manifest", ("origins", 0, "packages"), "torch", "origins.0.packages"),
    ("manifest", ("notebooks",), {"../../x": {"sha256": "", "parameters": {}}}, "notebooks"),
    ("manifest", ("version",), 10**300, "version"),
    ("manifest", ("x\n\x1b[2J" + "y" * 500,), 1, "unknown"),
    ("status", ("notebooks",), {"../../../x": CONTENT["status"]["notebooks"][NAME]}, "the name of a file"),
    ("status", ("state",), True, "state"),
    ("status", (*NOTEBOOK, "seconds"), -5, "seconds"),
    ("status", (*NOTEBOOK, "budget_seconds"), "120", "budget_seconds"),
    ("status", (*NOTEBOOK, "started"), "x", "started"),
    ("status", (*NOTEBOOK, "cell"), 1.5, "cell"),
    ("status", (*NOTEBOOK, "peak_bytes"), 10**30, "peak_bytes"),
    ("status", (*NOTEBOOK, "reason"), ["x"], "reason"),
    ("results", ("values",), [1], "values"),
    ("results", (*LOSS, "value"), None, "value"),
    ("results", (*LOSS, "value"), 10**400, "value"),
    ("results", (*LOSS, "tolerance"), 10**400, "tolerance"),
    ("results", (*LOSS, "unit"), 3, "unit"),
    ("results", (*LOSS, "agrees"), "maybe", "agrees"),
    ("results", ("figures",), {NAME: {"a": "../../secret.png"}}, "figures"),
    ("results", ("figures",), {NAME: {"a": "/etc/passwd"}}, "figures"),
    ("results", ("figures",), {NAME: {"a": "figures/../../x.png"}}, "figures"),
    ("expected", (f"{NAME}/loss", "value"), [2], "value"),
    ("expected", (f"{NAME}/loss", "tolerance"), "wide", "tolerance"),
    ("expected", (f"{NAME}/loss",), 2.5, f"{NAME}/loss"),
]  # fmt: skip
# The fast part has these of each file, and one wrong field in three.
QUICK = ("cut", "utf16", "twice", "folder")


def marks(quick):
    return () if quick else pytest.mark.whole


CASES = [
    *(pytest.param(name, text(name, change), "", id=f"C8-{name}-{kind}", marks=marks(kind in QUICK))
      for name in ("manifest", "status", "results") for kind, change in DAMAGE.items()),
    *(pytest.param("expected", text("expected", DAMAGE[kind]), "", id=f"C8-expected-{kind}")
      for kind in ("cut", "utf16", "twice", "nan", "deep")),
    *(pytest.param(name, edit(name, *path, value=value), words, id=f"C8-{name}-{number}-{words}",
                   marks=marks(number % 3 == 0))
      for number, (name, path, value, words) in enumerate(FIELDS)),
    *(pytest.param(name, replaced(name, make), "", id=f"C8-{name}-{kind}", marks=marks(kind in QUICK))
      for name in ("manifest", "status", "results")
      for kind, make in (("folder", Path.mkdir), ("pipe", os.mkfifo))),
    pytest.param("claims", text("claims", lambda content: "A1: ["), "YAML", id="C8-claims-cut"),
    pytest.param("claims", text("claims", lambda content: content.encode("utf-16")), "UTF-8", id="C8-claims-utf16"),
    pytest.param("claims", text("claims", lambda content: content + "\nA1: 3\n"), "A1", id="C8-claims-twice"),
    pytest.param("claims", text("claims", lambda content: "A1: 2026-99-99"), "YAML", id="C8-claims-date"),
    pytest.param("claims", text("claims", lambda content: "- A1"), "no fields", id="C8-claims-list"),
    pytest.param("claims", replaced("claims", Path.mkdir), "not a file", id="C8-claims-folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutate", "words"), CASES)
def test_damage_is_one_sentence_and_loses_nothing(run, name, mutate, words):
    mutate(run)
    damaged = file_of(run, name)
    before = {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file() and path.suffix != ".html"}
    for use in READ_BY[name]:
        screen = call(*command(use, run)).ends(2, damaged.name, words).screen
        if len(screen.splitlines()) != 1 or not screen.startswith("Error: ") or "\x1b" in screen:
            raise Fault("wrong", f"more than a sentence: {screen}")
        # What is damaged may hold the only copy of some values.
        if re.search(r"\b(delete|remove|rm)\b", screen, re.I):
            raise Fault("lost", f"advice that loses values: {screen}")
    for path, content in before.items():
        kept(path, content)


VALID = {
    "crlf": text("results", lambda content: content.replace(", ", ",\r\n")),
    "indented": text("status", lambda content: json.dumps(json.loads(content), indent=8)),
    "large": edit("results", *LOSS, "value", value=2**70),
    "whole": edit("results", *LOSS, "value", value=2),
    "blanked": edit("status", *NOTEBOOK, "budget_seconds", value="[redacted]"),
    "no-origins": lambda run: (drop_origin(run), edit("manifest", "origins", value=[])(run)),
    "no-falcon": edit("manifest", "models", value={"llama_chat": MODEL}),
    "no-facts": edit("manifest", "notebooks", value={}),
    "no-figure": edit("results", "figures", value={NAME: {"a": "figures/gone.png"}}),
    "no-results": lambda run: ((run / "results.json").unlink(), edit("status", *NOTEBOOK, "recorded", value=0)(run)),
    "no-version": edit("manifest", "version", value=1),
}  # fmt: skip


def drop_origin(run):
    path = run / "manifest.json"
    content = json.loads(path.read_text())
    del content["notebooks"][NAME]["origin"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("mutate", [pytest.param(mutate, id=f"C8-valid-{kind}") for kind, mutate in VALID.items()])
def test_what_is_valid_is_reported_checked_and_compared(run, mutate):
    mutate(run)
    call("report", run).ends(0)
    call("diff", run, run).ends(0)
    if call("check", run).code not in (0, 1):
        raise Fault("wrong", "not checked")


def drop_loss(run):
    path = run / "results.json"
    content = json.loads(path.read_text())
    del content["values"][NAME]["loss"]
    path.write_text(json.dumps(content))


LOST = {"gone": lambda run: (run / "results.json").unlink(), "one": drop_loss}


@pytest.mark.parametrize("mutate", [pytest.param(mutate, id=f"C8-lost-{kind}") for kind, mutate in LOST.items()])
def test_lost_values_are_said_everywhere_and_never_made_the_expected_ones(run, mutate):
    expected = file_of(run, "expected").read_bytes()
    mutate(run)
    words = f"{NAME} recorded 2 values, and results.json holds"
    call("report", run).ends(0)
    same(words in (run / "report.html").read_text(), True)
    call("check", run).ends(1, words)
    call("diff", run, run).ends(0, words)
    call("expect", run).ends(2, words, "Resume the run")
    kept(file_of(run, "expected"), expected)


def test_a_run_that_still_goes_on_gives_no_expected_values(run):
    """F5: its notebooks that passed may be all that it has so far."""
    before = file_of(run, "expected").read_bytes()
    edit("status", "state", value="running")(run)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call("expect", run).ends(2, "still going")
    kept(file_of(run, "expected"), before)


def test_expect_keeps_what_the_run_does_not_have(run):
    """F5: values of other notebooks and from citations stay; what the notebook no longer records is dropped."""
    path = file_of(run, "expected")
    others = {"05_fine_tuning/loss": {"value": 1.5, "tolerance": 0.1, "source": "run y"},
              f"{NAME}/gone": {"value": 1, "tolerance": 0, "source": "run y"},
              f"{NAME}/layers": {"value": 80, "tolerance": 0, "source": "citation: z"}}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    screen = (
        call("expect", run).ends(0, f"dropped: {NAME}/gone", "1 kept of other notebooks", "1 from citations").screen
    )
    content = json.loads(path.read_text())
    same(content["05_fine_tuning/loss"], others["05_fine_tuning/loss"])
    same(content[f"{NAME}/layers"], others[f"{NAME}/layers"])
    same(f"{NAME}/gone" in content, False)
    same(f"changed: {NAME}/loss, from 2.5 ± 0.1 to 2.5 ± 0.05" in screen, True)


def test_other_parameters_are_named_as_the_reason(run):
    """F20: a value differs because the run had another seed."""
    edit("manifest", "notebooks", NAME, "parameters", value={"profile": "laptop", "seed": 5, "sizes": [1]})(run)
    edit("results", *LOSS, "value", value=9.5)(run)
    call("check", run).ends(1, "other parameters than those of the expected values: seed = 5 (usually 0)")
    call("expect", run).ends(2, "seed = 5 (usually 0)", "give a run without -p")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("--folder", "other"), "stays in its folder", id="F20-folder"),
        pytest.param(("--profile", "8x80gb"), "profile", id="F20-profile"),
    ],
)
def test_a_resumed_run_is_not_moved(run, tmp_path, arguments, words):
    call("run", "--resume", run, *arguments).ends(2, words)
    same((tmp_path / "other").exists(), False)


def test_redo_needs_a_run(tmp_path):
    """C9: --redo without --resume is refused, and no folder is made."""
    call("run", "--redo", "--folder", tmp_path / "new").ends(2, "--resume")
    same((tmp_path / "new").exists(), False)


def test_a_killed_run_is_not_running(run):
    """E3: its status says running, and nobody holds its lock."""
    edit("status", "state", value="running")(run)
    edit("status", *NOTEBOOK, "status", value="running")(run)
    call("report", run).ends(0)
    same("interrupted: nobody runs it: 0 of 1 notebooks passed" in (run / "report.html").read_text(), True)
    call("check", run).ends(0, "it is interrupted: nobody runs it")
    call("diff", run, run).ends(0, "A did not finish: it is interrupted: nobody runs it")


def test_a_live_run_is_running(run):
    """E3: another process holds the lock."""
    edit("status", "state", value="running")(run)
    hold = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]):\n print('held', flush=True)\n sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        call("report", run).ends(0)
        same("running: 1 of 1 notebooks passed" in (run / "report.html").read_text(), True)
        call("run", "--resume", run).ends(2, "Another run is writing")
        holder.communicate()


def test_no_assert_carries_a_check_of_run_files():
    """F20: with PYTHONOPTIMIZE=1 asserts are gone."""
    from helpers.base.files import ROOT

    for path in (ROOT / "helpers" / "runs").rglob("*.py"):
        same(re.findall(r"^\s*assert\b.*", path.read_text(), re.M), [])


RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner",
          "--inh-caps=-dac_override,-dac_read_search,-fowner")  # fmt: skip
_CALL = "import sys; sys.argv[0] = 'workbook'; from helpers.cli import app; app()"


def without_rights(*arguments):
    """The command by a user who is bound by a file's rights, as root is not."""
    prefix = RIGHTS if os.getuid() == 0 else ()
    if prefix and shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing")
    full = [*prefix, sys.executable, "-c", _CALL, *map(str, arguments)]
    done = subprocess.run(full, capture_output=True, check=False, timeout=120, stdin=subprocess.DEVNULL)
    return Outcome(done.returncode, (done.stdout + done.stderr).decode())


@pytest.mark.whole
@pytest.mark.parametrize("name", ["manifest", "status", "results"])
def test_a_file_without_rights_is_one_sentence(run, name):
    """C8, E5: the command runs as a user who may not read the file."""
    path = file_of(run, name)
    content = path.read_bytes()
    path.chmod(0)
    for use in ("report", "resume"):
        without_rights(*command(use, run)).ends(2, f"Cannot read {path} (Permission denied)")
    path.chmod(0o644)
    kept(path, content)


@pytest.mark.whole
def test_a_read_only_run_folder_is_one_sentence(run):
    """E5: what must write is refused; what only reads still works."""
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        without_rights("report", run).ends(2, f"Cannot write {run / 'report.html'} (Permission denied)")
        without_rights("diff", run, run).ends(2, "No difference beyond tolerance", "Name another file with --html")
        without_rights("run", "--resume", run).ends(2, "Cannot write the run folder")
    finally:
        for path in (run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.whole
def test_a_full_disk_at_the_report_is_one_sentence(run):
    """E5: no file may grow beyond a few bytes, as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); "
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    done = subprocess.run([sys.executable, "-c", limit + _CALL, "report", run], capture_output=True, check=False)
    Outcome(done.returncode, (done.stdout + done.stderr).decode()).ends(2, "Cannot write", "Free some space")
    for path, content in before.items():
        kept(path, content)
    same([path.name for path in run.rglob(".report*")], [])


def test_a_value_that_no_file_can_hold_is_refused(monkeypatch, tmp_path):
    """C8: where it is recorded, and not when somebody reads it."""
    from helpers.runs import recording

    monkeypatch.setenv("WORKBOOK_RUN_DIR", str(tmp_path / "run"))
    for value in ("half \ud800", 10**400, float("inf"), [1], None):
        refused(lambda value=value: recording.record("x", value), "'x'")


PROFILE_DAMAGE = {
    "cut": lambda content: content[:200] + b"\n  x: [",
    "empty": lambda content: b"",
    "list": lambda content: b"- a",
    "text": lambda content: b"laptop",
    "utf16": lambda content: content.decode().encode("utf-16"),
    "twice": lambda content: content + b"precision: fp32\n",
    "unknown": lambda content: content + b"speed: 5\n",
    "number-key": lambda content: content + b"5: 5\n",
    "date": lambda content: content.replace(b"precision: bf16", b"precision: 2026-99-99"),
    "type": lambda content: content.replace(b"cpus: 2", b"cpus: [2]"),
    "deep": lambda content: b"a: " + b"[" * 5000,
}


@pytest.mark.parametrize("kind", [pytest.param(kind, id=f"C8-profile-{kind}") for kind in PROFILE_DAMAGE])
def test_a_damaged_profile_is_named(kind, tmp_path, monkeypatch):
    from helpers.models import profiles

    content = (profiles.FOLDER / "laptop.yaml").read_bytes()
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    (tmp_path / "laptop.yaml").write_bytes(PROFILE_DAMAGE[kind](content))
    refused(profiles.load_profile, "laptop.yaml")
    call("run", "--folder", tmp_path / "run").ends(2, "laptop.yaml")
    same((tmp_path / "run").exists(), False)


def test_a_folder_in_the_place_of_a_profile_is_named(tmp_path, monkeypatch):
    """C8: laptop.yaml is a folder."""
    from helpers.models import profiles

    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    (tmp_path / "laptop.yaml").mkdir()
    refused(profiles.load_profile, "laptop.yaml", "is not a file")


def a_cell(kind, source, **more):
    return {"cell_type": kind, "id": "b", "metadata": {}, "source": source, **more}


PAGES = {
    "attachment": a_cell("markdown", "![x](attachment:gone.png)"),
    "image": a_cell("markdown", "![x](gone/away.png) and [y](../../../gone.ipynb)"),
    "output": a_cell("code", "1", execution_count=1, outputs=[{"output_type": "surprise"}]),
    "png": a_cell("code", "1", execution_count=1,
                  outputs=[{"output_type": "display_data", "metadata": {}, "data": {"image/png": 5}}]),
    "source": {"cell_type": "code"},
    "no-cell": 7,
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(kind, id=f"F3-{kind}") for kind in [*PAGES, "cut", "empty", "folder"]])
def test_a_page_that_cannot_be_made_is_a_line_of_the_report(run, kind):
    path = run / "notebooks" / f"{NAME}.ipynb"
    if kind in PAGES:
        content = json.loads(path.read_text())
        content["cells"].append(PAGES[kind])
        path.write_text(json.dumps(content))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(path.read_text()[:-20] if kind == "cut" else "")
    edit("results", "figures", value={NAME: {"lost": "figures/lost.png"}})(run)
    call("report", run).ends(0)
    page = (run / "report.html").read_text()
    same(f"The figure lost of {NAME} cannot be read" in page, True)
    same((run / "html" / f"{NAME}.html").exists() or f"The page of {NAME} cannot be made" in page, True)
    same("all 1 notebooks passed" in page, True)
