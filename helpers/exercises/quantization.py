"""Exercises of notebook 02: the bytes of nf4, counting quantized layers, and nf4 by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.verdict import _is_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from helpers.exercises.verdict import Check, Hint


def _nf4_bytes(function: Callable[[int, int], float]) -> Hint:
    for rows, columns in ((14848, 14848), (59392, 14848), (64, 64)):
        weights = rows * columns
        if not _is_close(function(rows, columns), weights / 2 + weights / 64 * 4, 1e-6):
            return (
                f"The result for {rows} x {columns} is wrong. Count half a byte per weight, "
                "and one fp32 scale for each 64 weights."
            )
    return None


def _count_quantized(function: Callable[[nn.Module], tuple[int, int]]) -> Hint:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torch import nn

    models = [
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        nn.Sequential(Linear4bit(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)),
        nn.Sequential(nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=False)), Linear4bit(64, 64)),
    ]
    for model, expected in zip(models, ((0, 2), (1, 2), (2, 2)), strict=True):
        answer = function(model)
        if not isinstance(answer, tuple | list) or tuple(answer) != expected:
            return f"Expected (quantized, all) = {expected}, got {answer}. Linear4bit is a subclass of nn.Linear."
    return None


def _nf4_back(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Hint:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for seed, size in enumerate((64, 640)):
        # The second weight is ten times larger and has ten blocks: a forgotten scale, or one for all, is noticed.
        weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10**seed
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        answer = function(packed, state.absmax, state.code)
        if not isinstance(answer, torch.Tensor) or answer.numel() != size:
            return f"Return a tensor of {size} weights for {packed.numel()} bytes: each holds two indices."
        if not torch.allclose(answer.flatten(), dequantize_4bit(packed, state), rtol=1e-5):
            return "bitsandbytes restores other weights. The upper four bits of a byte are the earlier weight."
    return None


CHECKS: dict[str, Check] = {"02-1": _nf4_bytes, "02-2": _count_quantized, "02-3": _nf4_back}
