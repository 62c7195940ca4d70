"""What a check of this machine found, and the checks of the installed software.

``doctor`` calls all checks. Those of the software are here: the versions of the packages against the lock, and a small
product with quantized weights on each device.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from helpers.base.installed import compare_packages
from helpers.base.units import QUANTIZED
from helpers.models.workarounds import bitsandbytes_messages
from helpers.models.workarounds.falcon_linear import needs_repair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from helpers.models.references import Profile

Status = Literal["ok", "warn", "fail", "skipped"]
# How far a product with quantized weights may be from the fp32 product, relative, in 2-norms, for normal weights and
# inputs of width 256. Measured on a CPU: nf4 0.091, int8 0.0075. Nearer than the lower bound: nothing was quantized.
PRODUCT_ERRORS = {"nf4": (0.06, 0.12), "int8": (0.004, 0.015)}
_DIFFERENCES = 5  # packages that are named; a wrong environment differs in a hundred


@dataclass(frozen=True)
class Finding:
    """The result of one check. "fail": the profile cannot run; "warn": it can. ``advice`` says what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


def _check_versions(lock: Path | None = None) -> Iterator[Finding]:
    """Check the installed packages as make setup does, against the lock that was asked for, such as cpu.txt."""
    compared = compare_packages(lock)
    if not compared.differences:
        yield Finding("versions", "ok", f"{compared.pins} packages as in {compared.lock}")
        return
    # Another version may do; a missing or damaged package cannot.
    others = [one.found for one in compared.differences if one.kind == "other"]
    broken = [one.found for one in compared.differences if one.kind != "other"]
    differences = [*broken, *others]
    found = ", ".join(differences[:_DIFFERENCES])
    if len(differences) > _DIFFERENCES:
        found += f" and {len(differences) - _DIFFERENCES} more"
    status: Status = "fail" if broken else "warn"
    yield Finding("versions", status, found, f"Install the packages of {compared.lock}: make setup")


def _check_quantization(profile: Profile, devices: Sequence[str]) -> Iterator[Finding]:
    """Check bitsandbytes by a small product on each device, and whether transformers quantizes Falcon by itself."""
    precisions = [name for name in profile.precisions if name in QUANTIZED]
    if not precisions:
        yield Finding("bitsandbytes", "skipped", "this profile quantizes nothing")
        return
    wrong: list[str] = []
    largest: list[str] = []
    for precision in precisions:
        errors = {device: _product_error(precision, device) for device in devices}
        wrong += _wrong_products(precision, errors)
        worst = max(errors, key=lambda device: errors[device])
        largest.append(_described(precision, worst, errors[worst]))
    # On a machine with many GPUs the largest error of each precision stands for all.
    found = f"relative error of a quantized product: {', '.join(wrong or largest)}"
    if wrong:
        advice = "Run make setup again; on a GPU, check whether bitsandbytes supports it."
        yield Finding("bitsandbytes", "fail", found, advice)
    else:
        yield Finding("bitsandbytes", "ok", found)
    yield _repair()


def _wrong_products(precision: str, errors: Mapping[str, float]) -> Iterator[str]:
    """The devices whose error (relative, by device) is not that of the precision, in words."""
    low, high = PRODUCT_ERRORS[precision]
    for device, error in errors.items():
        if not low < error < high:
            yield _described(precision, device, error)


def _described(precision: str, device: str, error: float) -> str:
    return f"{precision} on {device} {error:.2g}"


def _repair() -> Finding:
    version = f"transformers {importlib.metadata.version('transformers')}"
    if not needs_repair():
        return Finding("Falcon repair", "ok", f"{version} needs none")
    found = f"{version} does not quantize Falcon's layers by itself: load with models.load, which repairs it"
    return Finding("Falcon repair", "ok", found)


def _product_error(precision: str, device: str = "cpu", width: int = 256) -> float:
    """Relative distance (2-norms) of a product with quantized weights from the same product in fp32, on a device.

    Weights of shape (width, width) and 16 inputs are drawn from a normal distribution; both multiply in bfloat16.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(width, width, generator=random), torch.randn(16, width, generator=random)
    layer = _quantized_linear(precision, weight).to(device)
    with torch.inference_mode():
        product = layer(inputs.to(device, torch.bfloat16)).float().cpu()
    exact = inputs @ weight.T
    return float(((product - exact).norm() / exact.norm()).item())


def _quantized_linear(precision: str, weight: torch.Tensor) -> nn.Module:
    """A layer of bitsandbytes that quantizes ``weight`` (outputs, inputs) once it is moved to a device."""
    import torch

    # Before the import, during which bitsandbytes warns of what is missing on a machine without GPUs.
    bitsandbytes_messages.quiet_bitsandbytes()
    import bitsandbytes as bnb

    rows, columns = weight.shape
    layer: nn.Module
    if precision == "nf4":
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": weight})
    return layer
