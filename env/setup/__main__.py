"""Make .venv with the locked packages and prepare the embedded models; `make setup` runs this folder through setup.sh.

Only the standard library is used, because nothing else is installed yet. A stamp inside .venv says what a finished
set-up was made from: with it a second run only compares what is installed with the locks, and repairs what differs;
an unfinished one starts afresh.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from typing import Any

from driver import chosen_lock
from environment import make_venv, read_stamp, stamp, write_stamp
from packages import check_consistent, check_installed, differences, install_all, repair
from place import NEEDED_BYTES, PYTHON, ROOT, STAMP, VENV, SetupError, alone, check_place

PREPARE = "from helpers import models; models.prepare(models.load_profile('laptop'))"


def set_up(lock: str | None) -> None:
    """Install what the locks say into .venv, as far as it is not there yet. Raises SetupError."""
    check_place()
    made = read_stamp(STAMP)
    wanted = stamp(chosen_lock(lock, made.get("lock")))
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
        write_stamp({"lock": build, "venv": str(VENV)})
        install_all(build)
    check_installed(build)
    check_consistent()
    write_stamp(wanted)


def prepare_models() -> None:
    """Let the workbook bring its embedded models into the form that it loads. Raises SetupError."""
    print("Preparing the embedded models", flush=True)
    if subprocess.run([str(PYTHON), "-I", "-c", PREPARE], cwd=ROOT, check=False).returncode:
        raise SetupError("The embedded models could not be prepared. The lines above say why.")


class Patient(io.FileIO):
    """An output that takes everything: a reader who is gone, or the full disk of a log, must not stop the set-up."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def show_all() -> None:
    """Let printing never end the set-up: neither a letter that the terminal lacks, nor an output that is closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        else:
            patient = io.BufferedWriter(Patient(number, "w", closefd=False))
            wrapped = io.TextIOWrapper(patient, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, wrapped)


def main(arguments: list[str]) -> int:
    """Set up, and return the exit code: 0 if all is ready, 1 with a message if something is missing."""
    parser = argparse.ArgumentParser("make setup", description="Make .venv and prepare the embedded models.")
    parser.add_argument(
        "--lock", choices=sorted(NEEDED_BYTES), help="default: as last time, at first cpu; gpu: by the driver"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Ignored, by nohup say, it stays so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
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
    show_all()
    sys.exit(main(sys.argv[1:]))
