"""Training on many devices: what each must hold, the machines that the article names, and 6·N·D.

``shard`` spreads training evenly, as ZeRO-3 does. ``hardware_claims`` compares the article's machines for Falcon-180B
with computed bytes. ``training_flop`` and ``implied_utilisation`` relate parameters, tokens and GPU hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB, QUANTIZED
from helpers.machine.anatomy import anatomy, published_config
from helpers.machine.memory import Workload, _layer_bytes, _linear_bytes, element_bytes, estimate
from helpers.machine.placement import Devices, Placement, Resident, Shortfall, least_gpus
from helpers.machine.step import Training, _reserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from transformers import PretrainedConfig

    from helpers.machine.placement import Device

A100_PEAK = 312e12  # bf16 FLOP/s, dense: NVIDIA A100 data sheet


def shard(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float],
    *,
    mode: str,
    workload: Workload = Workload(),
    training: Training = Training(),
) -> Placement:
    """Training spread evenly over equal devices, as ZeRO-3 and FSDP do (Rajbhandari et al. 2020, arXiv:1910.02054).

    Weights, gradients and optimizer are divided. Each device works on its share of the sequences; on several, it also
    holds what ``_gathered`` counts. The result counts what torch's allocator reserves for all of that (``_reserved``),
    which may be all of the device. There is no ``device_map``: every device holds a part of every layer. Raises
    WorkbookError if precision and mode do not go together, and without a device of more than 0 bytes.
    """
    devices = Devices(tuple(gpus))
    if not gpus:
        raise WorkbookError("Training needs at least one device. Give the bytes of each, such as [80e9, 80e9].")
    share = replace(workload, batch_size=math.ceil(workload.batch_size / len(gpus)))
    plan = estimate(config, precision, mode=mode, workload=share, training=training)
    moving = plan.gradients / len(gpus) + plan.activations
    whole = 0
    if len(gpus) > 1:
        moving += _gathered(config, precision, mode, share)
        whole = _quantization_state(config, precision, share)
    staying = (plan.weights + plan.optimizer - whole) / len(gpus) + whole
    held = math.ceil(_reserved(staying, moving))
    used: dict[Device, int] = dict.fromkeys(range(len(gpus)), held)
    missing = held - min(gpus)
    if missing <= 0:
        return Placement({}, used)
    return Placement({}, used, Shortfall(math.ceil(missing), f"each of {devices.text}"))


def _gathered(config: PretrainedConfig, precision: str, mode: str, workload: Workload) -> int:
    """Whole weights that a device holds for a moment: two layers, and the rest of the model.

    The layer in use and the next, which is fetched meanwhile (FSDP's BACKWARD_PRE, ZeRO-3's prefetching); embeddings,
    final norm and head stay from the forward to the backward pass (FSDP's outermost unit). If all weights are trained,
    the gradients of one layer and of the rest are whole too, before they are divided.
    """
    shape = anatomy(config)
    layer = _layer_bytes(shape, precision, workload.double_quant)
    rest = (shape.embeddings + shape.final_norm + shape.head) * element_bytes(precision)
    if mode == "full":
        return 3 * layer + 2 * rest
    return 2 * layer + rest


def _quantization_state(config: PretrainedConfig, precision: str, workload: Workload) -> int:
    """Bytes of the scales and code tables of all matrices, which are no parameters: every device holds all of them."""
    if precision not in QUANTIZED:
        return 0
    shape, packed = anatomy(config), {"int8": 1.0, "nf4": 0.5}[precision]
    state = 0
    for linear in shape.linears:
        whole = _linear_bytes(linear, precision, workload.double_quant) - linear.biases * element_bytes(precision)
        state += whole - math.ceil(packed * linear.weights)
    return shape.layers * state


@dataclass(frozen=True)
class _Claim:
    """A machine that the article names for one use of Falcon-180B, "at least": so many GPUs of so many GB each."""

    number: str
    use: str
    machine: str
    gpus: int
    size: int
    precision: str
    mode: str


_CLAIMS = (
    _Claim("A13", "full fine-tuning", "8x 8x A100 80GB", 64, 80, "bf16", "full"),
    _Claim("A14", "LoRA with ZeRO-3", "2x 8x A100 80GB", 16, 80, "bf16", "lora"),
    _Claim("A15", "QLoRA", "2x A100 80GB", 2, 80, "nf4", "qlora"),
    _Claim("A16", "bf16 inference", "8x A100 80GB", 8, 80, "bf16", "inference"),
    _Claim("A17", "int4 inference", "8x A100 40GB", 8, 40, "nf4", "inference"),
)


def hardware_claims() -> pd.DataFrame:
    """The article's machines for Falcon-180B (A13-A17), the computed bytes, and the smallest machines that will do.

    The article says "at least": a smaller number of the same GPUs refutes it. Published sizes are GB as published.
    Estimates: one sequence of 2048 tokens; training in bf16 (QLoRA in nf4) with gradient checkpointing. The least
    number of GPUs: for inference whole layers on each (``place``); for training as ``shard`` spreads it, each GPU with
    a sequence of its own. A sum over devices says nothing about speed.
    """
    import pandas as pd

    config = published_config("tiiuae/falcon-180B")
    rows = []
    for claim in _CLAIMS:
        total = estimate(config, claim.precision, mode=claim.mode).total
        row: dict[str, str | int | None] = {
            "claim": claim.number,
            "use": claim.use,
            "published machine": claim.machine,
            "published GB": claim.gpus * claim.size,
            "GB per GPU": claim.size,
            "published GPUs": claim.gpus,
            "estimate GB": round(total / 1e9),
            "estimate GiB": round(total / GIB),
        }
        for size in (80, 40):
            row[f"least {size} GB GPUs"] = _least_gpus_for(config, claim, size * 1e9)
        rows.append(row)
    return pd.DataFrame(rows)


def _least_gpus_for(config: PretrainedConfig, claim: _Claim, size: float) -> int | None:
    if claim.mode == "inference":
        return least_gpus([Resident(config, claim.precision)], size)
    for count in range(1, 1000):
        # Each GPU trains on a sequence of its own.
        if shard(config, claim.precision, [size] * count, mode=claim.mode, workload=Workload(count)).fits:
            return count
    return None


def training_flop(parameters: float, tokens: float) -> float:
    """6·N·D: floating-point operations to train N parameters on D tokens (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * parameters * tokens


def implied_utilisation(flop: float, gpu_hours: float, peak: float = A100_PEAK) -> float:
    """The share of ``peak`` FLOP/s at which that many GPU hours do that many operations."""
    return flop / (gpu_hours * 3600 * peak)
