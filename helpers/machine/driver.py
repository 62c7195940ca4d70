"""What NVIDIA's driver reports: its version, all its GPUs, and which processes hold their memory.

``nvidia-smi`` also lists the GPUs that this process may not use, and asking it opens no CUDA context.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import gib

if TYPE_CHECKING:
    from collections.abc import Iterator
    from xml.etree.ElementTree import Element

_SECONDS = 20  # a driver in trouble may never answer
_LITTLE = 100 * 2**20  # processes that use fewer bytes of a GPU than this are not listed


@dataclass(frozen=True)
class _GpuProcess:
    """A process that holds memory of a GPU; ``used_bytes`` is None if the driver does not tell."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class _GpuState:
    """One GPU as the driver lists it, whether or not this process may use it."""

    name: str
    total_bytes: int
    free_bytes: int
    processes: tuple[_GpuProcess, ...] = ()


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, the newest CUDA that it runs, and its GPUs."""

    version: str
    cuda: str
    gpus: tuple[_GpuState, ...] = ()

    def holders(self) -> Iterator[str]:
        """Who holds memory of the GPUs: a phrase for each process, and for memory that no visible process holds."""
        for index, gpu in enumerate(self.gpus):
            for process in gpu.processes:
                if process.used_bytes is None:
                    yield f"{process.name} (process {process.pid}) holds an unknown part of GPU {index}"
                elif process.used_bytes >= _LITTLE:
                    yield f"{process.name} (process {process.pid}) holds {gib(process.used_bytes)} of GPU {index}"
            # The processes of another container are not listed, but their memory is missing. The driver itself takes
            # less than a tenth.
            if not gpu.processes and gpu.free_bytes < 0.9 * gpu.total_bytes:
                held = gib(gpu.total_bytes - gpu.free_bytes)
                yield f"{held} of GPU {index} are held by nothing that can be seen from here"


class DriverError(WorkbookError):
    """The driver is missing or does not answer."""


def ask_driver() -> Driver | DriverError:
    """Return what ``nvidia-smi`` reports, or why it does not: not installed, an error, no answer in 20 seconds."""
    command = ["nvidia-smi", "-q", "-x"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            return DriverError(f"nvidia-smi fails: {_first_line(done)}")
        return _read_driver(done.stdout)
    except OSError:
        return DriverError("no NVIDIA driver: nvidia-smi is missing")
    except subprocess.TimeoutExpired:
        return DriverError("nvidia-smi does not answer")
    except DriverError as error:
        return error


def _read_driver(text: str) -> Driver:
    """Read the XML of ``nvidia-smi -q -x`` (nvsmi_device_v11.dtd to v13). Raises DriverError for other texts."""
    from xml.etree import ElementTree

    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        # Without a GPU nvidia-smi prints a sentence and still exits with 0.
        raise DriverError(f"nvidia-smi wrote no XML ({error})") from error
    gpus = tuple(_gpu(element) for element in log.iterfind("gpu"))
    return Driver(log.findtext("driver_version", "unknown"), log.findtext("cuda_version", "unknown"), gpus)


def _gpu(element: Element) -> _GpuState:
    return _GpuState(
        element.findtext("product_name", "unknown"),
        _bytes(element.findtext("fb_memory_usage/total")) or 0,
        _bytes(element.findtext("fb_memory_usage/free")) or 0,
        tuple(_process(process) for process in element.iterfind("processes/process_info")),
    )


def _process(element: Element) -> _GpuProcess:
    # The driver gives the path of the program; its last part tells a reader enough.
    name = Path(element.findtext("process_name") or "unknown").name or "unknown"
    return _GpuProcess(int(element.findtext("pid", "0")), name, _bytes(element.findtext("used_memory")))


def _bytes(text: str | None) -> int | None:
    """Bytes of a text such as "81920 MiB"; None for "N/A"."""
    number = (text or "").partition(" ")[0]
    if not number.isdigit():
        return None
    return int(number) * 2**20


def _first_line(done: subprocess.CompletedProcess[str]) -> str:
    """The first line that a failed program wrote, or else its exit code."""
    # Some errors of nvidia-smi go to stdout, others to stderr.
    for line in (done.stdout + done.stderr).splitlines():
        if line.strip():
            return line.strip()
    return f"exit code {done.returncode}"
