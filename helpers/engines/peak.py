"""The most memory that this process held since the last reset: its definition is part of every result."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from contextlib import suppress
from pathlib import Path

RESIDENT = "resident set of the worker's process (VmHWM: weights, cache, libraries), reset before each case"
RESIDENT_EVER = "largest resident set of the worker's process so far (ru_maxrss), which cannot be reset here"
ON_GPU = "torch.cuda.max_memory_allocated, summed over the GPUs, reset before each case"


def reset() -> None:
    """Give freed memory back to the system, then count anew from what is in use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
    if cuda := _cuda():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def read() -> tuple[int, str]:
    """(bytes, what they are) since ``reset``."""
    if cuda := _cuda():
        return sum(cuda.max_memory_allocated(device) for device in range(cuda.device_count())), ON_GPU
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024, RESIDENT
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024), RESIDENT_EVER


def _cuda():  # noqa: ANN202 - torch's module, where torch is loaded and has a GPU
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None
