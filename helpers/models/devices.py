"""Which device each part of a model goes to: the device map that transformers and accelerate take.

A map holds names of modules and the device of each: the number of a GPU, "cpu" or "disk".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.errors import first_names
from helpers.base.units import PRECISIONS, QUANTIZED
from helpers.machine import hardware
from helpers.machine.memory import Workload
from helpers.machine.placement import Devices, Resident, place_together, shortfall
from helpers.models.checkpoint import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from helpers.machine.hardware import Machine

DeviceMap = str | dict[str, int | str]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate chooses the devices
ONE_SEQUENCE = Workload()  # what a placement keeps memory for unless told otherwise: 2048 tokens


def device_map_for(
    config: PreTrainedConfig,
    precision: str,
    machine: Machine,
    workload: Workload = ONE_SEQUENCE,
    *,
    offload: bool = False,
) -> dict[str, int | str]:
    """Where the modules of a model go on a machine: whole layers over the free memory of its GPUs, or all on the CPU.

    That is ``placement.place_together``'s answer for this workload. With ``offload``, what the GPUs do not hold lies in
    free memory, and what that does not hold is read from disk each time it is used.
    Raises LoadError if it does not fit, with the shortfall and what would fit, and WorkbookError if int8 or nf4
    weights would have to be offloaded.
    """
    devices = Devices.free(machine, offload=offload)
    (placement,) = place_together([Resident(config, precision)], devices, workload)
    if placement.shortfall is None:
        # Without GPUs or offloading there is nothing to split: one entry stands for the whole model.
        return placement.device_map if machine.gpus or offload else {"": "cpu"}
    advice = "Choose a larger machine: no precision fits"
    for other in PRECISIONS:
        # What is offered fits without offloading, which is slow.
        if other != precision and shortfall(config, other, machine, workload) is None:
            advice = f"Choose {other}, which fits"
            break
    if not offload and precision not in QUANTIZED:
        advice += "; or load with offload=True, which is slow"
    raise LoadError(f"The model does not fit in {precision}: it {placement.shortfall}. {advice}.")


def _default_device_map(
    config: PreTrainedConfig, precision: str, workload: Workload = ONE_SEQUENCE, *, offload: bool = False
) -> dict[str, int | str]:
    """This machine's; of several processes (torchrun) on GPUs, each its own; in a rehearsal all devices are the CPU."""
    import torch

    count = os.environ.get("WORLD_SIZE", "")
    several = count.isdecimal() and int(count) > 1
    if several and settings.rehearsal_folder() is None and torch.cuda.is_available():
        return _on_own_gpu(config, precision, workload, offload=offload)
    machine = hardware.detect()
    device_map = device_map_for(config, precision, machine, workload, offload=offload)
    return dict.fromkeys(device_map, "cpu") if machine.rehearsed else device_map


def _chosen_device_map(wanted: object, config: PreTrainedConfig) -> DeviceMap | None:
    """A device map of the user's as ``load`` takes it; None stays None.

    Raises LoadError for a device that is not there, and for a map whose modules are not the model's.
    """
    if wanted is None or (isinstance(wanted, str) and wanted in STRATEGIES):
        return wanted
    if not isinstance(wanted, Mapping):
        return {"": _checked_device(wanted)}
    device_map = {name: _checked_device(device) for name, device in wanted.items()}
    _check_modules(device_map, config)
    return device_map


def _checked_device(device: object) -> int | str:
    """A device in the words of a device map. Raises LoadError, which lists the devices, if it is not here."""
    import torch

    count = torch.cuda.device_count()
    named = f"cuda:{device}" if isinstance(device, int) and not isinstance(device, bool) else str(device)
    if named in ("cpu", "disk"):
        return named
    if named == "cuda" and count:
        return torch.cuda.current_device()
    number = named.removeprefix("cuda:")
    if number != named and number.isdecimal() and int(number) < count:
        return int(number)
    here = ['"cpu"', '"disk"', *map(str, range(count))]
    gpus = "there is no GPU that torch can use" if not count else f"there are {count} GPUs"
    raise LoadError(
        f"The device map names the device {device!r}, and here {gpus}. Choose {', '.join(here)}, or a strategy: "
        f"{', '.join(STRATEGIES)}."
    )


def _check_modules(device_map: Mapping[str, int | str], config: PreTrainedConfig) -> None:
    """Refuse a map that names modules the model does not have, or leaves some of its weights out."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    known = {name for name, _ in chain(model.named_modules(), model.named_parameters(remove_duplicate=False))}
    if unknown := [name for name in device_map if name not in known]:
        modules = first_names(name for name, _ in model.named_children())
        raise LoadError(
            f"The device map names modules that the model does not have: {first_names(map(str, unknown))}. Its modules "
            f'are {modules} and what they contain; "" stands for the whole model.'
        )
    left_out = [name for name, _ in model.named_parameters() if _device_of(name, dict(device_map)) is None]
    if left_out:
        raise LoadError(
            f'The device map has no device for {first_names(left_out)}. Add the entry "" for all that is not named.'
        )


def _on_own_gpu(config: PreTrainedConfig, precision: str, workload: Workload, *, offload: bool) -> dict[str, int | str]:
    """The map of one of several processes: the GPU of its local rank; the others are not even looked at."""
    import torch

    rank, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not rank.isdecimal() or int(rank) >= count:
        raise LoadError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, LOCAL_RANK is {rank or 'not set'}, and there are {count} GPUs "
            f"here. Start one process per GPU, with torchrun --nproc-per-node {count}, or unset WORLD_SIZE."
        )
    own = int(rank)
    machine = hardware.detect(gpus=[own])
    device_map = device_map_for(config, precision, machine, workload, offload=offload)
    if set(device_map.values()) == {0}:
        return {"": own}
    # The placement counts the GPUs it was given, and this process gave one: its 0 is the own GPU.
    return {name: own if device == 0 else device for name, device in device_map.items()}


def _device_of(name: str, device_map: DeviceMap) -> int | str | None:
    """What the map says of a parameter: the entry with the longest prefix of its name."""
    if isinstance(device_map, str):
        return device_map
    prefixes = [prefix for prefix in device_map if not prefix or f"{name}.".startswith(f"{prefix}.")]
    return device_map[max(prefixes, key=len)] if prefixes else None


def _device_name(device: int | str | None) -> str:
    """A device of a map as text, such as "GPU 0"."""
    if isinstance(device, int):
        return f"GPU {device}"
    return "CPU" if device in ("cpu", None) else str(device)
