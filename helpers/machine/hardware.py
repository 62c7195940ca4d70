"""What this machine has: GPUs, memory, disks and CPUs that this process may use, and how fast memory and disk are.

``detect`` answers without measuring. Containers and batch systems limit a process to a part of the machine, so control
groups and CPU affinity count. ``memory_bandwidth`` and ``disk_read_speed`` measure, for a second or two. Sizes are
bytes and times are seconds.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import processes, settings
from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.hub_variables import check_hub_variables

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A program for another process: it prints what detect finds, as JSON.
DETECT = "import dataclasses, json, helpers.machine.hardware as h; print(json.dumps(dataclasses.asdict(h.detect())))"
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CHUNK = 2**24  # bytes written or read at a time to measure a disk


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What this machine has. A ``rehearsed`` one does not exist: see ``helpers.planning.rehearsal``."""

    gpus: tuple[Gpu, ...]
    ram_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    cpu_count: int
    cpu_name: str
    system: str
    python: str
    rehearsed: bool = False
    cache_free_bytes: int | None = None  # on the disk of the Hugging Face cache, which may be another one


def detect(gpus: Sequence[int] | None = None) -> Machine:
    """What this process may use on this machine. ``disk_free_bytes`` are those of the project folder's disk.

    In a rehearsal (``$WORKBOOK_REHEARSAL`` names its folder) it is the machine that is rehearsed for. Asking a GPU for
    its free memory opens a CUDA context on it, which holds some hundred MiB while this process lives: only the GPUs
    with the indices ``gpus``, as torch counts them, are asked and listed; unless given, all.
    """
    import psutil

    if rehearsal := settings.rehearsal_folder():
        return _read_machine((rehearsal / "machine.json").read_text(encoding="utf-8"))
    memory = psutil.virtual_memory()
    limit, free = _memory_limit()
    return Machine(
        gpus=_gpus(gpus),
        ram_bytes=int(min(memory.total, limit)),
        ram_available_bytes=int(min(memory.available, free)),
        disk_free_bytes=disk_free(ROOT),
        cpu_count=_cpu_count(),
        cpu_name=_cpu_name(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cache_free_bytes=disk_free(download_folder()),
    )


def download_folder() -> Path:
    """The folder of the Hugging Face cache, which need not exist yet."""
    check_hub_variables()
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(nearest).free


def detect_apart() -> Machine:
    """What ``detect`` finds, by another process: on a machine with GPUs, no CUDA context stays in this one.

    Raises WorkbookError with that process's last line if it fails, for example on a GPU that gives no context.
    """
    done = processes.run([sys.executable, "-c", DETECT])
    if done.returncode:
        raise WorkbookError(
            f"This machine could not be examined: {done.last_words}. Run workbook doctor, and nvidia-smi."
        )
    return _read_machine(done.last_line)


@dataclass(frozen=True)
class Bandwidth:
    """Measured memory bandwidth in bytes per second: the best of several copies, and the slowest of them.

    Other programs only take bandwidth away, so the best is nearest to what the memory can do, which is what a limit
    needs. A slowest far below it says that the machine was busy.
    """

    best: float
    slowest: float
    copies: int

    def __str__(self) -> str:
        return f"{self.best / 1e9:.0f} GB/s, the best of {self.copies} copies ({self.slowest / 1e9:.0f} the slowest)"


def memory_bandwidth(size: int = 2**28, repeats: int = 9, device: str = "cpu") -> Bandwidth:
    """Measure the memory bandwidth of a device by large copies.

    A copy of n bytes moves 2n: it reads n and writes n. ``size``, in bytes, should be well above the CPU's caches.
    """
    import torch

    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source).copy_(source)  # touches every page before the clock starts
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    moved = 2 * source.nbytes
    return Bandwidth(moved / min(seconds), moved / max(seconds), repeats)


@dataclass(frozen=True)
class DiskSpeed:
    """Measured sequential reading: bytes per second over ``read_bytes`` of a file in ``folder``.

    ``direct``: read past the operating system's cache (O_DIRECT); otherwise the file was dropped from it first.
    """

    bytes_per_second: float
    read_bytes: int
    folder: str
    direct: bool


def disk_read_speed(folder: Path, size: int = 2**28, seconds: float = 1.5) -> DiskSpeed:
    """Measure sequential reading from the disk under a folder, past the page cache.

    A file of ``size`` random bytes (fewer if writing takes longer than ``seconds``) is written in the folder and
    flushed to the disk, then read for at most ``seconds`` and deleted. A cache in the disk itself, or in the host of a
    virtual machine, may still answer. Raises OSError if the folder takes no file, or the disk is full.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-speed-") as file:
        start = time.perf_counter()
        while file.tell() < size:
            # Random bytes: a disk that compresses would be too fast with zeros.
            file.write(os.urandom(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
            if time.perf_counter() - start >= seconds:
                break
        read, elapsed, direct = _read_uncached(Path(file.name), seconds)
    return DiskSpeed(read / elapsed, read, str(folder), direct)


def _memory_limit(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> tuple[float, float]:
    """(limit, bytes left) that the control groups set (versions 1 and 2); inf if they set none.

    File cache that the kernel drops under pressure counts as left.
    """
    limit = left = math.inf
    for folder in _groups("memory", cgroups, membership):
        # The lowest limit and the least that is left may be those of two groups.
        group_limit, group_left = _group_memory(folder)
        limit, left = min(limit, group_limit), min(left, group_left)
    return limit, left


def _cpu_limit(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """CPUs that the control groups' quota allows (1.5 means one and a half); inf without a quota."""
    return min(map(_group_cpus, _groups("cpu", cgroups, membership)), default=math.inf)


def _read_uncached(file: Path, seconds: float) -> tuple[int, float, bool]:
    """(bytes read, seconds it took, whether with O_DIRECT) of a file that is on the disk."""
    descriptor, direct = _open_uncached(file)
    buffer = mmap.mmap(-1, _CHUNK)  # O_DIRECT needs memory that begins with a page
    read, elapsed, start = 0, 0.0, time.perf_counter()
    try:
        while elapsed < seconds:
            count = os.readv(descriptor, [buffer])
            if not count:
                break
            read, elapsed = read + count, time.perf_counter() - start
        return read, elapsed, direct
    finally:
        os.close(descriptor)


def _open_uncached(file: Path) -> tuple[int, bool]:
    """(file descriptor, whether with O_DIRECT); without it the file is dropped from the page cache first."""
    with suppress(OSError, AttributeError):  # some file systems, and macOS, have no O_DIRECT
        return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    descriptor = os.open(file, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor, False


def _read_machine(text: str | bytes) -> Machine:
    from pydantic import TypeAdapter

    return TypeAdapter(Machine).validate_json(text)


def _groups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all its parents, for one controller."""
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # A line of version 2 names no controllers, and all of them share one tree.
        root = cgroups / controllers
        folder = root / path.lstrip("/")
        # A container often sees its own group as the root: the named folder is then absent, and the root's limits hold.
        for group in (folder, *folder.parents):
            if group.is_relative_to(root) and group.is_dir():
                yield group


def _group_memory(folder: Path) -> tuple[float, float]:
    """(limit, bytes left) of one group."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not (folder / "memory.max").exists():  # version 1 of the control groups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used = _number(folder / names[0]), _number(folder / names[1])
    if math.isinf(limit) or math.isinf(used):
        return math.inf, math.inf
    droppable = 0  # file cache that the kernel would give back
    statistic = folder / "memory.stat"
    if statistic.is_file():
        for line in statistic.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == names[2]:
                droppable = int(value)
    return limit, max(limit - used + droppable, 0)


def _group_cpus(folder: Path) -> float:
    if (folder / "cpu.max").is_file():
        allowed, interval = (folder / "cpu.max").read_text().split()
        if allowed == "max":
            return math.inf
        return int(allowed) / int(interval)
    # Version 1 writes -1 for "no quota".
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if quota <= 0 or math.isinf(quota):
        return math.inf
    return quota / period


def _number(file: Path) -> float:
    """The number in a control file; inf if the file is absent or says "max"."""
    if not file.is_file():
        return math.inf
    text = file.read_text().strip()
    if text == "max":
        return math.inf
    return int(text)


def _cpu_count() -> int:
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux: a batch system often pins a job to some CPUs
        count = len(os.sched_getaffinity(0))
    return max(1, int(min(count, _cpu_limit())))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return name.strip()
    return platform.processor() or platform.machine()


def _gpus(wanted: Sequence[int] | None) -> tuple[Gpu, ...]:
    import torch

    if wanted is None:
        wanted = range(torch.cuda.device_count())
    return tuple(map(_gpu, wanted))


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return Gpu(index, properties.name, properties.total_memory, free, (properties.major, properties.minor))


def _synchronize(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
