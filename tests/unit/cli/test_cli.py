"""The command ``workbook``: its exit codes, what it prints, and that it answers at once."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from typer.testing import CliRunner

from helpers import __version__
from helpers.base.files import ROOT
from helpers.cli import app
from helpers.runs import execution, folder

PARAMETERS = 'profile = "laptop"\nseed = 0'


def make_notebook(directory, name, source):
    cells = [
        {"cell_type": "code", "id": f"c{index}", "metadata": {"tags": tags}, "source": text, "outputs": [],
         "execution_count": None}
        for index, (text, tags) in enumerate([(PARAMETERS, ["parameters"]), (source, [])])
    ]  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    document = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    (directory / f"{name}.ipynb").write_text(json.dumps(document))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Another project folder, with two notebooks of the laptop profile."""
    make_notebook(tmp_path / "notebooks", "00_start_here", "from helpers import runs\nruns.record('seed', seed)")
    make_notebook(tmp_path / "notebooks", "01_loading", "raise ValueError('boom')")
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(folder, "ROOT", tmp_path)  # where runs/ is made
    monkeypatch.setattr(folder, "DETECT", "raise SystemExit(1)")  # importing torch would take most of the time
    monkeypatch.chdir(tmp_path)
    return tmp_path


def workbook(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--only", "01", "-p", "sed=1"], ["sed", "profile, seed"]),
        (["run", "--only", "07"], ["'07'", "00_start_here, 01_loading"]),
        (["run", "--only", "00,07"], ["'07'"]),
        (["run", "-p", "seed=x"], ["seed must be a whole number"]),
        (["run", "-p", "seed"], ["name=value"]),
        (["run", "--parameter", "sed=1"], ["sed", "profile, seed"]),
        (["run", "--profile", "9x9gb"], ["9x9gb", "laptop"]),
        (["run", "--resume", "nowhere"], ["nowhere is not a run folder"]),
        (["report", "nowhere"], ["nowhere is not a run folder"]),
        (["expect", "nowhere"], ["nowhere"]),
        (["check", "nowhere"], ["nowhere is not a run folder"]),
        (["plan", "--profile", "9x9gb"], ["9x9gb"]),
        (["plan", "--gpus", "8*80"], ["'8*80'", "4x80,2x40"]),
        (["plan", "--model", "gpt2"], ["'gpt2'", "tiiuae/falcon-180B"]),
        (["plan", "--gpus", "8x80", "--precision", "int4"], ["'int4'", "fp32, bf16"]),
        (["plan", "--profile", "8x80gb", "--gpus", "8x80"], ["Give --profile, or --model and --gpus"]),
        (["plan", "--suggest", "--gpus", "8x80"], ["Give --model alone"]),
        (["plan", "--batch", "0"], ["batch_size must be a whole number of at least 1"]),
        (["plan", "--gpus", "8x80", "--figure", "plan.pdf"], ["plan.png"]),
        (["fetch", "--profile", "9x9gb"], ["9x9gb"]),
        (["run", "--nonsense"], ["nonsense"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_usage_errors_exit_2_and_name_what_is_wrong(project, arguments, words):
    result = workbook(*arguments)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
    assert "Traceback" not in result.output
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_a_run_from_start_to_expected_values(project):
    failed = workbook("run", "-p", "seed=0")
    assert failed.exit_code == 1
    (run,) = (project / "runs").iterdir()
    assert run.name.endswith("Z-laptop")
    lines = failed.stdout.splitlines()
    assert "passed  00_start_here" in lines
    assert "FAILED  01_loading: error in cell 3: ValueError: boom" in lines
    advice = [line for line in lines if line.startswith("Resume the notebooks that did not pass: ")]
    assert len(advice) == 1
    assert advice[0].endswith(f"workbook run --resume runs/{run.name}")
    assert lines[-1] == f"Report: {run / 'report.html'}"
    assert "ValueError: boom" in (run / "report.html").read_text()

    make_notebook(project / "notebooks", "01_loading", "1")
    mended = workbook("run", "--resume", f"runs/{run.name}")
    assert mended.exit_code == 0
    assert "00_start_here: running" not in mended.stdout
    assert json.loads((run / "manifest.json").read_text())["parameters"] == {"seed": "0"}

    (project / "notebooks" / "expected").mkdir()
    path = project / "notebooks" / "expected" / "laptop.json"
    cited = {"value": 9, "tolerance": 1, "source": "citation somewhere"}
    path.write_text(json.dumps({"00_start_here/cited": cited, "00_start_here/old": cited | {"source": "run x"}}))
    kept = workbook("expect", str(run))
    assert kept.exit_code == 0
    assert json.loads(path.read_text()) == {
        "version": 2,
        "00_start_here/cited": cited,
        "00_start_here/seed": {"value": 0, "tolerance": 0, "source": f"run {run.name}"},
    }
    judged = workbook("check", str(run))  # of both notebooks only 00 records something
    assert (judged.exit_code, judged.stdout.splitlines()) == (
        1,
        [
            "missing: 00_start_here/cited, expected 9",
            "laptop.json: 1 as expected, 0 differ, 1 missing, 0 unmeasured (nothing to compare with: not passed)",
        ],
    )
    path.write_text(json.dumps({"00_start_here/seed": {"value": 0, "tolerance": 0, "source": "run x"}}))
    assert workbook("check", str(run)).exit_code == 0
    path.write_text("{}")
    assert "1 unmeasured" in workbook("check", str(run)).stdout
    (run / "report.html").unlink()
    assert workbook("report", str(run)).stdout.strip() == str(run / "report.html")
    assert (run / "report.html").exists()


def test_plan_shows_what_fits_and_what_is_missing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = workbook("plan", "--profile", "8x40gb")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    lines = [line.split() for line in result.stdout.splitlines()]
    start = next(index for index, line in enumerate(lines) if line[:1] == ["falcon-180B"])
    falcon = {precision: next(line for line in lines[start:] if precision in line) for precision in ("bf16", "nf4")}
    assert "332.59" in falcon["bf16"]  # 178,557,088,768 parameters of two bytes
    assert falcon["bf16"][-1] == "missing"
    assert falcon["nf4"][-1] == "yes"
    assert any(line[:1] == ["meta-llama/Llama-2-70b-chat-hf"] for line in lines)
    assert any(line[:1] == ["02_quantization"] for line in lines)


def test_plan_of_a_model_that_does_not_fit_answers_what_would(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = workbook("plan", "--gpus", "4x80", "--precision", "bf16", "--figure", str(tmp_path / "plan.png"))
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "falcon-180B in bf16 does not fit: it needs 52.7 GiB more than 4 devices of 74.5 GiB can hold." in text
    assert "What would fit: int8 or nf4 on 4 GPUs of 80 GB; bf16 on 5 GPUs of 80 GB." in text
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_plan_of_another_model_as_json():
    options = ["--context", "1024", "--batch", "2", "--library-cache", "--double-quant", "--json"]
    result = workbook("plan", "--model", "tiiuae/falcon-40b", "--gpus", "1x24,1x40", "--precision", "nf4", *options)
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert plan["work"] == {"context_tokens": 1024, "batch_size": 2, "double_quant": True, "cache_heads": "library"}
    (nf4,) = [need for need in plan["needs"] if need["precision"] == "nf4"]
    assert nf4["parts"]["kv_cache"] == 2 * 1024 * 2 * 60 * 128 * 64 * 2
    assert [device["limit"] for device in plan["groups"][0]["devices"]] == [24e9, 40e9]


def test_plan_suggests_what_runs_falcon_180b(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = workbook("plan", "--suggest")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if " x " in line]
    assert rows[0][:6] == ["nf4", "1", "x", "141", "GB", "141"]
    assert len(json.loads(workbook("plan", "--suggest", "--json").stdout)) == len(rows)


def test_a_run_that_stopped_exits_1(monkeypatch):
    def stopped(*_, **__):
        raise execution.RunError("the run stopped: disk full")

    monkeypatch.setattr(execution, "run", stopped)
    result = workbook("run")
    assert result.exit_code == 1
    assert result.stderr == "Error: the run stopped: disk full\n"


HEAVY = ["torch", "transformers", "papermill", "nbformat", "pandas", "matplotlib", "numpy", "scipy", "jupytext"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "--only", "99"]])
def test_answers_without_loading_anything_heavy(arguments):
    code = (
        "import sys\nfrom helpers.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"LOADED [] {2 if '99' in arguments else 0}"


@pytest.mark.parametrize("module", ["helpers.runs.child", "helpers.runs.fetching", "helpers.runs.recording"])
def test_the_processes_of_a_run_start_without_loading_anything_heavy(module):
    code = f"import sys, {module}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_lab_is_this_environment_s_on_the_notebooks(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    assert workbook("lab").exit_code == 0
    ((program, command),) = started
    assert program == sys.executable
    assert command[1:3] == ["-m", "jupyterlab"]
    assert importlib.util.find_spec("jupyterlab")
    assert any(option.endswith("/lab/tree/notebooks/00_start_here.ipynb") for option in command)


def test_the_version_is_that_of_the_module():
    result = workbook("--version")
    assert (result.exit_code, result.stdout) == (0, f"workbook {__version__}\n")
    assert 'version = { attr = "helpers.__version__" }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_help_tells_users_commands_from_maintainers():
    users, maintainers = workbook("--help").stdout.split("For maintainers")
    for text, names in [
        (users, "doctor plan fetch run report check diff lab leaderboard bench finetune"),
        (maintainers, "render expect train-mini evaluate-mini record-hashes"),
    ]:
        listed = [line.split()[1] for line in text.splitlines() if line.startswith("│ ") and line[2] not in " -"]
        assert listed == names.split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What the wheel holds, unpacked: the package alone, without env/ and notebooks/."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, because setuptools leaves its work in the folder.
    shutil.copytree(ROOT / "helpers", folder / "source" / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def workbook_of(folder, *arguments):
    code = f"from helpers.cli import app; app({list(arguments)!r})"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["run", "plan", "doctor", "lab"])
def test_outside_a_checkout_every_command_says_in_a_line_that_it_needs_one(installed, command):
    done = workbook_of(installed, command)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: This command needs the workbook's checkout")
    assert len(done.stderr.splitlines()) == 1


def test_a_wheel_holds_the_templates_and_tells_its_version(installed):
    templates = {path.relative_to(ROOT) for path in (ROOT / "helpers").rglob("*.j2")}
    assert templates == {path.relative_to(installed) for path in installed.rglob("*.j2")}
    assert workbook_of(installed, "--version").stdout == f"workbook {__version__}\n"


def test_an_interrupt_while_the_commands_load_is_no_traceback():
    """E4: Ctrl-C in the first half second."""
    # The handler is set, because a job in the background ignores Ctrl-C from its start.
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'helpers.cli.measure': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from helpers.cli import app\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
