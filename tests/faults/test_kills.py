"""Signals at random moments, readers that go away, disks that fill: what was there is kept, and a run can be resumed.

The runs are of a small checkout with two notebooks (see ``tests/unit/runs/checkout.py``), each in a real process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from uuid import uuid4

import pytest

from helpers.base.files import ROOT
from tests.unit.runs.checkout import Checkout, read

from .judge import Fault, Outcome, no_survivor, same
from .test_run_files import _CALL, RIGHTS

pytestmark = pytest.mark.whole
SLOW = "import time\nfrom helpers import runs\nfor number in range(10):\n    runs.record(f'v{number}', number)\n"
SLOW += "    time.sleep(0.1)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    made = Checkout(tmp_path_factory.mktemp("checkout") / "workbook")
    made.notebook("00_first", SLOW)
    made.notebook("01_second", "from helpers import runs\nruns.record('second', 2)")
    made.commit()
    return made


def started(checkout, run, mark="", **streams):
    """``workbook run`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.root), "FAULT_MARK": mark}
    command = [sys.executable, "-c", _CALL, "run", "--folder", str(run)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams}
    return subprocess.Popen(command, cwd=checkout.root, env=environment, stdin=subprocess.DEVNULL, **streams)


def resumable(checkout, run):
    """Judge that a run is reported as what it is, and ends well when it is resumed."""
    if not (run / "manifest.json").exists():  # it had not begun
        return
    if (run / "status.json").exists():
        checkout.workbook("report", run).ends(0)
        title = (run / "report.html").read_text().partition("<title>")[2].partition("</title>")[0]
        if "running" in title:
            raise Fault("wrong", f"nobody runs it: {title}")
    before = read(run, "results")["values"] if (run / "results.json").exists() else {}
    passed = [name for name, entry in states(run).items() if entry["status"] == "passed"]
    checkout.workbook("run", "--resume", run).ends(0, "passed 00_first", "passed 01_second")
    values = read(run, "results")["values"]
    same({name: entry["value"] for name, entry in values["00_first"].items()}, {f"v{n}": n for n in range(10)})
    same(values["01_second"]["second"]["value"], 2)
    for name in passed:
        same(values[name], before[name])
    same([path.name for path in run.glob(".*.json.*")], [])


def states(run):
    return read(run, "status")["notebooks"] if (run / "status.json").exists() else {}


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize(
    ("kind", "latest"),
    [
        pytest.param(signal.SIGTERM, 2.5, id="E4-SIGTERM-early"),
        pytest.param(signal.SIGINT, 8, id="E2-SIGINT"),
        pytest.param(signal.SIGHUP, 8, id="E4-SIGHUP"),
        pytest.param(signal.SIGKILL, 8, id="E3-SIGKILL"),
    ],
)
def test_a_signal_at_any_moment_leaves_a_run_to_resume(checkout, tmp_path, moments, kind, latest, number):
    mark, run = uuid4().hex, tmp_path / "run"
    process = started(checkout, run, mark)
    time.sleep(moments.uniform(0.9, latest))
    process.send_signal(kind)
    screen = process.communicate(timeout=60)[0].decode()
    no_survivor(mark, 15)
    if "Traceback (most recent call last)" in screen:
        raise Fault("traceback", screen[-2000:])
    if kind != signal.SIGKILL and process.returncode == 1:
        Outcome(process.returncode, screen).ends(1, "The run was interrupted.", "--resume", "Report:")
    resumable(checkout, run)


WRITES = """
import sys
from pathlib import Path
from helpers.runs.interrupts import interruptible
from helpers.base.files import write_json
path = Path(sys.argv[1])
try:
    with interruptible():
        print("ready", flush=True)
        while True:
            write_json(path, {"a": list(range(200))})
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("number", range(6))
def test_an_interrupt_within_a_write_is_the_interrupt(tmp_path, moments, number):
    """E2: Ctrl-C at a random moment ends as a KeyboardInterrupt, not as an error of the write."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITES, str(tmp_path / "status.json")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(moments.uniform(0.01, 0.2))
    process.send_signal(signal.SIGINT)
    same(process.communicate(timeout=30)[0].decode().strip(), "KeyboardInterrupt")
    same(json.loads((tmp_path / "status.json").read_text()), {"a": list(range(200))})


FULL = "/dev/full"


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("| head -1", id="F6-head"),
        pytest.param("2>&1 | head -1", id="F6-both"),
        pytest.param(f"> {FULL}", id="F6-full"),
        pytest.param(">&-", id="F6-closed"),
        pytest.param(">&- 2>&- <&-", id="F6-all-closed"),
    ],
)
def test_showing_progress_never_stops_a_run(checkout, tmp_path, shell):
    """F6: the reader of the output is gone, the disk is full, or the output is closed."""
    run = tmp_path / "run"
    in_a_shell(checkout.root, f"run --folder '{run}' {shell}").ends(0)
    same(read(run, "status")["state"], "finished")
    same({entry["status"] for entry in states(run).values()}, {"passed"})
    same((run / "report.html").exists(), True)


@pytest.mark.parametrize(
    ("command", "streams", "code", "words"),
    [
        pytest.param("--help", f">{FULL}", 1, "Cannot read or write (No space left on device)", id="F6-help"),
        pytest.param("--version", f">{FULL}", 1, "Cannot read or write (No space left on device)", id="F6-version"),
        pytest.param("fetch", f">{FULL}", 0, "", id="F6-fetch-full"),
        pytest.param("fetch", "| head -c1", 0, "", id="F6-fetch-head"),
        pytest.param("fetch", ">&- 2>&- <&-", 0, "", id="F6-fetch-closed"),
        pytest.param("run --only zz", f">{FULL} 2>&1", 2, "", id="F6-usage-full"),
        pytest.param("run --notebook {run}/a.ipynb --folder {run}/b", f">{FULL}", 0, "", id="F6-own-notebook"),
    ],
)
def test_who_reads_the_output_changes_no_exit_code(command, streams, code, words, tmp_path):
    """F6: what a command did, or judged, is what its exit code says; what only prints says why it could not."""
    folder = tmp_path / "run"
    folder.mkdir()
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "1", "outputs": [], "execution_count": None}
    own = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    (folder / "a.ipynb").write_text(json.dumps(own))
    in_a_shell(ROOT, f"{command.format(run=folder)} {streams}").ends(code, *filter(None, [words]))


@pytest.mark.parametrize("blocks", [0, 1, 3, 9, 20], ids=lambda blocks: f"E5-{blocks}-KiB")
def test_a_run_whose_files_may_not_grow_says_what_will_do(checkout, tmp_path, blocks):
    """E5: a limit of the size of a file, which each of the run's files meets in turn; the advice works."""
    run = tmp_path / "run"
    limited = in_a_shell(checkout.root, f"run --folder '{run}'", before=f"ulimit -f {blocks};")
    if blocks >= 20:
        limited.ends(0, "Report: not written", "File too large")
        checkout.workbook("report", run).ends(0)
    elif (run / "manifest.json").exists():
        limited.ends(1, "File too large", "Then resume with: workbook run --resume")
        checkout.workbook("run", "--resume", run).ends(0)
    else:
        limited.ends(1, "File too large", "start the run again, in another folder")
        checkout.workbook("run", "--folder", tmp_path / "other", "--only", "01").ends(0)


def test_a_verdict_stays_though_nobody_reads_it(checkout, tmp_path):
    """F6: check's exit code is its verdict."""
    run, expected = tmp_path / "run", checkout.root / "notebooks/expected/laptop.json"
    checkout.workbook("run", "--folder", run, "--only", "01").ends(0)
    expected.write_text('{"version": 1}')
    for streams, words in ((f">{FULL}", "standard output cannot be written"), ("| head -c1", ""), (">&-", "")):
        in_a_shell(checkout.root, f"check '{run}' {streams}").ends(0, words)
    expected.unlink()


def in_a_shell(root, command, before=""):
    """The outcome of ``workbook`` in the checkout ``root``, with what a shell does with its streams."""
    call = f"{before} '{sys.executable}' -c \"{_CALL}\" {command}"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    shell = ["bash", "-o", "pipefail", "-c", call]
    done = subprocess.run(shell, cwd=root, env=environment, capture_output=True, check=False, timeout=120)
    return Outcome(done.returncode, (done.stdout + done.stderr).decode())


def on_a_small_disk(script, disk, checkout):
    """Run a shell script with 120 MiB of disk at ``disk``."""
    if os.getuid() or not shutil.which("unshare"):
        pytest.skip("only root may mount a small disk")
    disk.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout.root), "DISK": str(disk)}
    full = f"mount -t tmpfs -o size=120m tmpfs '{disk}' || exit 77\n{script}"
    command = ["unshare", "-m", "bash", "-c", full]
    done = subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, check=False, timeout=200)
    if done.returncode == 77:
        pytest.skip("no small disk can be mounted here")
    return Outcome(done.returncode, (done.stdout + done.stderr).decode())


def test_a_disk_that_fills_stops_a_run_that_can_be_resumed(checkout, tmp_path):
    """E5: a notebook fills the disk; the report cannot be written either, and is when there is room again."""
    call = f"'{sys.executable}' -c \"{_CALL}\""
    script = f"""
    head -c 110M /dev/zero > $DISK/big & wait; rm $DISK/big
    {call} run --folder $DISK/run --only 01 || exit 10
    head -c 200M /dev/zero > $DISK/big 2>/dev/null
    rm $DISK/run/report.html; head -c 1M /dev/zero >> $DISK/big 2>/dev/null
    {call} report $DISK/run; test $? = 2 || exit 11
    {call} run --resume $DISK/run --only 00; test $? = 2 || exit 12
    rm $DISK/big
    {call} run --resume $DISK/run --only 00,01 || exit 13
    test -s $DISK/run/report.html || exit 14
    """
    outcome = on_a_small_disk(script, tmp_path / "disk", checkout)
    outcome.ends(0, "Cannot write", "No space left on device", "Free at least 100 MiB", "passed 00_first")


def test_a_notebook_that_fills_the_disk_is_named(checkout, tmp_path):
    """E5: the run stops and says why; what was recorded before is kept, and the run can be resumed."""
    checkout_2 = Checkout(tmp_path / "workbook")
    fill = "import os\nfrom helpers import runs\nruns.record('kept', 1)\n"
    fill += "open(os.environ['WORKBOOK_RUN_DIR'] + '/big', 'wb').write(b'x' * 200 * 2**20)"
    checkout_2.notebook("00_first", fill)
    checkout_2.notebook("01_second", "from helpers import runs\nruns.record('second', 2)")
    call = f"'{sys.executable}' -c \"{_CALL}\""
    script = f"""
    {call} run --folder $DISK/run; test $? = 1 || exit 10
    rm $DISK/run/big
    {call} report $DISK/run || exit 11
    grep -q 'interrupted: nobody runs it' $DISK/run/report.html || exit 12
    grep -q '"kept"' $DISK/run/results.json || exit 13
    {call} run --resume $DISK/run --only 01 || exit 14
    """
    outcome = on_a_small_disk(script, tmp_path / "disk", checkout_2)
    outcome.ends(0, "The run stopped: Cannot write", "No space left on device", "--resume")


def test_a_read_only_checkout_runs_elsewhere(tmp_path):
    """E5: the run folder is outside of the checkout."""
    checkout, run = Checkout(tmp_path / "workbook"), tmp_path / "run"
    checkout.notebook("01_second", "1")
    prefix = RIGHTS if os.getuid() == 0 else ()
    if prefix and not shutil.which("setpriv"):
        pytest.skip("setpriv is missing")
    folders = [checkout.root, *(path for path in checkout.root.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:

        def call(*arguments):
            environment = {**os.environ, "PYTHONPATH": str(checkout.root), "PYTHONDONTWRITEBYTECODE": "1"}
            command = [*prefix, sys.executable, "-c", _CALL, *map(str, arguments)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
            return Outcome(done.returncode, (done.stdout + done.stderr).decode())

        call("run").ends(2, "Cannot write the run folder", "name another folder")
        call("run", "--folder", run).ends(0, "passed 00_first", "Report:")
        call("expect", run).ends(2, "Cannot write", "laptop.json (Permission denied)")
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("without", "given"),
    [
        pytest.param(["HOME"], {}, id="E5-HOME-unset"),
        pytest.param([], {"HOME": "/nonexistent/home"}, id="E5-HOME-gone"),
        pytest.param([], {"PYTHONOPTIMIZE": "1"}, id="F20-PYTHONOPTIMIZE"),
        pytest.param([], {"LC_ALL": "C"}, id="E5-LC_ALL"),
        pytest.param([], {"LC_ALL": "C", "PYTHONUTF8": "0"}, id="E5-no-UTF-8"),
        pytest.param([], {"TERM": "dumb", "COLUMNS": "1"}, id="F6-one-column"),
    ],
)
def test_an_odd_environment_changes_nothing(checkout, tmp_path, without, given):
    # A Python without UTF-8, which the command itself never is, cannot name the other folder.
    run = tmp_path / ("run" if "PYTHONUTF8" in given else "run ü")
    checkout.workbook("run", "--folder", run, environment=given, without=without).ends(0, "passed 00_first", "Report:")
    same(read(run, "results")["values"]["01_second"]["second"]["value"], 2)
    same([path.name for path in checkout.root.rglob("~")], [])
