"""Choose the lock: for LOCK=gpu the build of torch that this machine's NVIDIA driver runs."""

from __future__ import annotations

import subprocess
import sys

from place import ROOT, SetupError

# The workbook's own question to the driver: it needs only the standard library. An empty line if there is no answer.
ASK = (
    "import sys; sys.path.insert(0, sys.argv[1]); from helpers.machine.driver import ask_driver; "
    "print(); print(getattr(ask_driver(), 'cuda', ''))"
)
OLDEST, NEWEST = 12, 13  # major versions of CUDA: of gpu12.txt and gpu.txt


def chosen_lock(asked: str | None, last: str | None) -> str:
    """Return the lock to install: the one asked for, else that of the last set-up, at first cpu; gpu by the driver.

    Raises SetupError for a driver that is too old for every build.
    """
    if asked != "gpu":
        return asked or last or "cpu"
    cuda = driver_cuda()
    major = int(cuda.partition(".")[0]) if cuda else NEWEST
    if major < OLDEST:
        raise SetupError(
            f"NVIDIA's driver runs CUDA {cuda}, and the builds of torch need CUDA {OLDEST} or {NEWEST}. "
            "Install a newer driver: 525 or later."
        )
    if major < NEWEST:
        print(f"NVIDIA's driver runs CUDA {cuda}: taking gpu12.txt, the build of torch for CUDA 12.", flush=True)
        return "gpu12"
    return "gpu"


def driver_cuda() -> str:
    """Return the newest CUDA that the driver runs, such as "12.4"; empty without a driver that answers."""
    command = [sys.executable, "-I", "-c", ASK, str(ROOT)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    answer = (done.stdout.splitlines() or [""])[-1].strip()
    return answer if answer[:1].isdigit() else ""
