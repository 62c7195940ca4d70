"""Make .venv, and know whether it is finished, and from what, by the stamp in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from pip_runs import pip_environment
from place import LOCKS, NEEDED_BYTES, PYTHON, ROOT, STAMP, VENV, SetupError, check_disk


def lock_files(lock: str) -> list[Path]:
    """Return the files whose pins .venv holds."""
    return [LOCKS / f"{name}.txt" for name in (lock, "dev", "models")]


def stamp(lock: str) -> dict[str, str]:
    """Return what a finished set-up was made from: its folder, Python, lock and the hash of its files."""
    files = [*lock_files(lock), ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"lock": lock, "python": version, "venv": str(VENV), "files": digest}


def read_stamp(path: Path) -> dict[str, str]:
    """Return the stamp of the last set-up; of an unfinished one, or if .venv does not run, the lock alone."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        chosen = {"lock": made["lock"]} if made["lock"] in NEEDED_BYTES else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    if not runs_in(VENV):
        return chosen
    return made


def write_stamp(content: dict[str, str]) -> None:
    """Write the stamp, whole or not at all."""
    partial = STAMP.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(STAMP)


def runs_in(venv: Path) -> bool:
    """Return whether the environment's Python runs and is its own: without pyvenv.cfg it would be the system's."""
    command = [str(PYTHON), "-I", "-c", "import sys; print(); print(sys.prefix)"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
        return Path(done.stdout.splitlines()[-1]).samefile(venv)
    except (OSError, subprocess.CalledProcessError):
        return False


def base_python() -> str:
    """Return the Python that this one's virtual environment was made from: .venv itself may be running this file."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(base) if base.exists() else sys.executable


def make_venv(lock: str) -> None:
    """Make a new .venv on a disk with enough bytes free; only the stamp of the lock stays. Raises SetupError."""
    python = base_python()
    print(f"Making .venv with Python {sys.version.split()[0]} ({python})", flush=True)
    VENV.mkdir(exist_ok=True)
    # First, so that whatever interrupts this, the next set-up knows the folder for its own.
    write_stamp({"lock": lock, "venv": str(VENV)})
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STAMP:
            path.unlink()
    # Of a link its target: .venv may lie on a larger disk, and venv takes no links.
    command = [python, "-m", "venv", str(VENV.resolve())]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=pip_environment(), check=False
    )
    if done.returncode:
        raise SetupError(
            f"{VENV} could not be made:\n{done.stdout.strip()}\n"
            "If this Python lacks venv or ensurepip, install them (Debian, Ubuntu: apt install python3-venv)."
        )
    check_disk(shutil.disk_usage(VENV).free, NEEDED_BYTES[lock], VENV)
