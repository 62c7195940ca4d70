"""Dataclasses that several modules share. Sizes are bytes and times are seconds unless a name says otherwise."""

from __future__ import annotations

from typing import Literal, get_args

GIB = 2**30
Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
QUANTIZED = ("int8", "nf4")
Mode = Literal["inference", "full", "lora", "qlora"]


def gib(size: float) -> str:
    """Bytes as text in GiB (2^30), such as "74.5 GiB"."""
    return f"{size / GIB:.1f} GiB"


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16"}
