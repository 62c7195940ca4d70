"""The one definition of peak memory that this project uses.

Peak memory is the largest number of bytes held at one moment during a stretch of work. Which bytes are counted depends
on who can see them:

- **An engine in a process of its own** (this module). On GPUs: what torch's CUDA allocator had handed out, summed over
  the GPUs. Otherwise: the resident set of the process, with weights, cache and libraries, because engines that are not
  torch allocate where no allocator of torch sees it. ``_reset_peak`` begins the stretch, and ``_read_peak`` says what
  it counted.
- **A model in this process** (``helpers.speed.benchmark``): what torch's allocators hold above what they held at the
  start. The resident set would count the notebook, its libraries and memory that earlier work has freed but not
  returned.
- **A notebook with all its processes** (``helpers.runs.supervision``): the sum of their resident sets, sampled once a
  second, because the kernel keeps a peak for each process, but not for a sum. Memory shared by several processes counts
  for each of them.

Every recorded figure names its kind, and figures of different kinds are never compared. This module needs the standard
library alone: it runs under the Python of any engine.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

_RESIDENT = "resident set of the worker's process (VmHWM: weights, cache, libraries), reset before each case"
_RESIDENT_EVER = "largest resident set of the worker's process so far (ru_maxrss), which cannot be reset here"
_ON_GPU = "torch.cuda.max_memory_allocated, summed over the GPUs, reset before each case"


def _reset_peak() -> None:
    """Return freed memory to the system and start a new peak from the memory in use."""
    gc.collect()
    # without trimming, memory freed by the case before would count for this one; only glibc has malloc_trim
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # proc(5): writing 5 resets the peak resident set size; only Linux has this file
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if cuda := _cuda():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _read_peak() -> tuple[int, str]:
    """The peak since ``_reset_peak`` in bytes, and what was counted."""
    if cuda := _cuda():
        allocated = 0
        for device in range(cuda.device_count()):
            allocated += cuda.max_memory_allocated(device)
        return allocated, _ON_GPU
    resident = _peak_resident_bytes()
    if resident is not None:
        return resident, _RESIDENT
    # imported here because Windows has no such module
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        largest *= 1024  # getrusage(2): kilobytes, but bytes on macOS
    return largest, _RESIDENT_EVER


def _peak_resident_bytes() -> int | None:
    """The peak that ``_reset_peak`` can reset, from Linux's /proc; None on other systems."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if match := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(match[1]) * 1024
    return None


def _cuda() -> ModuleType | None:
    """torch.cuda, if this process uses it. It is never imported here: that alone would take memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    cuda: ModuleType = torch.cuda
    return cuda
