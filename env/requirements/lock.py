"""Writes gpu.txt, gpu12.txt, cpu.txt and dev.txt from runtime.in, cuda12.in and dev.in: `make lock`.

Versions stay as they are unless a change of the .in files moves them; to move them all to the newest:
`.venv/bin/python env/requirements/lock.py --upgrade`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton==")
CUDA12_HEADER = """\
# gpu.txt with a build of torch for CUDA 12.8, for NVIDIA's drivers from 525 to 575, which do not run CUDA 13. From:
#    make lock
# `make setup LOCK=gpu` takes it if the driver is one of these, LOCK=gpu12 in any case. Untried: resolved, but never
# installed. Its torch is older than gpu.txt's, whose own build for CUDA 12 is not on Python's package index.
"""
CPU_HEADER = """\
# gpu.txt with the CPU build of torch, which needs no CUDA packages; written by:
#    make lock
# Python's package index has torch for Linux as a CUDA build only. The CPU build is a local version, +cpu, on PyTorch's
# own index; pinned as such, no CUDA build can take its place. macOS has one build, without a local version.
# The extra index need not be reachable where another source (pip's find-links, a mirror) has the +cpu wheel. pip would
# ask it for every package here, and retry for eight seconds each where it cannot reach it: `make setup` asks it for
# torch alone; by hand, use `pip install --retries 0 -r cpu.txt`.
--extra-index-url https://download.pytorch.org/whl/cpu
"""


def resolve(source: str, lock: str, options: list[str]) -> None:
    """Resolve ``source`` into ``lock``, files of this folder, with uv; it keeps pins that still hold."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--config-file", "uv.toml", "--quiet", *options]
    subprocess.run([*command, source, "--output-file", lock], cwd=HERE, check=True)


def exact(lock: str) -> str:
    """A lock's text with the one build of torch: 2.13.0+cpu, which some machines have, fits ==2.13.0, not ===2.13.0."""
    return re.sub("^torch==(?!=)", "torch===", lock, flags=re.MULTILINE)


def cpu_torch(line: str) -> str:
    """The pins of torch's CPU build in place of gpu.txt's pin of torch."""
    pin, _, via = line.partition("#")
    pin = pin.strip()
    # With a local version, == admits no other build.
    linux = f"{pin.replace('===', '==')}+cpu ; sys_platform != 'darwin'  #{via}"
    return f"{linux}\n{pin} ; sys_platform == 'darwin'  #{via}"


def cuda12_lock(resolved: str) -> str:
    """The text of gpu12.txt: what uv resolved, under a header of its own."""
    pins = [line for line in exact(resolved).splitlines() if not line.startswith("#")]
    return CUDA12_HEADER + "\n".join(pins) + "\n"


def cpu_lock(gpu_lock: str) -> str:
    """The text of cpu.txt for a text of gpu.txt: torch replaced, its CUDA packages left out, all else the same."""
    pins = [line for line in gpu_lock.splitlines() if not line.startswith(("#", *CUDA_PREFIXES))]
    lines = [cpu_torch(line) if line.startswith("torch==") else line for line in pins]
    return CPU_HEADER + "\n".join(lines) + "\n"


def additions(lock: str, runtime: str) -> str:
    """A lock's text without the packages that the runtime's lock holds already."""
    held = {line.split("==")[0] for line in runtime.splitlines()}
    return "".join(line for line in lock.splitlines(keepends=True) if line.split("==")[0] not in held)


def main(options: list[str]) -> None:
    """Resolve the runtime, derive its CPU form, resolve it for CUDA 12, then what development adds."""
    resolve("runtime.in", "gpu.txt", options)
    gpu, gpu12, dev = HERE / "gpu.txt", HERE / "gpu12.txt", HERE / "dev.txt"
    runtime = exact(gpu.read_text(encoding="utf-8"))
    gpu.write_text(runtime, encoding="utf-8")
    (HERE / "cpu.txt").write_text(cpu_lock(runtime), encoding="utf-8")
    # Beginning with the other lock's versions, so that both differ in torch and its CUDA packages only.
    gpu12.write_text(runtime, encoding="utf-8")
    resolve("runtime.in", "gpu12.txt", ["--override", "cuda12.in"])
    gpu12.write_text(cuda12_lock(gpu12.read_text(encoding="utf-8")), encoding="utf-8")
    resolve("dev.in", "dev.txt", options)
    dev.write_text(additions(dev.read_text(encoding="utf-8"), runtime), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
