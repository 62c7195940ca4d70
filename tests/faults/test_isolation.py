"""Processes: unattended kernels start clean, nothing outlives a killed run, and stopped time does not count."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from process_tools import processes_with, wait_for

from helpers import training
from helpers.base.clock import LONGEST_GAP, Clock
from helpers.base.files import ROOT
from helpers.base.isolation import conditions, isolated, started_alone
from helpers.base.processes import ChildProcess, Command
from helpers.runs import folder as run_folder
from helpers.runs.parameters import _declared_parameters

from .judge import Fault, no_survivor, not_executed, refused, same

# Runs the notebooks of a folder: DIRECTORY, RUN, seconds for each of their cells. Without torch, whose import takes
# most of the time.
RUN = """
import json
import sys
from dataclasses import replace
from pathlib import Path
from helpers import models, runs
from helpers.runs import folder
folder.DETECT = "raise SystemExit(1)"
directory, target, seconds = sys.argv[1:]
budgets = {name: models.Budget(60, number, 1) for name, number in json.loads(seconds).items()}
profile = replace(models.load_profile("laptop"), budgets=budgets, parameters={})
result = runs.run(runs.Request(profile, notebooks=Path(directory), folder=Path(target)))
print(result.failed)
sys.exit(0 if result.ok else 1)
"""


def notebook(directory: Path, *cells: str, name: str = "00_a", tags: object = ("parameters",)) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    sources = ['profile = "laptop"\nseed = 0', *cells]
    document = {
        "nbformat": 4, "nbformat_minor": 5, "metadata": {},
        "cells": [
            {"cell_type": "code", "id": f"c{index}", "metadata": {"tags": list(tags)} if not index else {},
             "source": source, "outputs": [], "execution_count": None}
            for index, source in enumerate(sources)
        ],
    }  # fmt: skip
    path = directory / f"{name}.ipynb"
    path.write_text(json.dumps(document))
    return path


def start(tmp_path: Path, **environment: str) -> subprocess.Popen:
    budgets = json.dumps({"00_a": 15, "01_b": 2} if (tmp_path / "notebooks/01_b.ipynb").exists() else {"00_a": 60})
    return subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, str(tmp_path / "notebooks"), str(tmp_path / "run"), budgets],
        process_group=0,  # as a shell's job: in an orphaned group Ctrl-Z stops nobody
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def printed(tmp_path: Path) -> str:
    document = json.loads((tmp_path / "run" / "notebooks" / "00_a.ipynb").read_text())
    return "".join("".join(output.get("text", "")) for cell in document["cells"] for output in cell.get("outputs", []))


# --- clean kernels ----------------------------------------------------------------------------------------------------

FACTS = """
import json, os, sys
facts = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSTARTUP", "GIT_DIR", "PYTHONSAFEPATH")}
import importlib.util, random, mine, helpers
torch = importlib.util.find_spec("torch")
facts |= {"random": random.__file__, "torch": torch.origin, "mine": mine.value, "helpers": helpers.__file__}
facts |= {"planted": [name for name in ("PLANTED", "planted") if name in globals() or hasattr(sys, name)]}
facts["optimize"], facts["history"] = sys.flags.optimize, get_ipython().history_manager.enabled
print(json.dumps(facts))
"""


@pytest.mark.whole
def test_d7_f11_a_kernel_starts_clean_whatever_the_caller_has(tmp_path):
    """D7, F11: start-up files of IPython and Python, modules on a path and beside the notebook, Git's variables."""
    home, canary, beside = tmp_path / "home", tmp_path / "canary", tmp_path / "notebooks"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    plant = f"import sys; sys.planted = 1; PLANTED = 1; open({str(canary)!r}, 'a').write(__name__)\n"
    ipython = tmp_path / "ipython" / "profile_default"
    for file in (
        ipython / "startup/00.py", ipython / "startup/01.ipy", home / ".ipython/profile_default/startup/00.py",
        tmp_path / "elsewhere" / "helpers.py", tmp_path / "elsewhere" / "sitecustomize.py", tmp_path / "startup.py",
        beside / "random.py", beside / "torch.py", beside / "helpers.py", beside / "nbclient.py",
        beside / "sitecustomize.py", home / ".local/lib" / python / "site-packages/usercustomize.py",
    ):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(plant)
    config = "c.InteractiveShellApp.exec_lines = ['PLANTED = 1']\n"
    (ipython / "ipython_config.py").write_text(config)
    (ipython / "ipython_kernel_config.py").write_text(config)
    (tmp_path / "notebooks" / "mine.py").write_text("value = 7\n")
    notebook(tmp_path / "notebooks", FACTS)
    process = start(
        tmp_path, HOME=str(home), IPYTHONDIR=str(tmp_path / "ipython"), PYTHONSTARTUP=str(tmp_path / "startup.py"),
        GIT_DIR=str(tmp_path), PYTHONOPTIMIZE="1", PYTHONWARNINGS="error",
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path / 'elsewhere'}", JUPYTER_RUNTIME_DIR="/nowhere/at/all",
    )  # fmt: skip
    screen = process.communicate(timeout=200)[0]
    canary_text = canary.read_text() if canary.exists() else ""
    same((process.returncode, screen[-1500:] if process.returncode else ""), (0, ""))
    facts = json.loads(printed(tmp_path))
    same(facts["mine"], 7)
    same([facts[name] for name in ("planted", "optimize", "history")], [[], 0, False])
    same(
        [facts[name] for name in ("PYTHONPATH", "PYTHONSTARTUP", "GIT_DIR", "PYTHONSAFEPATH")],
        [str(ROOT), None, None, None],
    )
    same(Path(facts["helpers"]), ROOT / "helpers" / "__init__.py")
    assert "site-packages" in facts["torch"], screen
    assert not facts["random"].startswith(str(tmp_path))
    # Only the runner itself, which the shell starts, may have run the caller's sitecustomize.
    if canary_text not in ("", "sitecustomize"):
        raise Fault("execution", f"ran: {canary_text}")


@pytest.mark.parametrize(
    "variable",
    [
        "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT",
        "PYTHONUSERBASE", "PYTHONBREAKPOINT", "PYTHONDEVMODE", "PYTHONMALLOC", "GIT_DIR", "GIT_WORK_TREE",
        "GIT_INDEX_FILE", "GIT_CONFIG_COUNT", "GIT_CEILING_DIRECTORIES", "IPYTHONDIR", "JUPYTER_PATH",
        "JUPYTER_CONFIG_DIR", "JPY_PARENT_PID", "MATPLOTLIBRC", "MPLBACKEND", "LOGLEVEL", "WORLD_SIZE", "RANK",
        "LOCAL_RANK", "MASTER_ADDR", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED",
        "TORCHELASTIC_RUN_ID",
    ],
)  # fmt: skip
def test_d7_a_variable_is_left_out_and_told(variable):
    environment = {"PATH": "/bin", variable: "/somewhere"}
    clean = isolated(environment)
    if clean.get(variable) == "/somewhere":
        raise Fault("wrong", f"{variable} reaches a child")
    same(clean["PYTHONPATH"], str(ROOT))
    same([phrase for phrase in conditions(environment) if variable in phrase], [f"{variable} is set, and was left out"])


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599", "PMI_SIZE": "2",
            "LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}  # fmt: skip


@pytest.mark.whole
def test_f11_a_kernel_waits_for_no_process_that_nobody_starts():
    """F11: the variables of torchrun, mpirun or accelerate, left over in a shell: a training waited for ever."""
    code = "from accelerate import PartialState; print(PartialState(cpu=True).num_processes)"
    with Command([sys.executable, "-c", code], isolated({**os.environ, **LAUNCHED})) as command:
        same(command.result(60).last_line, "1")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_f11_training_refuses_to_wait_for_others(name, monkeypatch):
    """F11: mpirun's or a shell's leftovers; of one process they are put aside, and torchrun's are believed."""
    monkeypatch.setenv(name, "2")
    refused(lambda: training.finetune(None, [], training.Recipe(), Path("x")), f"{name} is 2", "torchrun", "unset")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with started_alone():
        same(os.environ[name], "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for value in ("1", "0", "", "two"):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with started_alone():
            same([name in os.environ, "ACCELERATE_USE_DEEPSPEED" in os.environ], [False, False])
        same(os.environ[name], value)


def test_d7_what_a_machine_may_need_stays_and_is_told():
    """D7: libraries put in front of others, and the number of threads; nothing is told twice about a child."""
    environment = {"LD_PRELOAD": "/x/libjemalloc.so", "OMP_NUM_THREADS": "3", "BASH_ENV": "/x/rc", "HOME": "/h"}
    same({**isolated(environment), **environment}, isolated(environment))
    told = [phrase for phrase in conditions(environment) if "=" in phrase]
    same(told, ["BASH_ENV=/x/rc", "LD_PRELOAD=/x/libjemalloc.so", "OMP_NUM_THREADS=3"])
    same(conditions(isolated({})), conditions({}))


def test_d7_a_start_up_file_of_the_packages_folder_is_told(tmp_path, monkeypatch):
    """D7, F13: a .pth that runs code, unless an installed package lists it; a sitecustomize."""
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    (tmp_path / "a-1.dist-info").mkdir()
    (tmp_path / "a-1.dist-info" / "RECORD").write_text("a.py,,\nlisted.pth,sha256=x,9\n")
    for name, text in {"listed": "import a", "mine": "/x\nimport sys; print(1)", "path": "/elsewhere"}.items():
        (tmp_path / f"{name}.pth").write_text(text)
    (tmp_path / "sitecustomize.py").write_text("")
    told = [phrase for phrase in conditions({}) if str(tmp_path) in phrase]
    same([Path(phrase.split(" runs ")[0]).name for phrase in told], ["sitecustomize.py", "mine.pth"])


@pytest.mark.parametrize("module", ["random", "torch", "json", "psutil", "helpers"])
def test_f11_a_command_is_not_led_astray_by_the_current_folder(module, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Command([sys.executable, "-c", "import helpers, random, json, psutil; print(helpers.__file__)"]) as command:
        same(command.result(60).last_line, str(ROOT / "helpers" / "__init__.py"))
    not_executed(tmp_path / "canary")


NOISE = "print('noise from a start-up file'); print('17'); print('[1]')\n"


def test_f13_what_a_start_up_file_prints_is_no_message():
    """F13: a .pth that prints; the child's messages come through, the noise goes to its errors."""
    lines: list[bytes] = []
    code = f"{NOISE}from helpers.base.parent import Parent\nprint('{{}}')\nParent().send({{'a': 1}})"
    with ChildProcess([sys.executable, "-u", "-c", code], errors=lines.append) as child:
        same(child.receive(60), {})
        same(child.receive(60), {"a": 1})
        with pytest.raises(EOFError):
            child.receive(60)
    same(lines, [b"noise from a start-up file\n", b"17\n", b"[1]\n"])


def test_f13_what_a_start_up_file_prints_does_not_hide_an_answer(monkeypatch):
    monkeypatch.setattr(run_folder, "DETECT", f'{NOISE}print(\'{{"error": "none"}}\')')
    with Command([sys.executable, "-c", run_folder.DETECT]) as command:
        same(command.result(60).last_line, '{"error": "none"}')


@pytest.mark.parametrize(
    "source",
    [
        "%load_ext autoreload\n%autoreload 2\nseed = 3",
        "%matplotlib inline\nseed = 3",
        "!ls\nseed = 3",
        "?print\nseed = 3",
        "seed: int = 3  # a comment\n%time 1 + 1",
        'text = """\n%load_ext is no command here\n"""\nseed = 3',
    ],
    ids=lambda source: f"F13-{source.split()[0]}",
)
def test_f13_a_parameters_cell_may_hold_commands_of_ipython(source):
    """F13: %load_ext in the parameters cell."""
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    same(_declared_parameters({"cells": [cell]}, "x.ipynb")["seed"].default, 3)


def test_f13_a_parameters_cell_that_is_no_python_is_named():
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 3\nrate = = 4"}
    refused(lambda: _declared_parameters({"cells": [cell]}, "x.ipynb"), "x.ipynb", "line 2", "Correct")


@pytest.mark.parametrize("metadata", [{"tags": None}, {}, {"tags": "parameters"}, {"tags": [None, 3]}, {"tags": {}}])
def test_f13_tags_of_any_kind(metadata):
    """F13: "tags": null."""
    cells = [
        {"cell_type": "code", "metadata": metadata, "source": "1"},
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 3"},
    ]
    same([parameter.default for parameter in _declared_parameters({"cells": cells}, "x.ipynb").values()], [3])


# --- the commit -------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("1")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def state(folder: Path) -> tuple[str | None, bool | None]:
    found = run_folder._git_state(folder)
    return found.commit, found.dirty


def test_f11_an_archive_inside_another_repository_has_no_commit(repository):
    (repository / "unpacked").mkdir()
    same(state(repository / "unpacked"), (None, None))


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE"])
def test_f11_git_s_variables_name_no_other_commit(variable, repository, tmp_path, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv(variable, str(tmp_path / "other" / ".git"))
    same(state(repository), (commit, False))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_f11_another_owner_s_checkout_has_its_commit_and_runs_nothing(repository, tmp_path):
    """F11: git refuses it (safe.directory); a monitor that it configures must not run."""
    commit, canary = git(repository, "rev-parse", "HEAD"), tmp_path / "canary"
    git(repository, "config", "core.fsmonitor", f"touch {canary}; false")
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, 12345)
    same(state(repository), (commit, False))
    not_executed(canary)


def test_f11_worktree_shallow_clone_changes_and_no_git(repository, tmp_path, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    (tmp_path / "link").symlink_to(repository)
    for name in ("tree", "shallow", "link"):
        same(state(tmp_path / name), (commit, False))
    git(repository, "config", "status.showUntrackedFiles", "no")
    (repository / "new").write_text("")
    same(state(repository), (commit, True))
    (tmp_path / "none").mkdir()
    same(state(tmp_path / "none"), (None, None))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    same(state(repository), (None, None))


# --- kills ------------------------------------------------------------------------------------------------------------

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def subreaper():
    """This process adopts orphans, as a container's first process, systemd or tmux do."""
    if sys.platform != "linux":
        pytest.skip("only Linux has subreapers")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    for orphan in psutil.Process().children():
        if orphan.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(orphan.pid, 0)


FAMILY = """
import os, subprocess
subprocess.Popen(['sleep', '{0}'])
subprocess.Popen(['sleep', '{0}'], start_new_session=True)
subprocess.Popen(['sh', '-c', 'sleep {0} & sleep {0} & wait'], start_new_session=True)
subprocess.Popen(['sleep', '{0}'], start_new_session=True, env={{}})
import time; time.sleep(600)
"""


def parent(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def roles(runner: int) -> dict[str, list[psutil.Process]]:
    child = processes_with("helpers.runs.child")
    child = [one for one in child if parent(one) == runner]
    kernel = [one for one in processes_with("helpers.runs.kernel") if child and parent(one) == child[0].pid]
    return {"runner": [psutil.Process(runner)], "child": child, "kernel": kernel}


KILLED = (("runner", "child"), ("runner", "kernel"), ("child", "kernel"), ("runner", "child", "kernel"), ("runner",))


@pytest.fixture
def families(tmp_path, moments):
    """Five runs whose cells have started what a run may leave behind: (folder, process, mark of the family)."""
    found = []
    for number in range(len(KILLED)):
        folder, seconds = tmp_path / str(number), f"77{moments.randrange(10**6):06}"
        notebook(folder / "notebooks", FAMILY.format(seconds))
        found.append((folder, start(folder), seconds))
    for _, _, seconds in found:
        wait_for(lambda seconds=seconds: len(processes_with(seconds)) >= 5)
    yield found
    for _, process, seconds in found:
        process.kill()
        process.communicate()
        for one in processes_with(seconds):
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.whole
def test_e1_nothing_outlives_a_kill(families, subreaper, moments):
    """E1: SIGKILL of several at once, at a random moment; sessions of their own, and one without an environment."""
    time.sleep(1.2 + moments.random())  # the runner looks at its family once a second
    for killed, (_, process, _) in zip(KILLED, families, strict=True):
        found = roles(process.pid)
        chosen = [one for role in killed for one in found[role]]
        same((killed, len(chosen)), (killed, len(killed)))
        for one in chosen:
            one.suspend()
        for one in chosen:
            with suppress(psutil.NoSuchProcess):  # the first one's death may end the next
                one.kill()
    for killed, (folder, process, seconds) in zip(KILLED, families, strict=True):
        process.wait(60)
        deadline = time.monotonic() + 8
        while left := [*processes_with(seconds), *processes_with(str(folder))]:
            if time.monotonic() > deadline:
                raise Fault("survivor", f"{killed}: {left}")
            time.sleep(0.1)


PARENT = """
import sys, time
from helpers.base.processes import ChildProcess
child = ChildProcess(["sh", "-c", sys.argv[1]])
print(child.pid, flush=True)
for _ in range(600):
    child.resident_bytes()
    time.sleep(0.1)
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    "command",
    ["sleep {0} & wait", "setsid sleep {0} & setsid sleep {0} & wait", "env -i setsid sleep {0} & wait"],
    ids=["E1-same-session", "E1-own-session", "E1-no-environment"],
)
def test_e1_parent_and_child_killed_together_leave_nothing(command, subreaper):
    seconds = f"78{os.getpid():07}{len(command)}"
    arguments = [sys.executable, "-c", PARENT, command.format(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=isolated(os.environ)) as parent:
        child = int(parent.stdout.readline())
        wait_for(
            lambda: len([one for one in processes_with(seconds) if one.name() == "sleep"]) == command.count("sleep")
        )
        time.sleep(0.5)
        os.kill(parent.pid, signal.SIGSTOP)
        os.kill(child, signal.SIGKILL)
        os.kill(parent.pid, signal.SIGKILL)
    try:
        no_survivor(seconds, 8)
    finally:
        for one in processes_with(seconds):
            one.kill()


@pytest.mark.whole
def test_e1_a_killed_watchdog_is_replaced():
    """E1: the watchdog itself may be killed; the next child has one again."""
    code = (
        "import psutil, sys, time\nfrom helpers.base.processes import ChildProcess\n"
        "def dogs(): return [p for p in psutil.process_iter() if 'helpers.base.watchdog' in p.cmdline()]\n"
        "before = dogs()\nfirst = ChildProcess(['sleep', sys.argv[1]])\ntime.sleep(0.5)\n"
        "[p.kill() for p in dogs() if p not in before]\ntime.sleep(0.2)\n"
        "second = ChildProcess(['sleep', sys.argv[1]])\nprint(1, flush=True)\ntime.sleep(100)"
    )
    seconds = f"79{os.getpid():07}"
    arguments = [sys.executable, "-c", code, seconds]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=isolated(os.environ)) as parent:
        parent.stdout.readline()
        parent.kill()
    no_survivor(seconds, 8)


# --- output quicker than its reader -----------------------------------------------------------------------------------

QUICK = """from IPython.display import publish_display_data
for number in range(8_000):
    publish_display_data({"text/plain": f"{number:04000}"})
print("all", flush=True)
"""


@pytest.mark.whole
def test_f10_no_output_is_lost_however_quick_a_cell_is(tmp_path):
    """F10: the kernel's queue held a thousand; what came while its reader was busy was dropped, and it passed."""
    notebook(tmp_path / "notebooks", QUICK)
    process, status = start(tmp_path), tmp_path / "run/status.json"
    try:
        wait_for(lambda: status.exists() and json.loads(status.read_text())["notebooks"]["00_a"]["cell"] == 3)
        suspended(roles(process.pid)["child"], 3)
        screen = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    same((process.returncode, screen[-1500:] if process.returncode else ""), (0, ""))
    outputs = json.loads((tmp_path / "run/notebooks/00_a.ipynb").read_text())["cells"][-1]["outputs"]
    shown = [int(output["data"]["text/plain"][0]) for output in outputs if "data" in output]
    if shown != list(range(8_000)):
        raise Fault("lost", f"{8_000 - len(shown)} of 8,000 outputs")
    same(printed(tmp_path), "all\n")


# --- stopped time -----------------------------------------------------------------------------------------------------


def test_f15_a_jump_of_the_clock_counts_for_two_seconds_at_most(monkeypatch):
    """F15: the times of the looks, and what counts, by hand; a busy machine's late looks do count."""
    times = iter([100.0, 100.25, 101.5, 143.5, 143.75, 3743.75])
    monkeypatch.setattr("helpers.base.clock.monotonic", lambda: next(times))
    clock = Clock()
    same([round(clock.look(), 2) for _ in range(5)], [0.25, 1.5, 1.5 + LONGEST_GAP, 3.75, 3.75 + LONGEST_GAP])


def suspended(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


WAITS = "import time\nfor step in range(70):\n    time.sleep(0.1)\nprint('through')"
BUSY = "import time\nwhile True:\n    time.sleep(0.1)"


@pytest.mark.whole
def test_f15_stopped_time_does_not_count_and_running_time_does(tmp_path):
    """F15: four stops of 5 seconds in a cell with 15: a paused container, kill -STOP of one or other, Ctrl-Z and fg.

    Another cell, that runs, does run out of its time, and its traceback shows where it was.
    """
    notebook(tmp_path / "notebooks", WAITS)
    notebook(tmp_path / "notebooks", BUSY, name="01_b")
    process = start(tmp_path)
    try:
        status = tmp_path / "run" / "status.json"
        wait_for(lambda: status.exists() and json.loads(status.read_text())["notebooks"]["00_a"]["cell"] == 3)
        runner = psutil.Process(process.pid)
        suspended([runner, *runner.children(recursive=True)], 5)
        for role in ("runner", "kernel"):
            suspended(roles(process.pid)[role], 5)
        process.send_signal(signal.SIGTSTP)
        wait_for(lambda: roles(process.pid)["kernel"][0].status() == psutil.STATUS_STOPPED)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        screen = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    same((process.returncode, screen.splitlines()[-1]), (1, "{'01_b': 'cell 3 ran past its 2 s budget'}"))
    same(printed(tmp_path), "through\n")
    assert json.loads(status.read_text())["notebooks"]["00_a"]["seconds"] < 22
    assert "KeyboardInterrupt" in (tmp_path / "run" / "notebooks" / "01_b.ipynb").read_text()


@pytest.mark.whole
def test_f15_a_stopped_parent_waits_for_its_child(tmp_path):
    """F15, siblings: a worker's answer and a command's end are waited for in time that counts."""
    code = (
        "import sys, time\nfrom helpers.base.processes import ChildProcess\n"
        "child = ChildProcess(['sh', '-c', 'sleep 4.5; echo {}; sleep 100'])\nprint(1, flush=True)\n"
        "print(child.receive(3.5), flush=True)\nchild.end()"
    )
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=isolated(os.environ)) as parent:
        parent.stdout.readline()
        parent.send_signal(signal.SIGSTOP)
        time.sleep(4)
        parent.send_signal(signal.SIGCONT)
        same(parent.communicate(timeout=60)[0], "{}\n")
