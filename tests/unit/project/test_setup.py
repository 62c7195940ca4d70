"""The set-up script: which Python it takes, what it refuses and says, and when it has nothing to do."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.project.set_up import modules

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "my wörk dir"


@pytest.fixture
def setup(tmp_path):
    """The modules of env/setup, which work in a copy of their files, in a folder with a space and an umlaut."""
    project = tmp_path / FOLDER
    for name in ("requirements", "setup"):
        shutil.copytree(ROOT / "env" / name, project / "env" / name)
    for name in ("env/installed.py", "env/setup.sh", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, project / name)
    return modules(project)


def fake_python(folder: Path, name: str, version: str) -> Path:
    """A program that reports a Python version, and prints what it is asked to run otherwise."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {version}; else echo "ran {name} $*"; fi\n')
    path.chmod(0o755)
    return path


def make_setup(setup, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`make setup` in the copy, with the programs of tmp_path/bin first and no real Python in sight."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("sh", "dirname", "tr"):
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(shutil.which(name))
    command = [shutil.which("make"), "-C", str(setup.place.ROOT), "setup", *arguments]
    return subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)


def make_venv_of_this_python(setup) -> None:
    """A .venv whose Python runs, empty. (A link to this Python would be this environment, and be repaired.)"""
    subprocess.run([setup.environment.base_python(), "-m", "venv", "--without-pip", str(setup.place.VENV)], check=True)


def write_stamp(setup, **changes: str) -> None:
    setup.place.STAMP.write_text(json.dumps({**setup.environment.stamp("cpu"), **changes}))


def test_too_old_pythons_are_named_and_refused(setup, tmp_path):
    fake_python(tmp_path / "bin", "python3", "3.9")
    done = make_setup(setup, tmp_path)
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13. python3 is 3.9." in done.stderr
    assert "make setup PYTHON=/path/to/python3.11" in done.stderr
    assert "ran" not in done.stdout


def test_a_supported_python_is_found_behind_an_old_one(setup, tmp_path):
    fake_python(tmp_path / "bin", "python3", "3.9")
    fake_python(tmp_path / "bin", "python3.12", "3.12")
    done = make_setup(setup, tmp_path)
    assert done.returncode == 0
    assert "ran python3.12 env/../env/setup\n" in done.stdout


def test_the_named_python_is_the_only_one_tried(setup, tmp_path):
    fake_python(tmp_path / "bin", "python3", "3.11")
    chosen = fake_python(tmp_path / "other pythons", "python3.14", "3.14")
    done = make_setup(setup, tmp_path, f"PYTHON={chosen}")
    assert done.returncode != 0
    assert f"{chosen} is 3.14" in done.stderr
    chosen = fake_python(tmp_path / "other pythons", "python3.13", "3.13")
    done = make_setup(setup, tmp_path, f"PYTHON={chosen}", "LOCK=gpu")
    assert "ran python3.13 env/../env/setup --lock gpu\n" in done.stdout


def test_a_named_python_that_does_not_run_is_refused(setup, tmp_path):
    done = make_setup(setup, tmp_path, "PYTHON=/nowhere/python3")
    assert done.returncode != 0
    assert "/nowhere/python3 does not run" in done.stderr


def test_short_disk_is_refused_with_both_sizes(setup):
    setup.place.check_disk(3 * 2**30, 3 * 2**30, Path("/data"))
    with pytest.raises(setup.place.SetupError, match=r"needs 3\.0 GiB .* /data has 1\.5 GiB"):
        setup.place.check_disk(3 * 2**29, 3 * 2**30, Path("/data"))


@pytest.mark.parametrize("lock", ["cpu", "gpu", "gpu12"])
def test_torch_alone_is_installed_from_the_extra_index(setup, lock):
    text = (setup.place.LOCKS / f"{lock}.txt").read_text(encoding="utf-8")
    options, torch, others = setup.packages.split_lock(text)
    assert options == (["--extra-index-url", "https://download.pytorch.org/whl/cpu"] if lock == "cpu" else [])
    assert {pin.split(";")[0].strip() for pin in torch} <= {"torch===2.13.0", "torch==2.13.0+cpu", "torch===2.10.0"}
    assert len(torch) + len(others) == text.count("\n") - sum(line[:1] in "#-" for line in text.splitlines())
    assert all("==" in pin and "#" not in pin for pin in others)


def test_an_unreachable_index_is_told_from_other_failures(setup, monkeypatch):
    """The real pip, with a closed port as its index, and with a file that is no package."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(setup.pip_runs, "PYTHON", Path(sys.executable))
    with pytest.raises(setup.place.SetupError, match=r"(?s)index could not be reached.*found for no-such-package"):
        setup.packages.install("a step", ["no-such-package==1"], "--index-url", "http://127.0.0.1:9/simple")
    with pytest.raises(setup.place.SetupError, match=r"a step: pip failed"):
        setup.packages.install("a step", [str(setup.place.LOCKS / "cpu.txt")])


def test_a_full_disk_is_told_from_other_failures(setup):
    error = f"ERROR: Could not install packages due to an OSError: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}"
    assert "disk is full" in setup.pip_runs.advice(error)


def test_progress_names_the_package_being_fetched(setup):
    lines = ["Looking in links: x\n"]
    assert setup.pip_runs.progress(lines, 3) == "asking the package index"
    lines += ["Collecting numpy==2.4.6\n", "  Downloading numpy.whl (16 MB)\n", "Collecting rich==15.0.0\n"]
    assert setup.pip_runs.progress(lines, 3) == "fetching 2 of 3, rich==15.0.0"
    assert setup.pip_runs.progress([*lines, "Installing collected packages: numpy, rich\n"], 3) == "installing"


def test_output_is_followed_to_its_end(setup, capsys):
    code = "import sys; print('Collecting a'); sys.stderr.write('ü\\n'); print('done')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen([sys.executable, "-X", "utf8", "-c", code], **pipes) as process:
        output = setup.pip_runs.follow(process, "a step", 1)
    assert sorted(output.split()) == ["Collecting", "a", "done", "ü"]
    assert capsys.readouterr().out.startswith("  a step: 0 s")


def test_a_finished_setup_is_left_alone(setup, capsys, monkeypatch):
    make_venv_of_this_python(setup)
    write_stamp(setup)
    monkeypatch.setattr(setup.main, "differences", lambda lock: [])
    setup.main.set_up(None)
    assert "as locked" in capsys.readouterr().out
    assert not setup.place.LOG.exists()


def test_comparing_a_whole_environment_takes_less_than_a_second():
    before = os.times()
    subprocess.run([sys.executable, "-I", ROOT / "env" / "installed.py"], capture_output=True, check=True)
    after = os.times()
    # Of the processor: a busy machine takes longer by the clock.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_a_python_that_lost_its_environment_is_not_taken_for_it(setup):
    """F1: without pyvenv.cfg it is the system's, and a repair would change that."""
    make_venv_of_this_python(setup)
    write_stamp(setup)
    assert setup.environment.read_stamp(setup.place.STAMP) == setup.environment.stamp("cpu")
    (setup.place.VENV / "pyvenv.cfg").unlink()
    assert setup.environment.read_stamp(setup.place.STAMP) == {"lock": "cpu"}


@pytest.mark.parametrize("name", ["cpu.txt", "dev.txt", "models.txt", "../../pyproject.toml"])
def test_a_changed_file_changes_the_stamp(setup, name):
    before = setup.environment.stamp("cpu")
    with (setup.place.LOCKS / name).open("a") as file:
        file.write("# changed\n")
    assert setup.environment.stamp("cpu") != before
    assert setup.environment.stamp("cpu") | {"files": ""} == before | {"files": ""}


def test_the_stamp_of_a_broken_venv_does_not_count(setup):
    assert setup.environment.read_stamp(setup.place.STAMP) == {}
    make_venv_of_this_python(setup)
    write_stamp(setup)
    assert setup.environment.read_stamp(setup.place.STAMP) == setup.environment.stamp("cpu")
    setup.place.STAMP.write_text('{"lock": "cp')
    assert setup.environment.read_stamp(setup.place.STAMP) == {}
    write_stamp(setup)
    setup.place.PYTHON.unlink()
    setup.place.PYTHON.symlink_to("/nowhere/python3")
    assert setup.environment.read_stamp(setup.place.STAMP) == {
        "lock": "cpu"
    }  # which was chosen once, and holds until another is


def steps(setup, monkeypatch) -> list[str]:
    """What set_up does, in order, with each step that takes minutes written down instead."""
    done: list[str] = []
    monkeypatch.setattr(setup.main, "make_venv", lambda lock: done.append("venv"))
    monkeypatch.setattr(setup.main, "install_all", lambda lock: done.append(f"install {lock}"))
    monkeypatch.setattr(setup.main, "check_installed", lambda lock: None)
    monkeypatch.setattr(setup.main, "check_consistent", lambda: done.append("check"))
    return done


def test_new_locks_are_installed_over_the_old(setup, monkeypatch):
    make_venv_of_this_python(setup)
    write_stamp(setup, files="of other locks")
    done = steps(setup, monkeypatch)
    setup.main.set_up(None)
    assert done == ["install cpu", "check"]
    assert setup.environment.read_stamp(setup.place.STAMP) == setup.environment.stamp("cpu")


@pytest.mark.parametrize("change", [{"venv": "/moved/.venv"}, {"python": "3.10"}, {"lock": "gpu"}])
def test_another_place_python_or_build_starts_afresh(setup, monkeypatch, change):
    make_venv_of_this_python(setup)
    write_stamp(setup, **change)
    done = steps(setup, monkeypatch)
    setup.main.set_up("cpu")
    assert done == ["venv", "install cpu", "check"]


def test_the_chosen_build_is_remembered(setup, monkeypatch):
    make_venv_of_this_python(setup)
    setup.place.STAMP.write_text(json.dumps(setup.environment.stamp("gpu") | {"files": "of other locks"}))
    done = steps(setup, monkeypatch)
    setup.main.set_up(None)
    assert done == ["install gpu", "check"]


def test_an_interrupted_setup_is_done_afresh(setup, monkeypatch):
    make_venv_of_this_python(setup)
    write_stamp(setup, files="of other locks")
    done = steps(setup, monkeypatch)

    def interrupted(lock: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup.main, "install_all", interrupted)
        assert setup.main.main([]) == 130
    setup.main.set_up(None)
    assert done == ["venv", "install cpu", "check"]


def test_a_python_without_venv_is_explained(setup, tmp_path, monkeypatch):
    fake = fake_python(tmp_path / "bin", "python3", "3.11")
    fake.write_text("#!/bin/sh\necho 'No module named venv'; exit 1\n")
    monkeypatch.setattr(setup.environment, "base_python", lambda: str(fake))
    with pytest.raises(setup.place.SetupError, match=r"(?s)No module named venv.*apt install python3-venv"):
        setup.environment.make_venv("cpu")


def test_the_base_python_is_found_from_inside_a_venv(setup):
    """.venv's own Python runs the script from the second time on, and cannot make .venv anew itself."""
    subprocess.run([setup.environment.base_python(), "-m", "venv", "--without-pip", str(setup.place.VENV)], check=True)
    code = "import sys; sys.path.insert(0, 'env/setup'); import environment; print(environment.base_python())"
    command = [setup.place.PYTHON, "-c", code]
    done = subprocess.run(command, cwd=setup.place.ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(setup.place.VENV)
    assert Path(done.stdout.strip()).is_file()


@pytest.mark.parametrize("target", ["run", "test", "lint", "lab", "render", "lock"])
def test_every_target_sets_up_first(target):
    done = subprocess.run(["make", "-n", "-C", str(ROOT), target], capture_output=True, text=True, check=True)
    recipe = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert "env/setup.sh" in recipe[0]
    assert len(recipe) == 2
    assert recipe[1].startswith((".venv/bin/", "sh env/lint/"))
