"""The linear layers of a model: which of them quantization must convert, which bitsandbytes holds, and their bytes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from torch import nn
    from transformers import PreTrainedModel


def _is_4bit(module: nn.Module) -> TypeGuard[Linear4bit]:
    """Whether a module is a 4-bit linear layer of bitsandbytes."""
    library = sys.modules.get("bitsandbytes")  # Without the library there are no such layers, and importing it is slow.
    return library is not None and isinstance(module, library.nn.Linear4bit)


def _is_8bit(module: nn.Module) -> TypeGuard[Linear8bitLt]:
    """Whether a module is an 8-bit linear layer of bitsandbytes."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear8bitLt)


def quantizable_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that quantization must convert: all but the output head, by transformers' rule."""
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    # What the library's own quantizers pass: it has no public name for it.
    in_float32 = list(model._keep_in_fp32_modules or ())  # noqa: SLF001
    kept = HfQuantizer.get_modules_to_not_convert(model, None, in_float32)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, kept):
            names.append(name)
    return names


def _quantized_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that bitsandbytes holds, in 4 or in 8 bits."""
    return [name for name, module in model.named_modules() if _is_4bit(module) or _is_8bit(module)]


def _weights_in(parameter: nn.Parameter) -> int:
    """Number of weights that a parameter stands for; 4-bit storage holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights in memory, with the scales and tables of quantization; tied weights count once."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        size += sum(tensor.nbytes for tensor in _quantization_state(module))
    return size


def _row_scales(layer: Linear8bitLt) -> torch.Tensor | None:
    """The largest magnitude of each row of an 8-bit layer; None if it holds no quantized weight."""
    # The scales are on the weight after loading, and move to the layer's state in the first forward pass.
    on_weight: torch.Tensor | None = getattr(layer.weight, "SCB", None)
    if on_weight is not None:
        return on_weight
    return layer.state.SCB


def _quantization_state(module: nn.Module) -> list[torch.Tensor]:
    """The tensors that a layer needs besides its weight."""
    scales = _row_scales(module) if _is_8bit(module) else None
    if scales is not None:
        return [scales]
    state = getattr(module.weight, "quant_state", None) if _is_4bit(module) else None
    if state is None:
        return []
    tensors = [state.absmax, state.code]
    if state.nested:  # The scales are quantized too.
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors
