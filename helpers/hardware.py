"""What this machine has: GPUs, memory, disk, processors, and how fast its memory is.

In a container the limits of the control group and the CPU affinity count where they are lower than the host's numbers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import settings
from helpers.types import ROOT, Gpu, Machine, WorkbookError

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
CHUNK = 2**24  # bytes written or read at a time to measure a disk


# Prints what detect finds as JSON.
DETECT = "import dataclasses, json, helpers.hardware as h; print(json.dumps(dataclasses.asdict(h.detect())))"


def detect(gpus: Sequence[int] | None = None) -> Machine:
    """What this process may use on this machine. ``disk_free_bytes`` is the project folder's disk's.

    In a rehearsal (``$WORKBOOK_REHEARSAL`` names its folder) it is the machine that is rehearsed for. Asking a GPU for
    its free memory opens a CUDA context on it, which holds some hundred MiB while this process lives: of ``gpus``, the
    indices as torch counts, only those are asked and listed; all, unless given.
    """
    import psutil

    if rehearsal := settings.rehearsal_folder():
        return _read_machine((rehearsal / "machine.json").read_text(encoding="utf-8"))
    memory = psutil.virtual_memory()
    limit, room = memory_limit()
    return Machine(
        gpus=_gpus(gpus),
        ram_bytes=int(min(memory.total, limit)),
        ram_available_bytes=int(min(memory.available, room)),
        disk_free_bytes=disk_free(ROOT),
        cpu_count=_cpu_count(),
        cpu_name=_cpu_name(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cache_free_bytes=disk_free(download_folder()),
    )


def download_folder() -> Path:
    """The folder of the Hugging Face cache, which need not exist yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def detect_apart() -> Machine:
    """What ``detect`` finds, looked up by another process: on a machine with GPUs, no CUDA context stays in this one.

    Raises WorkbookError with that process's last words where it fails, such as on a GPU that gives no context.
    """
    done = subprocess.run([sys.executable, "-c", DETECT], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkbookError(f"this machine cannot be looked at: {last} (see workbook doctor, and nvidia-smi)")
    return _read_machine(done.stdout)


def memory_bandwidth(bytes: int = 2**28, repeats: int = 7, device: str = "cpu") -> float:
    """Measured memory bandwidth of a device in bytes a second: the median over large copies.

    A copy of n bytes moves 2n: it reads n and writes n. ``bytes`` should be well above the processor's caches.
    """
    import torch

    source = torch.ones(bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source).copy_(source)  # touches every page before the clock starts
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


@dataclass(frozen=True)
class DiskSpeed:
    """Measured sequential reading: bytes a second over ``read_bytes`` in a file of ``folder``.

    ``direct``: read past the operating system's cache (O_DIRECT); else the cache was emptied of the file first.
    """

    bytes_per_second: float
    read_bytes: int
    folder: str
    direct: bool


def disk_read_speed(folder: Path, bytes: int = 2**28, seconds: float = 1.5) -> DiskSpeed:
    """How fast the disk under a folder is read in a row, with the page cache out of the way.

    A file of ``bytes`` random bytes (fewer where writing takes longer than ``seconds``) is written in the folder and
    flushed to the disk, then read for at most ``seconds`` and deleted. A cache in the disk itself, or in the host of a
    virtual machine, may still answer. Raises OSError where the folder takes no file, or the disk is full.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-speed-") as file:
        start = time.perf_counter()
        while file.tell() < bytes and (not file.tell() or time.perf_counter() - start < seconds):
            file.write(os.urandom(CHUNK))
            file.flush()
            os.fsync(file.fileno())
        read, elapsed, direct = _read_uncached(Path(file.name), seconds)
    return DiskSpeed(read / elapsed, read, str(folder), direct)


def memory_limit(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> tuple[float, float]:
    """(limit, room left) in bytes that the control groups set (versions 1 and 2); inf where there is none.

    File cache that the kernel drops under pressure counts as room.
    """
    found = [_group_memory(folder) for folder in _groups("memory", cgroups, membership)]
    limits, rooms = zip(*found, strict=True) if found else ((math.inf,), (math.inf,))
    return min(limits), min(rooms)


def cpu_limit(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float:
    """CPUs that the control groups' quota allows (1.5 means one and a half), inf where there is none."""
    return min((_group_cpus(folder) for folder in _groups("cpu", cgroups, membership)), default=math.inf)


def _read_uncached(file: Path, seconds: float) -> tuple[int, float, bool]:
    """(bytes read, seconds it took, whether with O_DIRECT) of a file that is on the disk."""
    descriptor, direct = _open_uncached(file)
    buffer = mmap.mmap(-1, CHUNK)  # O_DIRECT asks for memory that begins with a page
    try:
        read, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds and (count := os.readv(descriptor, [buffer])):
            read, elapsed = read + count, time.perf_counter() - start
        return read, elapsed, direct
    finally:
        os.close(descriptor)


def _open_uncached(file: Path) -> tuple[int, bool]:
    with contextlib.suppress(OSError, AttributeError):  # some file systems and systems have no O_DIRECT
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
        root = cgroups / controllers if controllers else cgroups
        folder = root / path.lstrip("/")
        # A container often sees its own group as the root: then the named folder is absent and the root holds.
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root) and each.is_dir())


def _group_memory(folder: Path) -> tuple[float, float]:
    version_2 = (folder / "memory.max").exists()
    limit = _number(folder / ("memory.max" if version_2 else "memory.limit_in_bytes"))
    used = _number(folder / ("memory.current" if version_2 else "memory.usage_in_bytes"))
    if math.isinf(limit) or math.isinf(used):
        return math.inf, math.inf
    statistic = folder / "memory.stat"
    lines = statistic.read_text().splitlines() if statistic.is_file() else []
    key = "inactive_file " if version_2 else "total_inactive_file "
    dropped = sum(int(line.split()[1]) for line in lines if line.startswith(key))
    return limit, max(limit - used + dropped, 0)


def _group_cpus(folder: Path) -> float:
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if 0 < quota < math.inf else math.inf


def _number(file: Path) -> float:
    """The number in a control file, inf where the file is absent or says "max"."""
    text = file.read_text().strip() if file.is_file() else "max"
    return math.inf if text == "max" else int(text)


def _cpu_count() -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, cpu_limit())))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _gpus(wanted: Sequence[int] | None) -> tuple[Gpu, ...]:
    import torch

    return tuple(_gpu(index) for index in (range(torch.cuda.device_count()) if wanted is None else wanted))


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return Gpu(index, properties.name, properties.total_memory, free, (properties.major, properties.minor))


def _synchronize(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
