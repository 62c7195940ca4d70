"""The runner: whole runs of tiny notebooks in real kernels, and its parts alone."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from helpers import runs
from helpers.base.files import ROOT
from helpers.base.isolation import isolated
from helpers.cli import app
from helpers.models import Budget, ModelRef, Profile, Requirement, load_profile, profiles
from helpers.models.loaded import Load
from helpers.runs import child, execution, fetching, folder, rendering, supervision
from helpers.runs.display import _describe, _PlainLines, _table
from helpers.runs.document import _cells_hash
from helpers.runs.folder import _hub_commit
from helpers.runs.interrupts import interruptible
from helpers.runs.notebook import (
    _declared_models,
    _plan_run,
    _roles_to_fetch,
    _select,
    _undeclared,
)
from helpers.runs.parameters import _declared_parameters, _parse_parameters
from helpers.runs.rendering import _clean, _source_notebook
from helpers.runs.schema import _NotebookStatus, _Status
from tests.unit.base.test_processes import processes_with, wait_for
from tests.unit.models.test_loading_at_scale import Hub

TOKEN = "hf_sentinel123ABCDEFGHIJKLMNOPQRSTUVW"
DEFAULTS = 'profile = "laptop"\nseed = 0\nrate = 0.5\nname = "x"\nquick = True\nitems = [1]\nfree = None'


@pytest.fixture(autouse=True)
def interrupts():
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def make_notebook(directory, name, *cells, parameters=DEFAULTS, models=None):
    """A notebook file with a parameters cell (unless None) and the given code cells, written as plain JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    tagged = [(parameters, ["parameters"])] if parameters is not None else []
    document = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"workbook": {"models": models}} if models else {},
        "cells": [
            {"cell_type": "code", "id": f"c{index}", "metadata": {"tags": tags}, "source": source, "outputs": [],
             "execution_count": None}
            for index, (source, tags) in enumerate([*tagged, *((cell, []) for cell in cells)])
        ],
    }  # fmt: skip
    path = directory / f"{name}.ipynb"
    path.write_text(json.dumps(document))
    return path


def make_profile(*names, parameters=None, model="env/models/none", source="embedded", budget=Budget(60, 40, 5)):  # noqa: B008
    ref = ModelRef(model, "falcon", "plain", source=source, stand_in_for="tiiuae/falcon-180B")
    budgets = dict.fromkeys(names, budget)
    needs = Requirement()
    return Profile(
        "laptop", "for tests", ref, ref, ref, "bf16", ("bf16",), (("falcon",),), needs, budgets, parameters or {}
    )


def quiet():
    return Console(file=io.StringIO())


def run_notebooks(profile=None, *, command=(), console=None, **request):
    return runs.run(runs.Request(profile, **request), command=command, console=console)


def status_of(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def outputs(run_dir, name):
    """Everything the code cells of an executed notebook show, as one text."""
    notebook = json.loads((run_dir / "notebooks" / f"{name}.ipynb").read_text())
    return json.dumps([cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"])


# --- whole runs -------------------------------------------------------------------------------------------------------

SURVIVOR = "987654"  # the seconds a child sleeps: nobody else sleeps that long, so it is found by them
GOOD = (
    "import os, subprocess, sys\nfrom pathlib import Path\nfrom IPython.display import HTML, display\n"
    "from helpers import base, runs\ntoken = os.environ['HF_TOKEN']\nprint('token', token)",
    "display(HTML(f'<b>{token}</b>'))\nruns.record('secret', token)\nruns.record('seed', seed, claim='A1')\n"
    "run = Path(os.environ['WORKBOOK_RUN_DIR'])\n(run / 'mine.txt').write_text(token)\n"
    "(run / 'mine.bin').write_bytes(b'\\xff\\x00' + token.encode())\n"
    "print(*(f'\\x1b[1m{part}' for part in [token]), file=sys.stderr)",
    "os.system(f'echo from a child {token} >&2')\n"
    f"child = subprocess.Popen(['sleep', '{SURVIVOR}'], start_new_session=True)\n"
    f"subprocess.run(['sh', '-c', 'setsid sleep {SURVIVOR} & exit'])",
    "import json\nfacts = {name: os.environ.get(name) for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}\n"
    "facts |= {'python': sys.executable, 'folder': os.getcwd(), 'given': [profile, seed, rate, items]}\n"
    "facts |= {'unattended': base.unattended(), 'backend': os.environ['MPLBACKEND']}\n"
    "(run / 'facts.json').write_text(json.dumps(facts))",
    "import time\nheld = bytearray(300 * 2**20)\ntime.sleep(1.5)\ndel held",
)


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """One run of six notebooks, of which one passes; a token in the environment, a broken kernelspec at the user's."""
    base = tmp_path_factory.mktemp("mixed run ü")
    notebooks, run_dir = base / "notebooks", base / "run {x}"
    make_notebook(notebooks, "00_good", *GOOD)
    make_notebook(notebooks, "01_raises", "import os\nprint('before')", "raise ValueError(os.environ['HF_TOKEN'])", "1")
    make_notebook(
        notebooks, "02_killed", "import os, time", "print('half')\ntime.sleep(0.5)\nos.kill(os.getpid(), 9)", "1"
    )
    make_notebook(notebooks, "03_exits", "import sys\nsys.exit(0)", "print('never')")
    make_notebook(notebooks, "05_quits", "quit()", "print('too late')")
    make_notebook(notebooks, "04_slow", "import time\ntime.sleep(100)", "print('never')")
    names = [path.stem for path in notebooks.glob("*.ipynb")]
    profile = make_profile(*names, parameters={"00_good": {"rate": 0.25}})
    profile.budgets["04_slow"] = Budget(60, 1, 5)
    spec = base / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("JUPYTER_PATH", str(base / "jupyter"))
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(base)
        arguments = {
            "notebooks": Path("notebooks"),
            "folder": Path("run {x}"),
            "parameters": ["seed=7", f"name={TOKEN}"],
        }
        result = run_notebooks(
            profile, **arguments, command=["workbook", "run", "-p", f"name={TOKEN}"], console=quiet()
        )
    return notebooks, run_dir, profile, result


@pytest.mark.slow
def test_a_failure_stops_nothing_and_each_says_why(mixed_run):
    _, run_dir, _, result = mixed_run
    assert result.passed == ("00_good",)
    assert not result.ok
    reasons = {name: entry["reason"] for name, entry in status_of(run_dir)["notebooks"].items()}
    assert reasons == {
        "00_good": None,
        "01_raises": "error in cell 4: ValueError: [redacted]",
        "02_killed": "kernel died at cell 4",
        "03_exits": "error in cell 3: SystemExit: 0",
        "04_slow": "cell 3 ran past its 1 s budget",
        "05_quits": "cell 3 asked the kernel to exit",
    }
    assert {name: reasons[name] for name in result.failed} == result.failed
    assert status_of(run_dir)["state"] == "finished"


@pytest.mark.slow
def test_cells_are_counted_as_the_executed_notebook_counts_them(mixed_run):
    _, run_dir, _, _ = mixed_run
    notebook = json.loads((run_dir / "notebooks" / "02_killed.ipynb").read_text())
    assert notebook["cells"][1]["metadata"]["tags"] == ["injected-parameters"]
    died = notebook["cells"][3]
    assert [output.get("name", output.get("ename")) for output in died["outputs"]] == ["stdout", "KernelDied"]
    assert notebook["cells"][4]["outputs"] == []
    entry = status_of(run_dir)["notebooks"]["02_killed"]
    assert (entry["cell"], entry["cells"], entry["line"]) == (4, 5, "print('half')")
    assert entry["peak_bytes"] > 20 * 2**20


def test_the_run_s_peak_is_that_of_all_processes_at_one_moment():
    progress = supervision._Progress()
    for family, own in ((100, 7), (90, 20), (95, 7)):
        progress.weigh(family, own)
    assert (progress.peak_bytes, progress.tree_bytes) == (100, 110)


@pytest.mark.slow
def test_the_run_s_peak_holds_a_cell_s_memory_and_the_runner_s(mixed_run):
    _, run_dir, _, _ = mixed_run
    status = status_of(run_dir)
    large, small = (status["notebooks"][name]["peak_bytes"] for name in ("00_good", "02_killed"))
    assert large - small > 200 * 2**20
    assert status["peak_bytes"] - large > 20 * 2**20  # this process


@pytest.mark.slow
def test_no_papermill_records_in_executed_notebooks(mixed_run):
    _, run_dir, _, _ = mixed_run
    for path in (run_dir / "notebooks").glob("*.ipynb"):
        assert '"papermill"' not in path.read_text()


@pytest.mark.slow
def test_the_token_is_in_no_file_of_the_run(mixed_run):
    _, run_dir, _, _ = mixed_run
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert [path for path in files if b"sentinel123" in path.read_bytes()] == []
    assert outputs(run_dir, "00_good").count("[redacted]") >= 3
    assert "[redacted]" in outputs(run_dir, "01_raises")
    assert "[redacted]" in (run_dir / "logs" / "00_good.log").read_text()
    assert json.loads((run_dir / "results.json").read_text())["values"]["00_good"]["secret"]["value"] == "[redacted]"
    assert (run_dir / "mine.txt").read_text() == "[redacted]"
    assert (run_dir / "mine.bin").read_bytes() == b"\xff\x00" + b"*" * len(TOKEN)
    assert json.loads((run_dir / "manifest.json").read_text())["parameters"] == {"seed": "7", "name": "[redacted]"}


@pytest.mark.slow
def test_no_process_survives(mixed_run):
    assert processes_with(SURVIVOR) == []


@pytest.mark.slow
def test_the_kernel_is_this_interpreter_in_the_notebooks_folder(mixed_run):
    notebooks, run_dir, _, _ = mixed_run
    assert json.loads((run_dir / "facts.json").read_text()) == {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "python": sys.executable,
        "folder": str(notebooks),
        "given": ["laptop", 7, 0.25, [1]],
        "unattended": True,
        "backend": "module://matplotlib_inline.backend_inline",
    }


@pytest.mark.slow
def test_manifest_says_what_ran(mixed_run):
    notebooks, run_dir, _, _ = mixed_run
    content = json.loads((run_dir / "manifest.json").read_text())
    import torch

    assert content["packages"]["torch"] == torch.__version__
    assert content["python"] == sys.version.split()[0]
    assert content["hardware"]["cpu_count"] >= 1
    assert content["seeds"]["00_good"] == 7
    assert content["notebooks"]["00_good"]["parameters"]["rate"] == 0.25
    digest = subprocess.run(["sha256sum", notebooks / "00_good.ipynb"], capture_output=True, text=True, check=True)
    assert content["notebooks"]["00_good"]["sha256"] == digest.stdout.split()[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert content["git"]["commit"] == (head.stdout.strip() or None)
    assert content["command"] == ["workbook", "run", "-p", "name=[redacted]"]
    assert content["started"] <= content["finished"]


@pytest.mark.slow
def test_a_run_in_a_used_folder_is_refused(mixed_run):
    notebooks, run_dir, profile, _ = mixed_run
    with pytest.raises(runs.UsageError, match="resume"):
        run_notebooks(profile, notebooks=notebooks, folder=run_dir, console=quiet())


@pytest.mark.slow
def test_resume_runs_only_what_did_not_pass_or_changed(mixed_run, monkeypatch):
    notebooks, run_dir, profile, _ = mixed_run
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    again = {"notebooks": notebooks, "resume": run_dir, "console": quiet()}
    first = status_of(run_dir)
    before = first["notebooks"]["00_good"]
    with pytest.raises(runs.UsageError, match="-p name"):
        run_notebooks(profile, **again)
    # A mended notebook and one that passed: only the mended one runs.
    make_notebook(notebooks, "02_killed", "print('mended')")
    result = run_notebooks(profile, only=["00", "02"], parameters=[f"name={TOKEN}"], **again)
    assert result.ok
    assert result.passed == ("00_good", "02_killed")
    after = status_of(run_dir)["notebooks"]
    assert status_of(run_dir)["peak_bytes"] >= first["peak_bytes"]
    assert after["00_good"] == before
    assert after["01_raises"]["status"] == "failed"
    assert "mended" in outputs(run_dir, "02_killed")
    assert json.loads((run_dir / "manifest.json").read_text())["notebooks"].keys() == after.keys()
    # Another parameter makes what passed before out of date.
    session = execution._Session(run_dir, profile, _plan_run(profile, notebooks, ["02"], {"seed": "8"}, {}), ())
    assert session.status.notebooks["02_killed"].status == "pending"
    with pytest.raises(runs.UsageError, match="profile laptop"):
        run_notebooks("8x80gb", **again)


# The laptop's profile, without the look at the machine, for which torch would be imported.
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from helpers import models, runs
from helpers.runs import folder
folder.DETECT = "raise SystemExit(1)"
profile = replace(models.load_profile("laptop"), budgets={"00_long": models.Budget(60, 40, 5)}, parameters={})
runs.run(runs.Request(profile, notebooks=Path(sys.argv[1]), folder=Path(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_runner(tmp_path, number):
    seconds = str(800_000 + number)
    code = f"import subprocess\nsubprocess.run(['sleep', '{seconds}'], start_new_session=True)"
    make_notebook(tmp_path / "notebooks", "00_long", code)
    arguments = [str(tmp_path / "notebooks"), str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: processes_with(seconds))
        wait_for(lambda: status_of(tmp_path / "run")["notebooks"]["00_long"]["cell"] == 3)
        if number == signal.SIGTERM:
            with pytest.raises(runs.RunFolderError, match="Another run"):
                run_notebooks(make_profile("00_long"), notebooks=tmp_path / "notebooks", resume=tmp_path / "run")
        process.send_signal(number)
        process.wait(timeout=30)
        wait_for(lambda: not processes_with(seconds), 15)
        wait_for(lambda: not processes_with(str(tmp_path)), 15)
    finally:
        process.kill()
    entry = status_of(tmp_path / "run")
    if number != signal.SIGKILL:
        assert entry["state"] == "interrupted"
        assert entry["notebooks"]["00_long"]["reason"] == "interrupted at cell 3"


@pytest.mark.slow
@pytest.mark.parametrize("last", ["os.kill(os.getpid(), 9)", "1"])
def test_no_unmarked_process_survives_its_kernel(tmp_path, monkeypatch, last):
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    seconds = f"81235{len(last)}"
    code = f"import os, subprocess\nsubprocess.Popen(['sleep', '{seconds}'], env={{}}, start_new_session=True)\n{last}"
    make_notebook(tmp_path, "00_a", code)
    result = run_notebooks(make_profile("00_a"), notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    assert result.ok is (last == "1")
    try:
        assert processes_with(seconds) == []
    finally:
        for process in processes_with(seconds):
            process.kill()


@pytest.mark.slow
def test_a_cell_deaf_to_interrupts_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")  # importing torch would take most of the time
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(100)"
    make_notebook(tmp_path, "00_deaf", deaf)
    profile = make_profile("00_deaf", budget=Budget(60, 1))
    result = run_notebooks(profile, notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    assert result.failed == {"00_deaf": "cell 3 ran past its 1 s budget"}
    assert status_of(tmp_path / "run")["notebooks"]["00_deaf"]["seconds"] < 30


def test_a_full_disk_ends_the_run_with_a_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    make_notebook(tmp_path, "00_a", "1")
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    monkeypatch.setattr(execution, "_supervise", full)
    with pytest.raises(execution.RunError, match=r"No space left on device.*--resume") as caught:
        run_notebooks(make_profile("00_a"), notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    assert caught.value.exit_code == 1
    assert status_of(tmp_path / "run")["state"] == "interrupted"


def test_a_nearly_full_disk_and_an_unwritable_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunFolderError, match=r"Cannot write.*file"), folder._held(tmp_path / "file" / "run"):
        pass
    monkeypatch.setattr(folder, "LEAST_FREE_BYTES", 2**70)
    with pytest.raises(runs.RunFolderError, match="MiB are free"), folder._held(tmp_path / "run"):
        pass


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebooks(tmp_path):
    make_notebook(tmp_path, "01_a", "1")
    make_notebook(tmp_path, "02_b", "1", parameters="profile = 'laptop'\nseed: int = 3\nlimit = -2")
    make_notebook(tmp_path, "02_c", "1", parameters="# nothing but the profile\nprofile = 'laptop'")
    return tmp_path


def planned(notebooks, raw=(), only=(), parameters=None, earlier=None):
    profile = make_profile("01_a", "02_b", "02_c", parameters=parameters)
    plans = _plan_run(profile, notebooks, only, _parse_parameters(raw), earlier or {})
    return {plan.name: plan for plan in plans}


def test_selection_is_by_the_start_of_the_name(notebooks):
    profile = make_profile("01_a", "02_b", "02_c")
    assert [path.stem for path in _select(notebooks, [], profile)] == ["01_a", "02_b", "02_c"]
    assert [path.stem for path in _select(notebooks, ["02"], profile)] == ["02_b", "02_c"]
    assert [path.stem for path in _select(notebooks, ["02_c", "01"], profile)] == ["01_a", "02_c"]
    with pytest.raises(runs.UsageError, match=r"'7'.*01_a, 02_b, 02_c"):
        _select(notebooks, ["7"], profile)
    with pytest.raises(runs.UsageError, match="workbook render"):
        _select(notebooks / "none", [], profile)


def test_an_unknown_parameter_names_itself_and_those_there_are(notebooks):
    with pytest.raises(runs.UsageError, match=r"no parameter 'sed'\. Choose one of: .*profile, seed, limit\.$"):
        planned(notebooks, ["sed=1"], only=["02"])
    assert planned(notebooks, ["limit=5"])["02_b"].given == {"profile": "laptop", "limit": 5}


def test_parameters_go_only_where_they_exist_and_override_the_profile(notebooks):
    plans = planned(notebooks, ["seed=9"], parameters={"01_a": {"seed": 4, "rate": 1}, "02_b": {"limit": 0}})
    assert plans["01_a"].given == {"profile": "laptop", "seed": 9, "rate": 1.0}
    assert plans["02_b"].given == {"profile": "laptop", "limit": 0, "seed": 9}
    assert plans["02_b"].effective == {"profile": "laptop", "limit": 0, "seed": 9}
    assert plans["02_c"].given == {"profile": "laptop"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=3", 3),
        ("rate=2", 2.0),
        ("rate=1e-4", 1e-4),
        ("rate=1.5e+3", 1500.0),
        ("name=falcon mini", "falcon mini"),
        ("name=a=b", "a=b"),
        ("name='12'", "'12'"),
        ("name=12", "12"),
        ("quick=false", False),
        ("items=[2, 3]", [2, 3]),
        ("free=12", 12),
        ("free=twelve", "twelve"),
    ],
)
def test_values_are_read_by_the_default_s_type(notebooks, text, value):
    found = planned(notebooks, [text], only=["01"])["01_a"].given[text.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["seed=x", "seed=1.5", "seed=true", "seed=", "rate=fast", "quick=1", "items=3", "seed", "=1"],
)
def test_values_of_another_type_are_refused(notebooks, text):
    with pytest.raises(runs.UsageError):
        planned(notebooks, [text], only=["01"])


def test_the_profile_is_no_parameter(notebooks):
    with pytest.raises(runs.UsageError, match="--profile"):
        planned(notebooks, ["profile=8x80gb"])


def test_a_profile_that_does_not_fit_the_notebooks_is_refused(notebooks):
    with pytest.raises(runs.UsageError, match=r"'depth' for 01_a"):
        planned(notebooks, parameters={"01_a": {"depth": 1}})
    with pytest.raises(runs.UsageError, match="budget for 01_a"):
        _plan_run(make_profile("02_b"), notebooks, ["01"], {}, {})


def test_a_notebook_without_parameters_cell_is_refused(tmp_path):
    make_notebook(tmp_path, "00_x", "1", parameters=None)
    with pytest.raises(runs.UsageError, match=r"00_x.ipynb needs exactly one cell tagged 'parameters'"):
        _plan_run(make_profile("00_x"), tmp_path, [], {}, {})


def test_computed_defaults_and_broken_files_are_refused(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["size = 2\n", "area = size * size"]}
    with pytest.raises(runs.UsageError, match="area"):
        _declared_parameters({"cells": [cell]}, "x")
    (tmp_path / "00_x.ipynb").write_text("[]")
    with pytest.raises(runs.UsageError, match="not a notebook"):
        _plan_run(make_profile("00_x"), tmp_path, [], {}, {})


def test_inputs_change_with_source_parameters_and_models_but_not_with_budgets(notebooks):
    def inputs(raw=(), **changes):
        profile = make_profile("01_a", "02_b", "02_c", **changes)
        return _plan_run(profile, notebooks, ["01"], _parse_parameters(raw), {})[0].inputs

    first = inputs()
    assert inputs(budget=Budget(1, 1)) == first
    assert inputs(["seed=1"]) != first
    assert inputs(source="hub") != first
    make_notebook(notebooks, "01_a", "2")
    assert inputs() != first


def test_only_the_real_hub_needs_the_network():
    base = {"PATH": "/bin", "MPLBACKEND": "Agg"}
    offline = supervision._environment(base, True, {"NOTEBOOK": "x"})
    online = supervision._environment(base, make_profile(source="hub").offline, {"NOTEBOOK": "x"})
    assert offline.keys() - online.keys() == {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    assert online == isolated({"PATH": "/bin", "WORKBOOK_NOTEBOOK": "x", "WORKBOOK_UNATTENDED": "1"})


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_cut_the_cleaning_up_short(first):
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in stops]
    cleaned = []

    def work():
        try:
            signal.raise_signal(first)  # in this thread: os.kill may hit another one, and be heard later
        finally:
            for number in stops:
                signal.raise_signal(number)
            cleaned.append(first)

    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert cleaned == [first]
    assert [signal.getsignal(number) for number in stops] == before


def test_signals_of_one_moment_are_one_interrupt():
    """E4: SIGHUP and SIGTERM together, as a terminal and a system that end send them; Python warned of a race."""
    code = (
        "import os, signal, time\nfrom helpers.runs.interrupts import interruptible\n"
        "stops = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]\n"
        "try:\n    with interruptible(), interruptible():\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, stops)\n"
        "        for number in stops: os.kill(os.getpid(), number)\n"
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)\n"
        "        time.sleep(5)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_second_signal_between_two_blocks_comes_to_nothing_and_ends_a_later_one():
    """E4: the run has ended and says how to resume it; a further signal ends the report that is written then."""
    with interruptible() as outer:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGINT)
    assert outer.asked


def test_signals_that_were_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_whole_run_is_interruptible_to_its_last_file(tmp_path, monkeypatch):
    """A second signal while the status is written comes to nothing."""

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    finish = execution._Session._finish

    def impatient(session, interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(session, interrupted)

    make_notebook(tmp_path, "00_a", "1")
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    monkeypatch.setattr(execution, "_supervise", interrupted)
    monkeypatch.setattr(execution._Session, "_finish", impatient)
    result = run_notebooks(make_profile("00_a"), notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    assert result.interrupted
    assert status_of(tmp_path / "run")["state"] == "interrupted"


def test_the_manifest_names_the_commit_of_a_hub_model_that_the_run_downloaded(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit, repo = "5f" * 20, tmp_path / "hub" / "models--tiiuae--falcon-180B"
    seen = []

    def download(*_):
        seen.append(json.loads((tmp_path / "run" / "manifest.json").read_text())["models"]["falcon"]["commit"])
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
        return supervision._Progress()

    make_notebook(tmp_path, "00_a", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    monkeypatch.setattr(execution, "_supervise", download)
    profile = make_profile("00_a", model="tiiuae/falcon-180B", source="hub")
    run_notebooks(profile, notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    models = json.loads((tmp_path / "run" / "manifest.json").read_text())["models"]
    assert seen == [None]
    assert {model["commit"] for model in models.values()} == {commit}
    assert _hub_commit(make_profile(source="embedded").models["falcon"]) is None


# --- models of a hub --------------------------------------------------------------------------------------------------

LOADS = (
    "import json, os\nfrom pathlib import Path\nfrom helpers import models\n"
    "settings = models.ModelRef('org/tiny', 'falcon', 'plain', revision='main')\n"
    "commit = models.resolve(settings).name\n"
    "assert commit == os.environ.get('EXPECTED_COMMIT', commit), commit"
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one small model, and an empty cache, for this process and those it starts."""
    from huggingface_hub import constants

    source = tmp_path / "source"
    source.mkdir()
    save_file({"weight": torch.zeros(50_000)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    handler = type("Served", (Hub,), {"folder": source, "asked": [], "breaks": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    handler.cache = cache / "models--org--tiny"
    yield handler
    server.shutdown()
    server.server_close()


def hub_profile(*names):
    ref = ModelRef("org/tiny", "falcon", "plain", revision="main", download_bytes=200_000)
    return replace(make_profile(*names), falcon=ref, falcon_chat=ref, llama_chat=ref)


@pytest.mark.slow
def test_models_are_fetched_before_the_first_notebook_and_kept_at_their_commit(hub, tmp_path, monkeypatch, capfd):
    make_notebook(tmp_path / "notebooks", "00_a", LOADS, models={"falcon": ["profile"]})
    make_notebook(tmp_path / "notebooks", "01_b", LOADS, "assert Path('mended').exists()", models={"falcon": ["bf16"]})
    during = []
    note = lambda: during.append(status_of(tmp_path / "run")["notebooks"]["00_a"]["status"])  # noqa: E731
    hub.before_sending = staticmethod(note)
    profile, again = hub_profile("00_a", "01_b"), {"notebooks": tmp_path / "notebooks", "console": quiet()}
    monkeypatch.setenv("EXPECTED_COMMIT", hub.SHA)
    first = run_notebooks(profile, folder=tmp_path / "run", **again)
    assert first.passed == ("00_a",)
    assert set(during) == {"pending"}
    assert "tiny: ready, 0.2 MiB, " in (said := capfd.readouterr().out)
    assert f"commit {hub.SHA}" in said
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["commits"] == {"org/tiny": hub.SHA}
    assert written["models"]["falcon"]["commit"] == hub.SHA
    assert [name for name, _ in hub.asked if name.endswith("safetensors")] == ["model.safetensors"]
    # The branch moves on; what is resumed stays where the run was.
    earlier, hub.SHA = hub.SHA, "b" * 40
    (tmp_path / "notebooks" / "mended").touch()
    assert run_notebooks(profile, resume=tmp_path / "run", **again).ok
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["commits"] == {"org/tiny": earlier}
    assert {model["commit"] for model in written["models"].values()} == {earlier}
    assert [path.name for path in (hub.cache / "snapshots").iterdir()] == [earlier]
    # A new run takes what the branch is now.
    monkeypatch.setenv("EXPECTED_COMMIT", hub.SHA)
    assert run_notebooks(profile, folder=tmp_path / "new", only=["00"], **again).ok


def test_a_model_that_cannot_be_had_stops_the_run_before_the_first_notebook(hub, tmp_path):
    hub.gated = True
    make_notebook(tmp_path / "notebooks", "00_a", LOADS, models={"falcon": ["profile"]})
    arguments = {"notebooks": tmp_path / "notebooks", "folder": tmp_path / "run", "console": quiet()}
    with pytest.raises(
        execution.RunError, match=r"licence must be accepted.*Then resume with: workbook run --resume"
    ) as at:
        run_notebooks(hub_profile("00_a"), **arguments)
    assert at.value.exit_code == 1
    status = status_of(tmp_path / "run")
    assert (status["state"], status["notebooks"]["00_a"]["status"]) == ("interrupted", "pending")


def test_the_command_fetches_the_models_of_a_profile_or_says_why_not(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "load_profile", lambda _: hub_profile())
    hub.gated = True
    refused = CliRunner().invoke(app, ["fetch", "--profile", "8x80gb"])
    assert refused.exit_code == 1
    assert "licence must be accepted" in refused.stderr
    hub.gated = False
    assert CliRunner().invoke(app, ["fetch", "--profile", "8x80gb"]).exit_code == 0
    assert (hub.cache / "snapshots" / hub.SHA / "model.safetensors").stat().st_size > 200_000
    assert fetching.fetch(hub_profile()) == {"org/tiny": hub.SHA}


def test_an_interruption_ends_a_download_at_once_and_leaves_a_run_to_resume(hub, tmp_path):
    """The first file comes whole; of the second, a hub that has gone silent sends a part."""
    silent = threading.Event()

    def stall(self, file):
        if self.command == "GET" and file.suffix == ".safetensors":
            data = file.read_bytes()
            self.send_response(200)
            for name, value in {"Content-Length": len(data), "ETag": f'"{self.etag(file)}"'}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data[:150_000])
            os.kill(os.getpid(), signal.SIGINT)
            silent.wait(60)
            return None
        return Hub.send_file(self, file)

    hub.send_file = stall
    make_notebook(tmp_path / "notebooks", "00_a", LOADS, models={"falcon": ["profile"]})
    start = time.monotonic()
    try:
        arguments = {"notebooks": tmp_path / "notebooks", "folder": tmp_path / "run", "console": quiet()}
        result = run_notebooks(hub_profile("00_a"), **arguments)
    finally:
        silent.set()
    assert result.interrupted
    assert time.monotonic() - start < 45
    assert not result.ok
    assert status_of(tmp_path / "run")["state"] == "interrupted"
    assert psutil.Process().children(recursive=True) == []
    assert [path.name for path in (hub.cache / "snapshots" / hub.SHA).iterdir()] == ["config.json"]
    assert not list(hub.cache.rglob("*.incomplete"))
    del hub.send_file
    assert fetching.fetch(hub_profile("00_a"), ["falcon"]) == {"org/tiny": hub.SHA}


@pytest.mark.parametrize("offline", [False, True])
def test_nothing_is_fetched_for_a_notebook_that_declares_no_model_nor_for_models_that_are_here(
    tmp_path, monkeypatch, offline
):
    monkeypatch.setattr(execution, "fetch", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(execution, "_supervise", lambda *_: supervision._Progress())
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    # Named in code and comments, and declared of another profile: neither is a reason to download.
    models = {"laptop/falcon": ["bf16"]} | ({"falcon": ["profile"]} if offline else {})
    make_notebook(tmp_path, "00_a", "settings = None  # settings.falcon, settings.models", models=models)
    profile = make_profile("00_a", model="env/models/falcon-mini-draft") if offline else hub_profile("00_a")
    assert run_notebooks(profile, notebooks=tmp_path, folder=tmp_path / "run", console=quiet()).ok


# --- declared models --------------------------------------------------------------------------------------------------


def declared(models, profile="8x80gb"):
    document = {"metadata": {"workbook": {"models": models}}, "cells": []}
    return _declared_models(document, load_profile(profile), "00_a.ipynb")


def test_the_models_that_the_notebooks_declare_are_fetched():
    profile, found = load_profile("8x80gb"), {}
    for path in sorted(execution.NOTEBOOKS.glob("*.ipynb")):
        found[path.stem[:2]] = _roles_to_fetch(_declared_models(json.loads(path.read_text()), profile, path.name))
    assert found == {
        "00": [],
        "01": ["falcon"],
        "02": ["falcon", "llama_chat"],
        "03": ["falcon", "falcon_chat"],
        "04": ["falcon_chat", "llama_chat"],
        "05": ["falcon_chat"],
    }


def test_a_declared_precision_is_the_profile_s_its_list_or_a_literal_one():
    profile = load_profile("8x80gb")
    found = declared({"falcon": ["profile", "nf4"], "llama_chat": ["precisions"], "laptop/falcon_draft": ["fp32"]})
    assert [model.ref for model in found] == [
        profile.falcon, profile.llama_chat, load_profile("laptop").falcon_draft
    ]  # fmt: skip
    assert [model.precisions for model in found] == [(profile.precision, "nf4"), profile.precisions, ("fp32",)]
    assert declared({"laptop/falcon": ["profile"]})[0].precisions == (load_profile("laptop").precision,)
    assert declared({"repair": ["nf4"]}) == declared({profile.repair: ["nf4"]})
    assert declared({"falcon_draft": ["fp32"]}) == ()  # this profile has no draft
    assert _declared_models({"metadata": {}, "cells": []}, profile, "x") == ()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"falcon2": ["profile"]}, "unknown role 'falcon2'. Use one of falcon, falcon_chat, llama_chat, falcon_draft"),
        ({"desktop/falcon": ["profile"]}, "there is no profile 'desktop'"),
        ({"falcon": ["int4"]}, "unknown precision 'int4'. Use one of profile, precisions, fp32"),
        ({"falcon": "nf4"}, "model falcon has no list of precisions"),
        ({"falcon": []}, "model falcon has no list of precisions"),
        (["falcon"], "must name roles"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused_before_anything_runs(tmp_path, models, message):
    make_notebook(tmp_path, "00_a", "1", models=models)
    with pytest.raises(runs.UsageError, match=re.escape(message)):
        run_notebooks(make_profile("00_a"), notebooks=tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


LOADS_TWO = (
    "from pathlib import Path\nimport tempfile\nfrom helpers import models\n"
    "laptop = models.load_profile('laptop')\ndraft = models.load(laptop.falcon_draft, 'fp32')",
    "models.load(laptop.falcon_draft, 'fp32')\nwith tempfile.TemporaryDirectory() as folder:\n"
    "    models.load(models.save(draft, Path(folder) / 'copy'), 'fp32')",
)


@pytest.mark.slow
def test_a_run_names_what_it_loaded_and_fails_a_notebook_that_does_not_declare_it(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    notebooks, run = tmp_path / "notebooks", tmp_path / "run"
    draft = load_profile("laptop").falcon_draft
    make_notebook(notebooks, "00_says", *LOADS_TWO, models={"falcon_draft": ["fp32"]})
    make_notebook(notebooks, "02_silent", LOADS_TWO[0])
    budgets = dict.fromkeys(("00_says", "02_silent"), Budget(60, 40, 5))
    profile = replace(load_profile("laptop"), budgets=budgets, parameters={})
    result = run_notebooks(profile, notebooks=notebooks, folder=run, console=quiet())
    reason = (
        f"The notebook loaded {draft.label} in fp32 and does not declare it. Add it to `workbook: models:` in the "
        "header of the notebook's source."
    )
    assert result.passed == ("00_says",)
    assert result.failed == {"02_silent": reason}
    common = {"role": "falcon_draft", "model": draft.id, "label": draft.label, "precision": "fp32", "commit": None}
    written = [{"notebook": name, **common, "made_here": False} for name in ("00_says", "02_silent")]
    copy = replace(draft, id="copy").label
    written.insert(1, {**written[0], "role": None, "model": "copy", "label": copy, "made_here": True})
    assert json.loads((run / "manifest.json").read_text())["loaded"] == written
    # Resumed with what it loads declared, the notebook passes, and the notes of its first attempt are gone.
    make_notebook(notebooks, "02_silent", LOADS_TWO[0], models={"laptop/falcon_draft": ["profile", "fp32"]})
    again = run_notebooks(profile, notebooks=notebooks, resume=run, only=["02"], console=quiet())
    assert again.passed == ("02_silent",)
    assert json.loads((run / "manifest.json").read_text())["loaded"] == written


def test_a_load_is_declared_by_model_and_precision():
    models = declared({"falcon": ["bf16", "nf4"]})
    load = Load(models[0].ref.id, "label", "nf4", None, False)
    assert _undeclared([load, replace(load, model="copy", precision="int8", made_here=True)], models) is None
    assert "loaded label in int8" in _undeclared([load, replace(load, precision="int8")], models)
    assert "loaded label in nf4" in _undeclared([replace(load, model="other")], models)


def test_the_manifest_hashes_a_packaged_model(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "m.gguf").write_bytes(b"abc")
    monkeypatch.syspath_prepend(str(tmp_path))
    ref = ModelRef("x/y", "llama", "plain", source="package", file="some_package/m.gguf")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert folder._model(ref).sha256 == {"m.gguf": digest}
    assert folder._model(ModelRef("x/y", "llama", "plain", source="package", file="absent/m")).sha256 == {}


def test_plain_lines_when_the_output_is_no_terminal(tmp_path):
    entry = _NotebookStatus(status="pending", budget_seconds=90, inputs="")
    status = _Status(state="running", notebooks={"00_a": entry.model_copy(), "01_b": entry.model_copy()})
    with (tmp_path / "out").open("w") as file:
        show = _PlainLines(Console(file=file, width=20))
        show(status)
        status.notebooks["00_a"].status = "running"
        show(status)
        show(status)
        failed = {"status": "failed", "seconds": 12.4, "reason": "kernel died at cell 3"}
        status.notebooks["00_a"] = status.notebooks["00_a"].model_copy(update=failed)
        show(status)
    assert (tmp_path / "out").read_text().splitlines() == [
        "00_a: running, 0 s of 90 s",
        "00_a: failed, 12 s of 90 s, kernel died at cell 3",
    ]
    changes = {"status": "running", "cell": 3, "cells": 12, "seconds": 4.2, "line": "load [red]it[/red]"}
    running = entry.model_copy(update=changes)
    assert _describe(running) == "running, cell 3 of 12, 4 s of 90 s"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_table(_Status(state="running", notebooks={"00_a": running})))
    shown = console.export_text()
    assert all(text in shown for text in ("00_a", "running", "3/12", "4 s", "90 s", "load [red]it[/red]"))


# --- rendering --------------------------------------------------------------------------------------------------------

SOURCE = """# ---
# jupyter:
#   kernelspec:
#     display_name: Anything
#     name: other
# ---

# %% [markdown]
# # Title

# %% tags=["parameters"]
profile = "laptop"
seed = 0

# %%
import os
here = os.getcwd()
print(here, object())

# %%
print("twice")

# %%
print("twice")
"""


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "notebooks" / "source" / "00_a.py").write_text(SOURCE)
    return tmp_path / "notebooks"


def test_sync_is_stable_and_keeps_the_outputs_of_unchanged_cells(sources):
    import nbformat

    (path,) = rendering._sync(sources)
    first = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == 5
    assert notebook.metadata.kernelspec.name == "python3"
    rendering._sync(sources)
    assert path.read_text() == first
    for cell in notebook.cells[2:]:
        cell.outputs = [nbformat.v4.new_output("stream", text="kept")]
    nbformat.write(notebook, path)
    (sources / "source" / "00_a.py").write_text(SOURCE.replace("here, object()", "object()"))
    rendering._sync(sources)
    outputs_now = [cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells]
    assert [bool(outputs) for outputs in outputs_now] == [False, False, False, True, True]


def test_cells_hash_is_of_texts_types_and_tags(sources):
    (path,) = rendering._sync(sources)
    source = _source_notebook(sources / "source" / "00_a.py")
    assert _cells_hash(json.loads(path.read_text())) == _cells_hash(source)
    source.cells[2].outputs = ["anything"]
    source.metadata["x"] = 1
    assert _cells_hash(json.loads(path.read_text())) == _cells_hash(source)
    source.cells[2].source += " "
    source.cells[1].metadata.tags = []
    assert _cells_hash(json.loads(path.read_text())) != _cells_hash(source)


def test_clean_removes_what_belongs_to_one_run():
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "Box()"}
    text = f"{ROOT}/notebooks at {sys.prefix}/lib, <object object at 0x7f00deadbeef>"
    cells = [
        new_code_cell("p = 1", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("", metadata={"papermill": {"duration": 1}, "tags": []}),
        new_code_cell("x", execution_count=9, outputs=[new_output("display_data", view)]),
        new_code_cell("y", outputs=[new_output("execute_result", {"text/plain": text}, execution_count=9)]),
    ]
    notebook = _clean(new_notebook(cells=cells, metadata={"papermill": {}, "widgets": {"state": 1}}))
    nbformat.validate(notebook)
    assert dict(notebook.metadata) == {}
    assert [cell.source for cell in notebook.cells] == ["", "x", "y"]
    assert dict(notebook.cells[0].metadata) == {}
    assert notebook.cells[1].outputs == []
    assert [cell.execution_count for cell in notebook.cells] == [None, 1, 2]
    assert notebook.cells[2].outputs[0].execution_count == 2
    assert notebook.cells[2].outputs[0].data["text/plain"] == "notebooks at $VIRTUAL_ENV/lib, <object object at 0x…>"


@pytest.mark.slow
def test_cells_are_passed_over_or_may_fail_as_they_are_tagged(tmp_path, monkeypatch):
    """F8: skip-execution, raises-exception, empty and raw cells; the executed notebook holds what ran and no more."""
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    path = make_notebook(tmp_path, "00_tags", "1 / 0", "2 / 0", " ", "print('end')")
    document = json.loads(path.read_text())
    document["cells"][1]["metadata"]["tags"] = ["skip-execution"]
    document["cells"][2]["metadata"]["tags"] = ["raises-exception"]
    document["cells"][3]["metadata"]["tags"] = None
    document["cells"].append({"cell_type": "raw", "id": "raw", "metadata": {}, "source": "text"})
    path.write_text(json.dumps(document))
    result = run_notebooks(make_profile("00_tags"), notebooks=tmp_path, folder=tmp_path / "run", console=quiet())
    assert result.passed == ("00_tags",)
    # Of five code cells and the injected one: one is skipped, and one is empty.
    assert status_of(tmp_path / "run")["notebooks"]["00_tags"]["cells"] == 4
    cells = json.loads((tmp_path / "run" / "notebooks" / "00_tags.ipynb").read_text())["cells"]
    assert [cell["cell_type"] for cell in cells] == ["code"] * 6 + ["raw"]
    kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in cells]
    assert kinds == [[], [], [], ["error"], [], ["stream"], []]


def test_rendering_erases_nothing_that_only_a_notebook_has(sources):
    """F14"""
    (path,) = rendering._sync(sources)
    document = json.loads(path.read_text())
    document["cells"][1]["source"] = "mine = 1"
    path.write_text(json.dumps(document))
    with pytest.raises(runs.UsageError, match=r"00_a.ipynb has what its source does not have: cell 2 \('mine = 1'\)"):
        rendering._sync(sources)
    (sources / "source" / "00_a.py").write_text(SOURCE + "\n# %%\nmine = 1\n")
    rendering._sync(sources)


@pytest.mark.slow
def test_render_writes_the_outputs_of_a_run(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")
    result = runs.render(make_profile("00_a"), sources, tmp_path / "run")
    assert result.ok
    text = (sources / "00_a.ipynb").read_text()
    assert "injected-parameters" not in text
    notebook = json.loads(text)
    assert [cell.get("execution_count") for cell in notebook["cells"]] == [None, 1, 2, 3, 4]
    assert notebook["cells"][3]["outputs"][0]["text"] == ["twice\n"]
    assert "<object object at 0x…>" in "".join(notebook["cells"][2]["outputs"][0]["text"])
    assert _cells_hash(notebook) == _cells_hash(_source_notebook(sources / "source" / "00_a.py"))


def test_a_profile_that_this_machine_cannot_run_is_refused_before_anything_runs(tmp_path):
    make_notebook(tmp_path / "notebooks", "00_quick", "print(1)")
    greedy = replace(make_profile("00_quick"), requires=Requirement(gpus=999, gpu_bytes=80_000_000_000))
    with pytest.raises(runs.UsageError, match="needs 999 GPUs of 80 GB"):
        run_notebooks(greedy, notebooks=tmp_path / "notebooks", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_child_that_dies_before_it_reads_its_job_fails_its_notebook_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    more_than_a_pipe_holds = {"text": "x" * 2**20}
    paths = str(tmp_path / "x.ipynb"), str(tmp_path / "y.ipynb")
    job = child._Job(*paths, more_than_a_pipe_holds, 60, 60, ())
    progress = supervision._supervise(job, os.environ, tmp_path / "log", lambda progress: None)
    assert "ended unexpectedly (exit code 1)" in progress.reason
