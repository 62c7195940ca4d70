"""bitsandbytes repacks nf4 weights in place at the first inference on some CPUs.

What is wrong: on a CPU with AVX512_BF16, the first forward pass in inference mode rearranges each 4-bit weight and
rounds its scales to bfloat16. That is faster, but training then loses gradients, and merging or dequantizing gives
garbage, all without an error.
Versions: bitsandbytes 0.50.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.models.layers import _is_4bit

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Keep nf4 weights as they are stored, also through forward passes. Call it before the first one."""
    for module in model.modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False


def may_repack(model: PreTrainedModel) -> bool:
    """Whether an inference would repack nf4 weights in place, or has done so."""
    for module in model.modules():
        if _is_4bit(module) and module.weight.device.type == "cpu" and module.support_avx512bf16_for_cpu:
            return True
    return _was_repacked(model)


def _was_repacked(module: nn.Module) -> bool:
    """Whether an inference has repacked nf4 weights of a model or layer and rounded their scales to bfloat16."""
    for layer in module.modules():
        if _is_4bit(layer):
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                return True
    return False
