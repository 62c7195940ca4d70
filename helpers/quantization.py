"""bitsandbytes configurations, the Falcon repair, and the proof that quantization happened."""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.types import QUANTIZED, WorkbookError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

_KNOWN_NOISE = {
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
_REPAIR = threading.RLock()
OUTLIER = 6.0  # LLM.int8()'s threshold, bitsandbytes' and transformers' default
NF4_TAIL = 0.9677083  # the outermost quantile of the nf4 code: (1 - 1/32 + 1 - 1/30) / 2, QLoRA's appendix E


class QuantizationError(WorkbookError):
    """The weights are not stored in the precision that was asked for."""


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


def quiet_bitsandbytes() -> None:
    """Drop two harmless messages of bitsandbytes: one an int8 layer and call, one at import on some CPUs."""
    for name in _KNOWN_NOISE:
        logging.getLogger(name).addFilter(_not_known_noise)


def _not_known_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KNOWN_NOISE[record.name])


def bnb_config(
    precision: str, compute_dtype: torch.dtype | None = None, *, double_quant: bool = False
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of a precision; None for one that does not quantize.

    nf4 multiplies in ``compute_dtype`` (bfloat16 unless given). ``double_quant`` also quantizes the scales, which
    saves 0.37 bits a weight (QLoRA, arXiv 2305.14314, section 3): off, as in the library, because inference gains
    nothing else from it. int8 is LLM.int8() with the library's threshold of 6.0.
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


@contextmanager
def rebound(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the block and what it was afterwards, whatever happens."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def needs_repair() -> bool:
    """True while transformers leaves Falcon's linear layers unquantized (5.5.0 and later do): tried, not looked up."""
    quiet_bitsandbytes()
    import torch
    from transformers import FalconConfig, FalconForCausalLM
    from transformers.integrations import bitsandbytes as integration

    size = FalconConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, bos_token_id=0, eos_token_id=0
    )
    with _REPAIR, torch.device("meta"), rebound(integration.logger, "disabled", True):
        model = FalconForCausalLM(size)
        layers = quantizable_layers(model)
        integration.replace_with_bnb_linear(model, ["lm_head"], bnb_config("nf4"))
    return not all(_is_4bit(model.get_submodule(name)) for name in layers)


@contextmanager
def falcon_repair() -> Iterator[bool]:
    """Inside the block, Falcon models are built from plain linear layers, which transformers quantizes.

    Yields whether that was needed; does nothing where it was not. Outputs stay the same: Falcon's own layer differs
    from ``torch.nn.Linear`` only in how it would add a bias, and these models have none. One thread at a time.
    """
    with _REPAIR:
        if not needs_repair():
            yield False
            return
        from torch import nn
        from transformers.models.falcon import modeling_falcon

        with rebound(modeling_falcon, "FalconLinear", nn.Linear):
            yield True


def quantizable_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that quantization must convert: all but the output head, by transformers' rule."""
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if should_convert_module(name, kept)]


def quantized_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that bitsandbytes holds, in 4 or in 8 bits."""
    return [name for name, module in model.named_modules() if _is_4bit(module) or _is_8bit(module)]


def keep_unpacked(model: PreTrainedModel) -> None:
    """Keep nf4 weights as they are stored, also through forward passes; call it before the first one.

    On a CPU with AVX512_BF16, bitsandbytes otherwise repacks each 4-bit weight in place at the first inference:
    faster, but training then loses gradients, and merging or dequantizing gives garbage.
    """
    for module in model.modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False


def may_repack(model: PreTrainedModel) -> bool:
    """True where an inference would repack nf4 weights in place, or has: see ``keep_unpacked``."""
    layers = [module for module in model.modules() if _is_4bit(module) and module.weight.device.type == "cpu"]
    return any(layer.support_avx512bf16_for_cpu for layer in layers) or was_repacked(model)


def was_repacked(model: PreTrainedModel) -> bool:
    """True where an inference has repacked nf4 weights in place and rounded their scales to bfloat16."""
    return any(_is_4bit(module) and _is_packed(module) for module in model.modules())


def _is_packed(module: nn.Module) -> bool:
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def weights_in(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for; 4-bit storage holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes that the weights take in memory, with the scales and tables of quantization; tied weights count once."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + sum(tensor.nbytes for module in model.modules() for tensor in _quantization_state(module))


def verify_quantized(model: PreTrainedModel, precision: str) -> None:
    """Prove from classes, types and bytes alone that every linear layer is stored in ``precision``; no forward pass.

    Raises QuantizationError naming the layers that are not, and ValueError for a precision that does not quantize.
    """
    if precision not in QUANTIZED:
        raise ValueError(f"precision {precision!r} does not quantize: choose one of {', '.join(QUANTIZED)}")
    layers = quantizable_layers(model)
    faults = {name: fault for name in layers if (fault := _fault(model.get_submodule(name), precision))}
    if not faults and layers:
        return
    shown = "".join(f"\n  {name}: {fault}" for name, fault in list(faults.items())[:3])
    more = f"\n  ... and {len(faults) - 3} more" if len(faults) > 3 else ""
    raise QuantizationError(
        f"{len(faults)} of {len(layers)} linear layers are not stored as {precision}:{shown}{more}\n"
        "Load the model with helpers.loading.load, which repairs what transformers leaves out and checks it."
    )


def verify_against_checkpoint(model: PreTrainedModel, checkpoint: Path, layer: str | None = None) -> float:
    """Compare one quantized weight with the checkpoint's, within the error that the format allows.

    The weight is dequantized into a copy: half the widest gap of the nf4 code times the block's largest magnitude,
    or half a step of 1/127 of the row's, is allowed for each value. ``layer`` is the smallest one unless given.
    Where the checkpoint is quantized itself, the bytes must be the same. Call it before the first forward pass.
    Returns the largest error as a share of what is allowed. Raises QuantizationError beyond it.
    """
    layer = layer or min(quantized_layers(model), key=lambda name: weights_in(model.get_submodule(name).weight))
    module = model.get_submodule(layer)
    if _is_packed(module):
        raise QuantizationError(f"{layer} was repacked by a forward pass: verify right after loading")
    source = _checkpoint_tensor(checkpoint, f"{layer}.weight").to(module.weight.device)
    if not source.is_floating_point():
        share = 0.0 if source.equal(module.weight.data) else float("inf")
    else:
        share = _error_share(module, source.to(model.dtype).float())
    if not share <= 1:
        raise QuantizationError(
            f"{layer}.weight is not {checkpoint}'s: its error is {share:.2g} times what quantization allows. "
            "Load the model again; if it happens again, this file or this machine is damaged."
        )
    return share


def nf4_code() -> list[float]:
    """The 16 values of nf4: quantiles of the normal distribution, scaled so that the ends are -1 and 1.

    Eight probabilities evenly spaced from the tail to the middle give the negative half with its zero, nine the
    positive one (QLoRA, arXiv 2305.14314, section 3 and appendix E; bitsandbytes' ``create_normal_map``).
    """
    import numpy as np
    from scipy.stats import norm

    negative, positive = (norm.ppf(np.linspace(NF4_TAIL, 0.5, count))[:-1] for count in (8, 9))
    values = [*-negative, 0.0, *positive[::-1]]
    return [float(value / positive[0]) for value in values]


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """A copy of a linear layer's weight in float32 (outputs, inputs), whatever it is stored in.

    Raises QuantizationError for an nf4 weight that a forward pass repacked: see ``keep_unpacked``.
    """
    import torch

    if not (_is_4bit(module) or _is_8bit(module)):
        return module.weight.detach().float()
    if _is_8bit(module):
        return module.weight.data.float() * _row_scales(module).view(-1, 1) / 127
    if _is_packed(module):
        raise QuantizationError("a forward pass repacked this weight: load the model with unpacked=True")
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state)


def layer_errors(reference: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> list[LayerError]:
    """The error of each linear layer of ``model`` alone: its inputs are those that it has in ``reference``.

    ``ids`` (1, tokens) is the text that is read. The exact result is the product of the reference's weight and inputs
    in float32; a layer in bf16 has an output error too, that of rounding. Weights come first, because a forward pass
    may repack them; the model is not run as a whole. Both models are of one checkpoint.
    Raises QuantizationError as ``dequantized_weight`` does.
    """
    import torch
    from torch.nn.functional import linear

    names = quantizable_layers(reference)
    inputs, rows = _layer_inputs(reference, names, ids), []
    for name in names:
        source, layer, given = (
            reference.get_submodule(name).weight.detach().float(),
            model.get_submodule(name),
            inputs[name],
        )
        stored = _relative_error(dequantized_weight(layer), source)
        with torch.inference_mode():
            output = _relative_error(layer(given.to(layer.weight.device)).float(), linear(given.float(), source))
        columns = given.abs().flatten(0, -2).amax(0)
        rows.append(LayerError(name, stored, output, int((columns >= OUTLIER).sum()), len(columns)))
    return rows


def _layer_inputs(model: PreTrainedModel, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each of these layers is given while the model reads ``ids``."""
    import torch

    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda layer, given: inputs.update({name: given[0].detach()})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.to(exact.device) - exact).norm() / exact.norm()).item()


def _is_4bit(module: nn.Module) -> bool:
    return _is_bitsandbytes(module, "Linear4bit")


def _is_8bit(module: nn.Module) -> bool:
    return _is_bitsandbytes(module, "Linear8bitLt")


def _is_bitsandbytes(module: nn.Module, layer: str) -> bool:
    """Whether a module is that layer of bitsandbytes; nothing is while the library is not loaded."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, getattr(library.nn, layer))


def _fault(module: nn.Module, precision: str) -> str | None:
    """What is wrong with a layer that must be stored in ``precision``; None when it is right."""
    is_right_class = _is_4bit(module) if precision == "nf4" else _is_8bit(module)
    if not is_right_class:
        return f"{type(module).__name__} in {module.weight.dtype}"
    return _fault_4bit(module) if precision == "nf4" else _fault_8bit(module)


def _fault_4bit(module: nn.Module) -> str | None:
    import torch

    weight, state = module.weight, getattr(module.weight, "quant_state", None)
    weights = module.in_features * module.out_features
    if state is None or weight.is_meta:
        return "holds no quantized weight"
    if state.quant_type != "nf4" or weight.dtype != torch.uint8:
        return f"stored as {state.quant_type} in {weight.dtype}"
    if state.shape != (module.out_features, module.in_features):
        return f"holds a weight of shape {tuple(state.shape)}, not {(module.out_features, module.in_features)}"
    if weight.nbytes != -(-weights // 2) or state.absmax.numel() != -(-weights // state.blocksize):
        return f"{weight.nbytes} bytes and {state.absmax.numel()} scales for {weights} weights"
    return None


def _fault_8bit(module: nn.Module) -> str | None:
    import torch

    weight, scales = module.weight, _row_scales(module)
    if scales is None or weight.is_meta:
        return "holds no quantized weight"
    if weight.dtype != torch.int8:
        return f"stored in {weight.dtype}"
    if weight.shape != (module.out_features, module.in_features):
        return f"holds a weight of shape {tuple(weight.shape)}, not {(module.out_features, module.in_features)}"
    if scales.numel() != module.out_features:
        return f"{scales.numel()} scales for {module.out_features} rows"
    return None


def _row_scales(module: nn.Module) -> torch.Tensor | None:
    """The largest magnitude of each row: on the weight when loaded, on the layer's state after a forward pass."""
    return module.state.SCB if module.weight.SCB is None else module.weight.SCB


def _quantization_state(module: nn.Module) -> list[torch.Tensor]:
    """The tensors that a layer needs beside its weight in order to use it."""
    if _is_8bit(module):
        scales = _row_scales(module)
        return [] if scales is None else [scales]
    state = getattr(module.weight, "quant_state", None) if _is_4bit(module) else None
    if state is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def _checkpoint_tensor(checkpoint: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors checkpoint, sharded or not."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    with safe_open(checkpoint / files.get(name, SAFE_WEIGHTS_NAME), framework="pt") as tensors:
        return tensors.get_tensor(name)


def _error_share(module: nn.Module, source: torch.Tensor) -> float:
    """Largest error of a weight against ``source`` (float32, same shape) as a share of what is allowed, or NaN."""
    stored, allowed = _dequantized_4bit(module, source) if _is_4bit(module) else _dequantized_8bit(module, source)
    return ((stored - source).abs() / allowed).max().item()


def _dequantized_4bit(module: nn.Module, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the weight in float32, the error allowed for each of its values)."""
    import torch

    state, stored = module.weight.quant_state, dequantized_weight(module)
    flat = source.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % state.blocksize)).view(-1, state.blocksize)
    largest = blocks.abs().amax(dim=1)
    allowed = largest * _half_widest_gap(state.code)
    if state.nested:
        allowed = allowed + (largest - largest.mean()).abs().max() * _half_widest_gap(state.state2.code)
    return stored, _with_slack(allowed, largest).repeat_interleave(state.blocksize)[: flat.numel()].view_as(source)


def _dequantized_8bit(module: nn.Module, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the weight in float32, the error allowed for each of its values). The library rounds to float16 first."""
    stored = dequantized_weight(module)
    largest = source.abs().amax(dim=1, keepdim=True)
    return stored, _with_slack(largest * (0.5 / 127 + 2**-11), largest)


def _half_widest_gap(code: torch.Tensor) -> float:
    return code.float().sort().values.diff().max().item() / 2


def _with_slack(allowed: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Room for float32 arithmetic, and for blocks of zeros."""
    return allowed + largest * 1e-4 + 1e-12
