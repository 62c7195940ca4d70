"""Run pip in .venv: in an environment of its own, with one line of progress, and all that it prints in a log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from place import HELD, LOG, PYTHON, ROOT, SetupError

UNREACHABLE = re.compile(r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Could not fetch URL")
DISK_FULL = "No space left on device"
# Where packages come from is the user's choice. Where they go, and which ones, is not: PIP_USER, PIP_TARGET,
# PIP_NO_BINARY and so on would fill another place or make another environment.
PIP_KEEPS = (
    *("PIP_CACHE_DIR", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CONFIG_FILE", "PIP_DEFAULT_TIMEOUT", "PIP_EXTRA_INDEX_URL"),
    *("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_KEYRING_PROVIDER", "PIP_NO_CACHE_DIR", "PIP_NO_INDEX", "PIP_PROXY"),
    *("PIP_RETRIES", "PIP_TIMEOUT", "PIP_TRUSTED_HOST"),
)


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


def collect(stream: Iterable[str], lines: list[str]) -> None:
    """Move a stream's lines into a list until it ends, or is closed because the user interrupts."""
    with contextlib.suppress(ValueError):
        lines.extend(stream)


def progress(lines: list[str], total: int) -> str:
    """Say in one phrase what pip is doing, from the lines that it has printed so far."""
    if any(line.startswith("Installing collected packages") for line in lines):
        return "installing"
    names = [line.split()[1] for line in lines if line.startswith("Collecting ")]
    return f"fetching {len(names)} of {total}, {names[-1]}" if names else "asking the package index"


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


def pip_environment() -> dict[str, str]:
    """Return the environment for pip: this process's, without what would send packages elsewhere."""
    kept = {}
    for name, value in os.environ.items():
        if not name.startswith(("PYTHON", "PIP_")) or name in PIP_KEEPS:
            kept[name] = value
    return kept
