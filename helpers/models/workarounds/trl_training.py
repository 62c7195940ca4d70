"""trl trains adapters of a quantized model in bfloat16, and on a CPU scores positions that carry no loss.

What is wrong: trl casts the adapters of a 4-bit model to bfloat16, which is too coarse for small steps of the
optimizer. And without triton it gives the output layer all positions and blanks those without loss, which spares
compilers of graphs new shapes; a CPU compiles nothing, and in short replies nine positions of ten carry no loss.
Versions: trl 1.16.0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from helpers.models.workarounds.rebinding import rebound

if TYPE_CHECKING:
    import torch
    from torch import nn


def float_adapters(model: nn.Module) -> None:
    """Keep the parameters that are trained in float32. Call it when trl's trainer has been made."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trained_positions_alone(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block, the output layer scores only positions that carry the loss, on a CPU too.

    Loss and gradients stay the same.
    """
    if device.type != "cpu":
        return nullcontext()
    from trl.trainer import utils

    # This module reads the name for that choice alone; the kernels ask their own module.
    return rebound(utils, "_use_triton", lambda _: True)
