"""The most memory that a piece of work holds at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocators hold at once above what they held when ``work`` was called.

    On the CPU, every allocation and release is summed in order of time (torch's profiler records them); on CUDA it is
    ``torch.cuda.max_memory_allocated``, summed over the devices.
    """
    if device.type == "cuda":
        return _peak_on_gpus(work)
    return _peak_on_cpu(work)


def _peak_on_gpus(work: Callable[[], object]) -> int:
    import torch

    devices = range(torch.cuda.device_count())
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    peak = 0
    for device, start in zip(devices, before, strict=True):
        peak += torch.cuda.max_memory_allocated(device) - start
    return peak


def _peak_on_cpu(work: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _silent_libraries(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # the profiler lists them by thread
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what compiled code writes to the standard error: the profiler says when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
