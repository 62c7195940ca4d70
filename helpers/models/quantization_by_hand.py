"""int8 and nf4 in a few lines of torch each, equal to bitsandbytes bit for bit. Notebook 02 prints these functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def layer_inputs(model: PreTrainedModel, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What a layer is given while the model reads one text: (tokens, inputs), on the CPU."""
    import torch

    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].cpu()))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over the norm of the exact values (Frobenius)."""
    return float((value.float() - exact.float()).norm() / exact.float().norm())


def absmax_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row over its largest magnitude: (codes from -127 to 127, one scale per row)."""
    import torch

    scales = matrix.abs().amax(1)
    return (matrix * (127 / scales)[:, None]).round().to(torch.int8), scales


def int8_product(x: torch.Tensor, weight: torch.Tensor, threshold: float = 6.0) -> torch.Tensor:
    """x @ weight.T: columns of x with a magnitude of ``threshold`` or more in 16 bits, all others in 8."""
    codes, scales = absmax_int8(weight.half().float())
    large = x.half().abs() >= threshold
    columns = large.any(0)
    x_codes, x_scales = absmax_int8(x.half().float().masked_fill(large, 0))
    # In float64 the sum of the products of codes is an exact integer.
    whole = (x_codes.masked_fill(columns, 0).double() @ codes.double().T).float()
    # bitsandbytes' constant without a CUDA kernel, in the place of 1 / 127² = 6.200012e-05.
    product = (whole * (x_scales[:, None] * scales) * 6.200124e-05).to(x.dtype)
    restored = (codes[:, columns] * scales[:, None] / 127).to(x.dtype)
    return product.addmm(x[:, columns], restored.T)


def nf4(weight: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the nearest of the 16 values, two per byte; the largest magnitude of each block of 64 weights)."""
    import torch

    blocks = weight.float().view(-1, 64)
    largest = blocks.abs().amax(1)
    borders = (code[1:] + code[:-1]) / 2
    nearest = torch.bucketize(blocks / largest[:, None], borders).flatten()
    return (nearest[::2] << 4 | nearest[1::2]).to(torch.uint8)[:, None], largest


def double_quantized(
    scales: torch.Tensor, code: torch.Tensor, table: int = 65536
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(8-bit indices of the scales, the largest magnitude of each 256 of them, their mean)."""
    import torch

    centred = scales - scales.mean()
    groups = torch.nn.functional.pad(centred, (0, -len(scales) % 256)).view(-1, 256)
    largest = groups.abs().amax(1)
    scaled = groups / largest[:, None]
    # On a CPU, bitsandbytes rounds to one of 65,536 steps and looks the nearest value up in a table.
    if table:
        scaled = ((scaled + 1) / 2 * (table - 1) + 0.5).long() / (table - 1) * 2 - 1
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    return nearest.flatten()[: len(scales)].to(torch.uint8), largest, scales.mean()


def scaled_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Every weight over the largest magnitude of its block of 64: what nf4's 16 values have to meet."""
    blocks = weight.float().view(-1, 64)
    return blocks / blocks.abs().amax(1, keepdim=True)


def equal_to_bitsandbytes(weight: torch.Tensor, x: torch.Tensor) -> dict[str, bool]:
    """The three comparisons below for one matrix and its inputs, by the name under which they are recorded."""
    return {
        "int8_by_hand_equals_bitsandbytes": int8_equals_bitsandbytes(weight, x),
        "nf4_by_hand_equals_bitsandbytes": nf4_equals_bitsandbytes(weight),
        "double_quantization_by_hand_equals_bitsandbytes": _double_quantization_equals_bitsandbytes(weight),
    }


def int8_equals_bitsandbytes(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether codes, scales and product are those of bitsandbytes to the last bit. It reads weights as float16."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    codes, scales = absmax_int8(weight.half().float())
    their_codes, their_scales, _ = int8_vectorwise_quant(weight.half())
    rows, columns = weight.shape
    theirs = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0).eval()
    theirs.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).cpu()
    with torch.inference_mode():
        products_equal = torch.equal(int8_product(x, weight), theirs(x))
    return products_equal and torch.equal(codes, their_codes) and torch.equal(scales, their_scales)


def nf4_equals_bitsandbytes(weight: torch.Tensor) -> bool:
    """Whether packed indices and scales are those of bitsandbytes to the last bit."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    their_packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, largest = nf4(weight, state.code)
    return torch.equal(packed, their_packed) and torch.equal(largest, state.absmax)


def _double_quantization_equals_bitsandbytes(weight: torch.Tensor) -> bool:
    """Whether the scales of nf4, quantized again, are those of bitsandbytes to the last bit."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    _, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    _, scales = nf4(weight, state.code)
    indices, largest, mean = double_quantized(scales, state.state2.code)
    scales_equal = torch.equal(largest, state.state2.absmax) and torch.equal(mean, state.offset)
    return scales_equal and torch.equal(indices, state.absmax)
