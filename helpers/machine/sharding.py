"""Training on many devices: what each must hold, the machines that the article names, and 6·N·D.

``shard`` spreads training evenly, as ZeRO-3 does. ``hardware_claims`` compares the article's machines for Falcon-180B
with computed bytes. ``training_flop`` and ``implied_utilisation`` relate parameters, tokens and GPU hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.base.units import GIB
from helpers.machine.anatomy import anatomy, published_config
from helpers.machine.memory import Workload, _layer_bytes, estimate
from helpers.machine.placement import RESERVED, Devices, Placement, Resident, Shortfall, least_gpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from transformers import PretrainedConfig

    from helpers.machine.placement import Device

A100_PEAK = 312e12  # bf16 FLOP/s, dense: NVIDIA A100 data sheet


def shard(
    config: PretrainedConfig, precision: str, gpus: Sequence[float], *, mode: str, workload: Workload = Workload()
) -> Placement:
    """Training spread evenly over equal devices, as ZeRO-3 does (Rajbhandari et al. 2020, arXiv:1910.02054).

    Weights, gradients and optimizer are divided; each device works on its share of the sequences and has free bytes
    for one gathered layer. ``RESERVED`` of each device is kept free. There is no ``device_map``: every device holds a
    part of every layer. Raises WorkbookError if precision and mode do not go together.
    """
    share = replace(workload, batch_size=math.ceil(workload.batch_size / len(gpus)))
    training = estimate(config, precision, mode=mode, workload=share)
    divided = math.ceil((training.total - training.activations) / len(gpus))
    gathered = _layer_bytes(anatomy(config), precision, workload.double_quant)
    held = divided + training.activations + gathered
    used: dict[Device, int] = dict.fromkeys(range(len(gpus)), held)
    missing = held - min(gpus) * (1 - RESERVED)
    if missing <= 0:
        return Placement({}, used)
    return Placement({}, used, Shortfall(math.ceil(missing), f"each of {Devices(tuple(gpus)).text}"))


@dataclass(frozen=True)
class _Claim:
    """A machine that the article names for one use of Falcon-180B; ``gigabytes`` as published."""

    number: str
    use: str
    machine: str
    gigabytes: int
    precision: str
    mode: str


_CLAIMS = (
    _Claim("A13", "full fine-tuning", "8x 8x A100 80GB", 5120, "bf16", "full"),
    _Claim("A14", "LoRA with ZeRO-3", "2x 8x A100 80GB", 1280, "bf16", "lora"),
    _Claim("A15", "QLoRA", "2x A100 80GB", 160, "nf4", "qlora"),
    _Claim("A16", "bf16 inference", "8x A100 80GB", 640, "bf16", "inference"),
    _Claim("A17", "int4 inference", "8x A100 40GB", 320, "nf4", "inference"),
)


def hardware_claims() -> pd.DataFrame:
    """The article's machines for Falcon-180B (A13-A17), the computed bytes, and the smallest machines that will do.

    Published sizes are GB as published. Estimates: one sequence of 2048 tokens; training in bf16 (QLoRA in nf4) with
    gradient checkpointing. The least number of GPUs: for inference whole layers on each (``place``); for training
    weights, gradients and optimizer spread evenly as ZeRO-3 does, each GPU with a sequence of its own and free bytes
    for one gathered layer. A sum over devices says nothing about speed.
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
            "published GB": claim.gigabytes,
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
        workload = Workload(batch_size=count)
        if shard(config, claim.precision, [size] * count, mode=claim.mode, workload=workload).fits:
            return count
    return None


def training_flop(parameters: float, tokens: float) -> float:
    """6·N·D: floating-point operations to train N parameters on D tokens (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * parameters * tokens


def implied_utilisation(flop: float, gpu_hours: float, peak: float = A100_PEAK) -> float:
    """The share of ``peak`` FLOP/s at which that many GPU hours do that many operations."""
    return flop / (gpu_hours * 3600 * peak)
