"""Precisions, and the text of sizes and durations. Sizes are bytes and times are seconds.

Text shows GiB (2^30 bytes). GB (1e9 bytes) appears only where a published figure is quoted.
"""

from __future__ import annotations

from typing import Literal, get_args

GIB = 2**30
Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
QUANTIZED = ("int8", "nf4")
# torch's name of the type that a model of each precision computes in.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16"}


def gib(size: float) -> str:
    """Bytes as text in GiB, such as "74.5 GiB": for devices and models that differ by gigabytes."""
    return f"{size / GIB:.1f} GiB"


def human(size: float) -> str:
    """Bytes as text in the unit that suits them: "1.50 GiB", below that "1.5 MiB"."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds as text: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min"; None, an unknown time, as a dash."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        large, small, units = whole // 60, whole % 60, ("min", "s")
    else:
        large, small, units = whole // 3600, whole % 3600 // 60, ("h", "min")
    text = f"{large} {units[0]}"
    if small:
        text += f" {small} {units[1]}"
    return text
