"""make setup: what is installed against the locks, who owns .venv, where the checkout lies, what pip is told.

The real env/setup.sh and real pip work on a small project with locks of three tiny packages, from a folder of wheels.
Only the first environment gets its pip from venv itself, which takes seconds; the others find a copy of it.
"""

import ensurepip
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from helpers.base.files import ROOT
from helpers.planning.findings import _check_versions
from tests.unit.project.set_up import modules

from .judge import Outcome, kept, no_survivor, refused, same

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = f".venv/lib/python{VERSION}/site-packages"
# Builds the editable wheel of the small project without setuptools, which a new environment need not have.
BACKEND = """
import shutil
from pathlib import Path
def get_requires_for_build_editable(settings=None): return []
def build_editable(folder, settings=None, metadata=None):
    wheel = next(Path.cwd().glob("falcon_180b_workbook-*.whl"))
    shutil.copy(wheel, folder)
    return wheel.name
"""
CPU, CUDA = "debug = False\ncuda: Optional[str] = None\n", "debug = False\ncuda: Optional[str] = '13.0'\n"


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel as pip takes it, with the hash and length of each file in its RECORD."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, text)
    return target


def make_wheels(folder: Path) -> Path:
    for version in ("1.0", "2.0"):
        wheel(folder, "one", version, {"one/__init__.py": f"version = {version!r}\n", "one/rest.py": "a = 1\n" * 9})
        wheel(folder, "two", version, {"two.py": f"version = {version!r}\n"})
    wheel(folder, "tool", "1.0", {"tool.py": "1\n"})
    wheel(folder, "torch", "2.0+cpu", {"torch/__init__.py": "", "torch/version.py": CPU})
    return folder


VENV_WITH_PIP = """import subprocess, sys
subprocess.run([sys.executable, "-m", "venv", "--without-pip", sys.argv[1]], check=True)
open(sys.argv[1] + "/lib/python{version}/site-packages/pip.pth", "w").write({pip!r})
"""


def make_project(folder: Path, pip: Path | None = None) -> Path:
    """The checkout's set-up, with small locks and a small package; environments find ``pip`` in that folder."""
    (folder / "env" / "requirements").mkdir(parents=True)
    shutil.copytree(ROOT / "env/setup", folder / "env/setup", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("env/installed.py", "env/setup.sh", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in {"cpu": "one==1.0  # via x\ntorch==2.0+cpu\ntwo==1.0\n", "gpu": "one==1.0\ntorch===2.0\n",
                       "gpu12": "one==1.0\ntorch===1.9\n",
                       "dev": "tool==1.0\n", "models": ""}.items():  # fmt: skip
        (folder / "env" / "requirements" / f"{name}.txt").write_text(f"# head\n{text}")
    helpers = folder / "helpers"
    helpers.mkdir()
    (helpers / "__init__.py").write_text("")
    (helpers / "models.py").write_text("def load_profile(name): return name\ndef prepare(profile): pass\n")
    (helpers / "cli.py").write_text("def app():\n    print(__file__)\n")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    )
    editable = {"__editable__.falcon_180b_workbook-0.pth": f"{folder}\n"}
    wheel(folder, "falcon_180b_workbook", "0", editable)
    # A free disk of gibibytes is not what is tried here.
    change(
        folder / "env/setup/place.py",
        '"cpu": 3 * GIB, "gpu": 10 * GIB, "gpu12": 10 * GIB',
        '"cpu": 0, "gpu": 0, "gpu12": 0',
    )
    if pip:
        (folder / "env/make_venv.py").write_text(VENV_WITH_PIP.format(version=VERSION, pip=str(pip)))
        change(folder / "env/setup/environment.py", '"-m", "venv"', 'str(ROOT / "env/make_venv.py")')
    return folder


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def environment(wheels: Path | None, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    own = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)} if wheels else {}
    return kept | {"PIP_CONFIG_FILE": os.devnull} | own | more


def make_setup(project: Path, wheels: Path | None, *words: str, answer: str = "", **more: str) -> Outcome:
    done = subprocess.run(
        ["make", "-C", str(project), "setup", f"PYTHON={sys.base_prefix}/bin/python{VERSION}", *words],
        env=environment(wheels, **more), input=answer, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout + done.stderr)


def installed(project: Path) -> list[str]:
    return sorted(path.name.removesuffix(".dist-info") for path in (project / PACKAGES).glob("*.dist-info")
                  if path.name.startswith(("one", "two", "tool", "torch")))  # fmt: skip


ALL = ["one-1.0", "tool-1.0", "torch-2.0+cpu", "two-1.0"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return make_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def unpacked_pip(tmp_path_factory):
    """The folder of a pip that is unpacked once, and compiled by whoever uses it first."""
    folder = tmp_path_factory.mktemp("pip")
    with zipfile.ZipFile(next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, wheels):
    """F17: a project that is set up, in a folder whose name has all that a path may have. Each case leaves it whole.

    With Windows line ends, .venv a link to a larger disk, and a caller whose settings of pip, of Python and of its
    terminal would change or break it all.
    """
    base = tmp_path_factory.mktemp("setup")
    project, disk = make_project(base / "a [b] wörk%d #1 'x' $HOME"), base / "disk"
    disk.mkdir()
    (project / ".venv").symlink_to(disk)
    for path in (project / "env/setup.sh", project / "Makefile", *(project / "env/requirements").iterdir()):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    settings = dict.fromkeys(("PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_DRY_RUN", "PYTHONSAFEPATH"), "1")
    settings |= {"PYTHONIOENCODING": "ascii", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error"}
    settings |= {
        name: str(base / name) for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
    }
    make_setup(project, wheels, **settings).ends(0, "Ready after")
    same(installed(project), ALL)
    same((project / ".venv").is_symlink() and (disk / "bin").is_dir(), True)
    same([path.name for path in base.iterdir() if path.name.isupper()], [])
    return project


def whole_again(project: Path, wheels: Path, *words: str) -> None:
    """Judge that make setup repairs with these words, and then finds nothing more."""
    make_setup(project, wheels).ends(0, "Repairing:", *words)
    same(installed(project), ALL)
    make_setup(project, wheels).ends(0, "as locked")


def pip(project: Path, wheels: Path, *words: str) -> None:
    command = [str(project / ".venv/bin/python"), "-m", "pip", *words]
    subprocess.run(command, env=environment(wheels), capture_output=True, check=True)


# --- what is installed ------------------------------------------------------------------------------------------------


def upgraded(project: Path, wheels: Path) -> None:
    pip(project, wheels, "install", "--no-deps", "one==2.0", "two==2.0")


def uninstalled(project: Path, wheels: Path) -> None:
    pip(project, wheels, "uninstall", "-y", "one", "tool")


def file_gone(project: Path, wheels: Path) -> None:
    (project / PACKAGES / "one" / "rest.py").unlink()


def file_cut(project: Path, wheels: Path) -> None:
    (project / PACKAGES / "two.py").write_text("")


def folder_gone(project: Path, wheels: Path) -> None:
    shutil.rmtree(project / PACKAGES / "one")


def records_gone(project: Path, wheels: Path) -> None:
    (project / PACKAGES / "one-1.0.dist-info" / "RECORD").unlink()
    (project / PACKAGES / "two-1.0.dist-info" / "METADATA").unlink()


def twice(project: Path, wheels: Path) -> None:
    shutil.copytree(project / PACKAGES / "one-1.0.dist-info", project / PACKAGES / "one-0.9.dist-info")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (upgraded, ("one 2.0, not 1.0", "two 2.0, not 1.0")),
        (uninstalled, ("one 1.0 is not installed", "tool 1.0 is not installed")),
        (file_gone, ("one 1.0 is damaged: one/rest.py is missing",)),
        (file_cut, ("two 1.0 is damaged: two.py has another length",)),
        (folder_gone, ("one 1.0 is damaged: one/",)),
        (records_gone, ("one 1.0 is damaged", "two 1.0 is damaged")),
        (twice, ("one 0.9 and 1.0, not 1.0",)),
    ],
    ids=lambda value: f"F1-{value.__name__}" if callable(value) else "",
)
def test_f1_what_differs_is_repaired(harm, words, made, wheels):
    harm(made, wheels)
    whole_again(made, wheels, *words)


@pytest.mark.whole
def test_f1_a_repair_without_the_network_says_so_and_works_later(made, wheels):
    uninstalled(made, wheels)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    make_setup(made, None, **nowhere).ends(2, "index could not be reached", "make setup again")
    whole_again(made, wheels, "one 1.0 is not installed")


@pytest.mark.whole
def test_f13_a_start_up_file_that_prints_confuses_nobody(made, wheels):
    """F13: a .pth that prints a Python version."""
    noisy = made / PACKAGES / "noisy.pth"
    noisy.write_text("import sys; print('3.9')\n")
    try:
        done = subprocess.run(
            ["make", "-C", str(made), "setup"], env=environment(wheels), capture_output=True, text=True, check=False
        )
        Outcome(done.returncode, done.stdout + done.stderr).ends(0, "as locked")
    finally:
        noisy.unlink()


@pytest.mark.whole
@pytest.mark.parametrize("streams", ["| head -c1", "> /dev/full", ">&- 2>&- <&-"], ids=lambda value: f"F6-{value}")
def test_f6_a_set_up_goes_on_though_nobody_reads_it(streams, made, wheels):
    uninstalled(made, wheels)
    call = ["bash", "-o", "pipefail", "-c", f'"$0" "$1" {streams}', f"{sys.base_prefix}/bin/python{VERSION}"]
    done = subprocess.run([*call, made / "env/setup"], env=environment(wheels), capture_output=True, check=False)
    same((done.returncode, done.stderr), (0, b""))
    same(installed(made), ALL)


def test_f1_a_lock_that_is_no_text_is_named(setup):
    (setup.place.LOCKS / "cpu.txt").write_bytes(b"\xff\xfeone==1.0\n")
    refused(lambda: setup.packages.install_all("cpu"), "cpu.txt", "UTF-8", "git restore", error=setup.place.SetupError)


@pytest.mark.parametrize(
    ("harm", "status", "words"),
    [
        ("none", "ok", "3 packages as in cpu.txt"),
        ("other", "warn", "one 2.0, not 1.0"),
        ("missing", "fail", "two 1.0 is not installed"),
        ("damaged", "fail", "one 1.0 is damaged: one/rest.py has another length"),
        ("shared", "ok", "3 packages"),
    ],
    ids=lambda value: f"F1-{value}",
)
def test_f1_doctor_and_set_up_compare_alike(harm, status, words, tmp_path, monkeypatch):
    """F1: doctor's finding from the set-up's own comparison; a file of two packages is no damage."""
    packages = tmp_path / "packages"
    for name in ("one-1.0", "two-1.0", "torch-2.0+cpu"):
        with zipfile.ZipFile(next(make_wheels(tmp_path / "wheels").glob(f"{name}-*.whl"))) as archive:
            archive.extractall(packages)
    if harm == "other":
        (packages / "one-1.0.dist-info").rename(packages / "one-2.0.dist-info")
    if harm == "missing":
        shutil.rmtree(packages / "two-1.0.dist-info")
    if harm == "damaged":
        (packages / "one" / "rest.py").write_text("")
    if harm == "shared":
        record = packages / "two-1.0.dist-info" / "RECORD"
        record.write_text(f"{record.read_text()}one/rest.py,sha256=x,1\n")
    lock = tmp_path / "cpu.txt"
    lock.write_text("one==1.0\ntwo==1.0 ; python_version > '3'\ntorch==2.0+cpu\nthree==1 ; sys_platform == 'win32'\n")
    found = runpy.run_path(str(ROOT / "env" / "installed.py"))["compare"]([lock], packages)
    answer = json.dumps({"lock": "cpu.txt", "pins": 3, "differences": found})
    # Only what the answer is about stands in for this Python's own packages.
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", f"echo noise; echo '{answer}'")))
    finding = next(iter(_check_versions(lock)))
    same((finding.status, words in finding.found), (status, True))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- the build of torch -----------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_e7_the_gpu_lock_ends_ready_with_the_cuda_build_alone(tmp_path, unpacked_pip):
    """E7: not with a CPU build that is found first, nor with one of that name; and then it is kept.

    Without LOCK later, and a CPU build put in by hand is repaired.
    """
    wheels, project = make_wheels(tmp_path / "wheels"), make_project(tmp_path / "project", unpacked_pip)
    make_setup(project, wheels, "LOCK=gpu").ends(2, "torch")
    wheel(wheels, "torch", "2.0", {"torch/__init__.py": "", "torch/version.py": CPU})
    outcome = make_setup(project, wheels, "LOCK=gpu").ends(2, "torch 2.0 is built for the CPU")
    same("Ready" in outcome.screen, False)
    wheel(wheels, "torch", "2.0", {"torch/__init__.py": "", "torch/version.py": CUDA})
    make_setup(project, wheels).ends(0, "Ready")
    pip(project, wheels, "install", "--no-deps", "torch==2.0+cpu")
    make_setup(project, wheels).ends(0, "torch 2.0+cpu, not 2.0", "Ready")
    same(installed(project), ["one-1.0", "tool-1.0", "torch-2.0"])


@pytest.mark.parametrize(
    ("cuda", "asked", "last", "lock"),
    [
        ("13.0", "gpu", None, "gpu"),
        ("14.1", "gpu", "gpu12", "gpu"),
        ("12.2", "gpu", None, "gpu12"),
        ("12.9", "gpu", "gpu", "gpu12"),
        ("N/A", "gpu", None, "gpu"),
        (None, "gpu", None, "gpu"),
        ("13.0", "gpu12", None, "gpu12"),
        ("12.2", None, "gpu", "gpu"),
        ("12.2", None, None, "cpu"),
        ("12.2", "cpu", "gpu", "cpu"),
    ],
    ids=lambda value: f"E7-{value}",
)
def test_e7_the_driver_chooses_the_cuda_build(cuda, asked, last, lock, tmp_path, monkeypatch):
    """E7: the workbook's own question to a real program of the driver's name; without one, the newest build."""
    if cuda:
        answer = f"<nvidia_smi_log><cuda_version>{cuda}</cuda_version></nvidia_smi_log>"
        script(tmp_path / "nvidia-smi", f"echo '{answer}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    own = modules(ROOT)
    same(own.driver.chosen_lock(asked, last), lock)


def test_e7_a_driver_too_old_for_every_build_is_named(tmp_path, monkeypatch):
    script(tmp_path / "nvidia-smi", "echo '<nvidia_smi_log><cuda_version>11.4</cuda_version></nvidia_smi_log>'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    own = modules(ROOT)
    refused(lambda: own.driver.chosen_lock("gpu", None), "CUDA 11.4", "525 or later", error=own.place.SetupError)


@pytest.mark.parametrize(
    ("stamp", "build", "lock"),
    [
        ('{"lock": "gpu"}', "2.13.0+cpu", "gpu.txt"),
        ('{"lock": "gpu12"}', "2.10.0", "gpu12.txt"),
        ('{"lock": "cpu"}', "2.13.0", "cpu.txt"),
        (None, "2.13.0+cpu", "cpu.txt"),
        (None, "2.13.0", "gpu.txt"),
        (None, "2.10.0", "gpu12.txt"),
        ('{"lock": "../../etc"}', "2.10.0", "gpu12.txt"),
        ("[", "2.13.0", "gpu.txt"),
    ],
    ids=lambda value: f"E7-{value}",
)
def test_e7_doctor_compares_with_the_lock_that_was_asked_for(stamp, build, lock, tmp_path, monkeypatch):
    """E7: a CPU build in an environment that was set up for CUDA is a difference, not another lock's right build."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    if stamp:
        (tmp_path / "setup.json").write_text(stamp)
    (tmp_path / f"torch-{build}.dist-info").mkdir()
    same(runpy.run_path(str(ROOT / "env" / "installed.py"))["lock_of"](tmp_path).name, lock)


# --- where it is, and whose -------------------------------------------------------------------------------------------


@pytest.fixture
def setup(tmp_path):
    """The modules of a small project's env/setup."""
    return modules(make_project(tmp_path / "project"))


@pytest.mark.parametrize(
    "kind", ["somebody-s", "file", "dangling-link", "link-to-somebody-s"], ids=lambda kind: f"F17-{kind}"
)
def test_f17_a_venv_of_somebody_s_is_refused_and_kept(kind, setup, tmp_path, monkeypatch):
    """F17: never deleted without a question; nobody answers here."""
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    mine = tmp_path / "mine" if kind == "link-to-somebody-s" else setup.place.VENV
    if kind in ("somebody-s", "link-to-somebody-s"):
        (mine / "bin").mkdir(parents=True)
        (mine / "pyvenv.cfg").write_text("mine")
    if kind == "file":
        setup.place.VENV.write_text("mine")
    if kind == "dangling-link":
        setup.place.VENV.symlink_to(tmp_path / "nowhere")
    if kind == "link-to-somebody-s":
        setup.place.VENV.symlink_to(mine)
    refused(lambda: setup.main.set_up("cpu"), ".venv", error=setup.place.SetupError)
    if kind in ("somebody-s", "link-to-somebody-s"):
        kept(mine / "pyvenv.cfg", b"mine")
    if kind == "file":
        kept(setup.place.VENV, b"mine")


def test_f17_a_colon_in_the_path_is_named(tmp_path):
    """F17: venv refuses it, and the advice is not to install python3-venv."""
    setup = modules(make_project(tmp_path / "a:b"))
    message = refused(lambda: setup.main.set_up("cpu"), "':'", "Rename", error=setup.place.SetupError)
    same("apt" in message, False)


@pytest.mark.parametrize(
    "variable",
    ["PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PIP_PYTHON", "PIP_DRY_RUN",
     "PIP_CONSTRAINT", "PIP_NO_BINARY", "PIP_PRE", "PIP_REPORT", "PIP_REQUIRE_HASHES", "PIP_IGNORE_INSTALLED",
     "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP"],
)  # fmt: skip
def test_f17_pip_is_not_told_where_else_to_install(variable, setup, monkeypatch):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    environment = setup.pip_runs.pip_environment()
    same((variable in environment, "PIP_INDEX_URL" in environment), (False, True))


@pytest.mark.whole
def test_f17_a_file_of_pip_s_settings_that_sends_packages_elsewhere_is_named(made, wheels, tmp_path):
    """F17: what no variable and no option can undo, in pip.conf."""
    (tmp_path / "pip.conf").write_text(f"[install]\ntarget = {tmp_path / 'elsewhere'}\nuser = true\n")
    uninstalled(made, wheels)
    make_setup(made, wheels, PIP_CONFIG_FILE=str(tmp_path / "pip.conf")).ends(2, "is not installed", "pip config list")
    whole_again(made, wheels, "one 1.0 is not installed")


@pytest.mark.whole
def test_f17_a_copy_of_the_checkout_runs_itself(made, wheels, tmp_path):
    """F17: cp -r; its command is its own at once, and its set-up makes its environment its own.

    A copied link to packages elsewhere leads to the original's: they are not replaced.
    """
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, symlinks=True)
    make_setup(copy, wheels).ends(2, f"a link to the packages of {made}", "Remove the link")
    make_setup(made, wheels).ends(0, "as locked")
    (copy / ".venv").unlink()
    shutil.copytree(made / ".venv", copy / ".venv", symlinks=True)
    (tmp_path / "link").symlink_to(copy / ".venv/bin/workbook")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "cli.py").write_text("def app(): print('led astray')")
    for command in (copy / ".venv/bin/workbook", tmp_path / "link"):
        led = environment(None, PYTHONPATH=str(tmp_path))
        done = subprocess.run([command], env=led, cwd=tmp_path, capture_output=True, text=True, check=True)
        same(done.stdout.strip(), str(copy / "helpers" / "cli.py"))
    make_setup(copy, wheels).ends(0, "Making .venv", "Ready")
    same(str(made) in (copy / ".venv/bin/pip").read_text(), False)
    make_setup(made, wheels).ends(0, "as locked")


def test_f17_text_has_unix_line_ends_wherever_it_is_checked_out(tmp_path):
    """F17: a clone under core.autocrlf gets the same bytes; models' files and pictures are not touched."""
    repository = tmp_path / "repository"
    (repository / "env/models").mkdir(parents=True)
    shutil.copy(ROOT / ".gitattributes", repository)
    contents = {"a.sh": b"a\nb\n", "a.py": b"a\nb\n", "env/models/a.json": b"a\r\nb\n", "a.png": b"a\r\nb\n"}
    for name, content in contents.items():
        (repository / name).write_bytes(content)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
                  ["-c", "core.autocrlf=true", "clone", "-q", str(repository), str(tmp_path / "clone")]):  # fmt: skip
        subprocess.run(["git", *words], cwd=repository, capture_output=True, check=True)
    for name, content in contents.items():
        kept(tmp_path / "clone" / name, content)


# --- interrupted, and two at once -------------------------------------------------------------------------------------


def begin(project: Path, wheels: Path) -> subprocess.Popen:
    """A set-up whose output is read line by line, in a session of its own."""
    return subprocess.Popen(
        [f"{sys.base_prefix}/bin/python{VERSION}", "-u", str(project / "env/setup")], env=environment(wheels),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.whole
def test_f17_an_interrupted_set_up_is_completed_by_the_next_and_of_two_one_waits(
    tmp_path, wheels, unpacked_pip, moments
):
    """F17, E4: ended at a random moment by each signal in turn; then two at once."""
    project = make_project(tmp_path / "project", unpacked_pip)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        first = begin(project, wheels)
        line = first.stdout.readline()
        assert "Making .venv" in line or "Waiting" in line, line
        time.sleep(moments.uniform(0, 2))
        first.send_signal(number)
        screen = first.communicate(timeout=60)[0]
        if number != signal.SIGKILL and first.returncode:
            Outcome(first.returncode, screen).ends(130, "Interrupted. Run it again")
            no_survivor(str(project), 5)
        (project / ".venv/setup.json").unlink(missing_ok=True)  # each begins afresh, also after one that was quicker
        (project / ".venv/setup.log").touch()
    first = begin(project, wheels)
    first.stdout.readline()
    make_setup(project, wheels).ends(0, "Another make setup works on this folder. Waiting", "as locked", "Ready")
    Outcome(first.wait(60), first.communicate()[0]).ends(0, "Ready")
    same(installed(project), ALL)


def test_e4_the_lock_is_held_and_released(setup):
    """E4: by this process and by pip, which inherits it; after the block the folder is free."""
    other = os.open(setup.place.ROOT, os.O_RDONLY)
    with setup.place.alone():
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same(len(setup.place.HELD), 1)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


@pytest.mark.parametrize(
    "stamp", ["", "{", "[]", "null", '{"lock": 3}', '{"lock": "tpu"}', '{"lock": ["cpu"]}', "\u2028"]
)
def test_f17_a_damaged_stamp_means_nothing_was_finished(stamp, setup):
    setup.place.VENV.mkdir()
    setup.place.STAMP.write_text(stamp)
    same(setup.environment.read_stamp(setup.place.STAMP), {})
