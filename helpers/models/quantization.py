"""Weights in 8 and 4 bits: how bitsandbytes is configured, the proof that it quantized, and what it costs each layer.

``verify_quantized`` proves the storage of every layer from its class, types and bytes; ``_verify_against_checkpoint``
compares one weight with the file it came from. Both run before the first forward pass, which may repack 4-bit weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, choose
from helpers.base.units import QUANTIZED
from helpers.models.checkpoint import _read_tensor
from helpers.models.layers import _is_4bit, _is_8bit, _quantized_layers, _row_scales, _weights_in, quantizable_layers
from helpers.models.quantization_by_hand import relative_error
from helpers.models.workarounds.bitsandbytes_messages import quiet_bitsandbytes
from helpers.models.workarounds.nf4_repacking import _was_repacked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

OUTLIER = 6.0  # LLM.int8()'s threshold, bitsandbytes' and transformers' default
NF4_TAIL = 0.9677083  # the outermost quantile of the nf4 code: (1 - 1/32 + 1 - 1/30) / 2, QLoRA's appendix E


class QuantizationError(WorkbookError):
    """The weights are not stored in the precision that was asked for."""


def bnb_config(
    precision: str, compute_dtype: torch.dtype | None = None, *, double_quant: bool = False
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of a precision; None for one that does not quantize.

    nf4 multiplies in ``compute_dtype`` (default: bfloat16). ``double_quant`` also quantizes the scales, which saves
    0.37 bits per weight (QLoRA, arXiv 2305.14314, section 3). It is off by default, as in the library, because
    inference gains nothing else from it. int8 is LLM.int8() with the library's threshold of 6.0.
    """
    if precision not in QUANTIZED:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype or torch.bfloat16,
        bnb_4bit_use_double_quant=double_quant,
    )


def verify_quantized(model: PreTrainedModel, precision: str) -> None:
    """Prove that every linear layer is stored in ``precision``, from classes, types and bytes, without a forward pass.

    Raises QuantizationError naming the layers that are not, and ValueError for a precision that does not quantize.
    """
    choose(precision, QUANTIZED, "quantized precision", ValueError)
    layers = quantizable_layers(model)
    faults = []
    for name in layers:
        if fault := _fault(model.get_submodule(name), precision):
            faults.append(f"\n  {name}: {fault}")
    # A model without linear layers proves nothing, so it does not pass either.
    if not faults and layers:
        return
    more = f"\n  ... and {len(faults) - 3} more" if len(faults) > 3 else ""
    raise QuantizationError(
        f"{len(faults)} of {len(layers)} linear layers are not stored as {precision}:{''.join(faults[:3])}{more}\n"
        "Load the model with this workbook's load function, which repairs what transformers leaves out and checks it."
    )


def nf4_code() -> list[float]:
    """The 16 values of nf4: quantiles of the normal distribution, scaled so that the ends are -1 and 1.

    Eight evenly spaced probabilities from the tail to the middle give the negative half and zero, nine the positive
    half (QLoRA, arXiv 2305.14314, section 3 and appendix E; bitsandbytes' ``create_normal_map``).
    """
    import numpy as np
    from scipy.stats import norm

    # The last quantile of each half is the middle, zero: it is left out here and put in once below.
    negative = norm.ppf(np.linspace(NF4_TAIL, 0.5, 8))[:-1]
    positive = norm.ppf(np.linspace(NF4_TAIL, 0.5, 9))[:-1]
    values = [*-negative, 0.0, *positive[::-1]]
    return [float(value / positive[0]) for value in values]


@dataclass(frozen=True)
class LayerError:
    """What storing one matrix in a precision costs: relative errors (Frobenius norm) against exact arithmetic.

    weight: of the stored values; output: of the layer's result for real inputs. ``outliers``: how many of the
    ``columns`` of those inputs hold a magnitude of ``OUTLIER`` or more.
    """

    layer: str
    weight: float
    output: float
    outliers: int
    columns: int


def layer_errors(reference: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> list[LayerError]:
    """The error of each linear layer of ``model`` alone: its inputs are those that it has in ``reference``.

    ``ids`` (1, tokens) is the text that is read. The exact result is the product of the reference's weight and inputs
    in float32, so a layer in bf16 has an output error too, that of rounding. Both models must be of one checkpoint.
    Raises QuantizationError for nf4 weights that a forward pass has repacked.
    """
    import torch
    from torch.nn.functional import linear

    names = quantizable_layers(reference)
    inputs = _layer_inputs(reference, names, ids)
    errors = []
    for name in names:
        layer, layer_input = model.get_submodule(name), inputs[name]
        source = _dequantized_weight(reference.get_submodule(name))
        # The weight comes first, because the layer's forward pass may repack it.
        weight_error = relative_error(_dequantized_weight(layer).to(source.device), source)
        with torch.inference_mode():
            output = layer(layer_input.to(_weight(layer).device)).float()
            exact = linear(layer_input.float(), source)
            output_error = relative_error(output.to(exact.device), exact)
        columns = layer_input.abs().flatten(0, -2).amax(0)
        outliers = int((columns >= OUTLIER).sum())
        errors.append(LayerError(name, weight_error, output_error, outliers, len(columns)))
    return errors


def _verify_against_checkpoint(model: PreTrainedModel, checkpoint: Path, layer: str | None = None) -> float:
    """Compare one quantized weight with the checkpoint's, within the error that the format allows.

    The weight is dequantized into a copy. Each value may differ by half the widest gap of the nf4 code times the
    largest magnitude of its block, or by half a step of 1/127 of its row's largest magnitude. ``layer`` defaults to
    the smallest layer. If the checkpoint itself is quantized, the bytes must be the same. Call it before the first
    forward pass. Returns the largest error as a share of the allowed one. Raises QuantizationError beyond it.
    """
    layer = layer or _smallest_quantized(model)
    module = model.get_submodule(layer)
    if _was_repacked(module):
        raise QuantizationError(f"{layer} was repacked by a forward pass. Verify a model right after loading it.")
    weight = _weight(module)
    source = _read_tensor(checkpoint, f"{layer}.weight").to(weight.device)
    if source.is_floating_point():
        share = _error_share(module, source.to(model.dtype).float())
    else:
        share = 0.0 if source.equal(weight.data) else float("inf")
    if not share <= 1:  # Not "share > 1": a damaged scale gives NaN, which must fail too.
        raise QuantizationError(
            f"{layer}.weight is not {checkpoint}'s: its error is {share:.2g} times what quantization allows. "
            "Load the model again. If it happens again, this file or this machine is damaged."
        )
    return share


def _layer_inputs(model: PreTrainedModel, names: Sequence[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input of each of these layers while the model reads ``ids``."""
    import torch

    inputs: dict[str, torch.Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep_input(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0].detach()

        return keep_input

    handles = [model.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names]
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _dequantized_weight(module: nn.Module) -> torch.Tensor:
    """A copy of a linear layer's weight in float32 (outputs, inputs), whatever it is stored in.

    Raises QuantizationError for an nf4 weight that a forward pass has repacked.
    """
    import torch

    if _is_8bit(module):
        scales = _row_scales(module)
        if scales is None:
            raise QuantizationError("This layer holds no quantized weight. Load the model again.")
        return module.weight.data.float() * scales.view(-1, 1) / 127
    if not _is_4bit(module):
        return _weight(module).detach().float()
    if _was_repacked(module):
        raise QuantizationError("A forward pass has repacked this weight. Load the model with unpacked=True.")
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(_quant_state(module))
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state)


def _smallest_quantized(model: PreTrainedModel) -> str:
    names = _quantized_layers(model)
    return min(names, key=lambda name: _weights_in(_weight(model.get_submodule(name))))


def _weight(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer of any class."""
    return module.get_parameter("weight")


def _quant_state(layer: Linear4bit) -> QuantState:
    """The scales and the code of an nf4 weight."""
    state: QuantState = layer.weight.quant_state  # type: ignore[attr-defined]  # of bitsandbytes' own parameter
    return state


def _fault(module: nn.Module, precision: str) -> str | None:
    """What is wrong with a layer that must be stored in ``precision``; None if it is right."""
    if precision == "nf4" and _is_4bit(module):
        return _fault_4bit(module)
    if precision == "int8" and _is_8bit(module):
        return _fault_8bit(module)
    return f"{type(module).__name__} in {_weight(module).dtype}"


def _fault_4bit(module: Linear4bit) -> str | None:
    import torch

    weight = module.weight
    state = getattr(weight, "quant_state", None)
    weights = module.in_features * module.out_features
    if state is None or weight.is_meta:
        return "holds no quantized weight"
    if state.quant_type != "nf4" or weight.dtype != torch.uint8:
        return f"stored as {state.quant_type} in {weight.dtype}"
    if state.shape != (module.out_features, module.in_features):
        return f"holds a weight of shape {tuple(state.shape)}, not {(module.out_features, module.in_features)}"
    # Two weights in a byte, a scale for each block, both rounded up.
    if weight.nbytes != -(-weights // 2) or state.absmax.numel() != -(-weights // state.blocksize):
        return f"{weight.nbytes} bytes and {state.absmax.numel()} scales for {weights} weights"
    return None


def _fault_8bit(module: Linear8bitLt) -> str | None:
    import torch

    weight = module.weight
    scales = _row_scales(module)
    if scales is None or weight.is_meta:
        return "holds no quantized weight"
    if weight.dtype != torch.int8:
        return f"stored in {weight.dtype}"
    if weight.shape != (module.out_features, module.in_features):
        return f"holds a weight of shape {tuple(weight.shape)}, not {(module.out_features, module.in_features)}"
    if scales.numel() != module.out_features:
        return f"{scales.numel()} scales for {module.out_features} rows"
    return None


def _error_share(module: nn.Module, source: torch.Tensor) -> float:
    """Largest error of a weight against ``source`` (float32, same shape) as a share of what is allowed, or NaN."""
    allowed = _allowed_4bit(module, source) if _is_4bit(module) else _allowed_8bit(source)
    error = (_dequantized_weight(module) - source).abs()
    return float((error / allowed).max())


def _allowed_4bit(module: Linear4bit, source: torch.Tensor) -> torch.Tensor:
    """The error allowed for each value of an nf4 weight."""
    import torch

    state = _quant_state(module)
    flat = source.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % state.blocksize)).view(-1, state.blocksize)
    largest = blocks.abs().amax(dim=1)
    allowed = largest * _half_widest_gap(state.code)
    if state.nested:  # The scales are quantized too: they may err by half a step of their own code.
        spread = (largest - largest.mean()).abs().max()
        allowed = allowed + spread * _half_widest_gap(state.state2.code)
    by_value = _with_slack(allowed, largest).repeat_interleave(state.blocksize)
    return by_value[: flat.numel()].view_as(source)


def _allowed_8bit(source: torch.Tensor) -> torch.Tensor:
    """The error allowed for each value of an int8 weight."""
    largest = source.abs().amax(dim=1, keepdim=True)
    # Half a step, and half a unit in the last place of float16, to which the library rounds first.
    return _with_slack(largest * (0.5 / 127 + 2**-11), largest)


def _half_widest_gap(code: torch.Tensor) -> float:
    return float(code.float().sort().values.diff().max()) / 2


def _with_slack(allowed: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The allowed error, with some tolerance for float32 arithmetic and for blocks of zeros."""
    return allowed + largest * 1e-4 + 1e-12
