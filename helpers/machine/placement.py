"""Whether models fit on devices, and which device holds which layer: one answer for the whole project.

``place`` is for one model, ``place_together`` for all that are in memory at the same time. Layers are never split and
keep their order. Both return a ``Placement``; what is missing stands in its ``Shortfall``. Sizes are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB, QUANTIZED, gib
from helpers.machine.anatomy import anatomy
from helpers.machine.memory import Workload, _activation_bytes
from helpers.machine.packing import _fill, _spread
from helpers.machine.pieces import _Piece, _pieces, _sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PretrainedConfig  # noqa: TC004 (it takes seconds to import)

    from helpers.machine.hardware import Machine

RESERVED = 0.05  # share of each device kept free for the CUDA context and fragments
Device = int | str  # as in a device map: a GPU's number, "cpu" or "disk"


@dataclass(frozen=True)
class Shortfall:
    """Bytes that are missing, and the devices that do not hold enough, such as "4 devices of 74.5 GiB".

    ``str`` gives the rest of a sentence that begins with "it".
    """

    bytes: int
    devices: str

    def __str__(self) -> str:
        return f"needs {gib(self.bytes)} more than {self.devices} can hold"


@dataclass(frozen=True)
class Placement:
    """Which device holds which module. ``per_device_bytes`` counts weights and each layer's share of the rest."""

    device_map: dict[str, Device]
    per_device_bytes: dict[Device, int]
    shortfall: Shortfall | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.shortfall is None


@dataclass(frozen=True)
class Devices:
    """Where models may go: the bytes of each GPU, and those of host memory and the disk for what the GPUs cannot hold.

    Without GPUs the models run in host memory. Raises WorkbookError for sizes that are negative or not finite, and for
    a GPU of 0 bytes.
    """

    gpus: tuple[float, ...] = ()
    cpu_bytes: float = 0.0
    disk: bool = False

    def __post_init__(self) -> None:
        for size in self.gpus:
            if not 0 < size < math.inf:
                raise WorkbookError(f"A GPU must have a finite size above 0 bytes, but has {size}.")
        if not 0 <= self.cpu_bytes < math.inf:
            raise WorkbookError(f"Host memory must have a finite size of at least 0 bytes, but has {self.cpu_bytes}.")

    @classmethod
    def free(cls, machine: Machine, *, offload: bool = False) -> Devices:
        """The free memory of a machine: its GPUs', or, if it has none, the host's; with ``offload`` both and disk."""
        gpus = tuple(gpu.free_bytes for gpu in machine.gpus)
        host = max(machine.ram_available_bytes, 1)  # 0 would mean that the host is not to be used
        if offload:
            return cls(gpus, host, disk=True)
        if gpus:
            return cls(gpus)
        return cls((), host)

    @property
    def text(self) -> str:
        """Number and sizes, such as "4 devices of 74.5 GiB"."""
        if not self.gpus:
            return f"{gib(self.cpu_bytes)} of memory"
        sizes = list(dict.fromkeys(f"{size / GIB:.1f}" for size in sorted(self.gpus)))
        kinds = " and ".join(sizes)
        if len(sizes) > 2:
            kinds = f"{sizes[0]} to {sizes[-1]}"
        number = "1 device"
        if len(self.gpus) > 1:
            number = f"{len(self.gpus)} devices"
        text = f"{number} of {kinds} GiB"
        if self.cpu_bytes:
            text += f" and {gib(self.cpu_bytes)} of host memory"
        return text

    def without(self, taken: Mapping[Device, float]) -> Devices:
        """What is left when models hold ``taken`` bytes of the devices."""

        def left(size: float, device: Device) -> float:
            # A share of what is left will be reserved again. Divided by the other share, what is taken reserves nothing
            # of its own, so the reserve of the whole device counts once.
            return max(size - taken.get(device, 0) / (1 - RESERVED), 1.0)

        remaining = replace(self, gpus=tuple(left(size, device) for device, size in enumerate(self.gpus)))
        if self.cpu_bytes:
            remaining = replace(remaining, cpu_bytes=left(self.cpu_bytes, "cpu"))
        return remaining


@dataclass(frozen=True)
class Resident:
    """A model that is to be in memory; ``name`` is what messages call it."""

    config: PretrainedConfig
    precision: str
    name: str = "the models before it"


def place(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float] = (80e9,) * 8,
    *,
    workload: Workload = Workload(),
    cpu_bytes: float = 0.0,
    disk: bool = False,
) -> Placement:
    """Place whole layers on devices of these bytes, in order: as little as possible on the fullest, then evenly.

    Each layer's KV cache lies beside it; the embeddings come first, with the head if the two are tied, and the final
    norm last, with the head if it is separate. ``device_map`` is what ``from_pretrained`` takes. Of each device
    ``RESERVED`` and one layer's activations are kept free.

    ``cpu_bytes`` of host memory and the ``disk`` hold what the devices cannot: the devices are filled up in order, the
    modules after that go to "cpu", and what is too much there to "disk". They run on the first device used, which
    holds their cache and has free bytes for the weights of one of them at a time (accelerate moves them there); a
    device without these free bytes is left out if more modules then stay on the others. Without any device,
    ``gpus=[]``, the model runs in ``cpu_bytes`` of host memory, and "disk" takes what is too much there.
    Raises WorkbookError without a device or host memory, and if int8 or nf4 weights would have to be offloaded:
    bitsandbytes refuses the disk, and leaves modules in host memory unquantized.
    """
    devices = Devices(tuple(gpus), cpu_bytes, disk)
    return place_together([Resident(config, precision)], devices, workload)[0]


def place_together(
    residents: Sequence[Resident], devices: Devices, workload: Workload = Workload(context_tokens=None)
) -> list[Placement]:
    """Say where models go that are in memory at the same time, and whether they fit: each into what is left.

    Every question "does it fit?" of the project is answered here. Weights, cache and activations of the earlier models
    are taken off each device, of which ``RESERVED`` stays free once. The rules, and the errors, are those of ``place``.
    """
    placements: list[Placement] = []
    taken: dict[Device, float] = {}
    left = devices
    for index, resident in enumerate(residents):
        placement = _place_one(resident, left, workload)
        if placement.shortfall and index:
            names = " and ".join(earlier.name for earlier in residents[:index])
            missing = replace(placement.shortfall, devices=f"{left.text} left by {names}")
            placement = replace(placement, shortfall=missing)
        placements.append(placement)
        parts = parts_by_device(resident.config, resident.precision, placement, workload=workload)
        for device, sizes in parts.items():
            taken[device] = taken.get(device, 0) + sum(sizes.values())
        left = devices.without(taken)
    return placements


def shortfall(
    config: PretrainedConfig, precision: str, machine: Machine, workload: Workload = Workload()
) -> Shortfall | None:
    """What is missing to run a model in the free memory of a machine; None if it fits.

    It needs whole layers on the GPUs (``place``), or, on a machine without any, host memory.
    """
    return place_together([Resident(config, precision)], Devices.free(machine), workload)[0].shortfall


def parts_by_device(
    config: PretrainedConfig, precision: str, placed: Placement, *, workload: Workload = Workload()
) -> dict[Device, dict[str, int]]:
    """What each device of a placement holds, bytes by part: weights, kv_cache, activations.

    Activations are counted on each device on which modules run.
    """
    activations = _activation_bytes(config, precision, workload=workload)
    weights: dict[Device, int] = dict.fromkeys(placed.per_device_bytes, 0)
    for piece in _pieces(config, precision, workload):
        weights[placed.device_map[piece.names[0]]] += piece.weights
    on_gpus = any(isinstance(device, int) for device in placed.device_map.values())
    parts: dict[Device, dict[str, int]] = {}
    for device, held in placed.per_device_bytes.items():
        parts[device] = {"weights": weights[device], "kv_cache": held - weights[device], "activations": 0}
        # Offloaded modules run on a GPU; the CPU runs modules only if no GPU holds any.
        runs = (on_gpus and isinstance(device, int)) or (not on_gpus and device == "cpu")
        if held and runs:
            parts[device]["activations"] = activations
    return parts


def largest_context(
    config: PretrainedConfig, precision: str, gpus: Sequence[float], workload: Workload = Workload()
) -> int:
    """Largest context that fits on these devices, in tokens; 0 if not even one token fits.

    This is what the memory allows: the model may have been trained on fewer. ``workload.context_tokens`` is ignored.
    """

    def fits(tokens: int) -> bool:
        return _fits(config, precision, gpus, replace(workload, context_tokens=tokens))

    fitting, too_many = 0, 1
    while fits(too_many):
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def least_gpus(
    residents: Sequence[Resident], gpu: float, workload: Workload = Workload(context_tokens=None)
) -> int | None:
    """The least number of GPUs of that many bytes that hold the models together; None if no number does."""
    alone, most = 0, 0
    for resident in residents:
        least = _least_gpus_alone(resident, gpu, workload)
        if least is None:
            return None
        alone, most = max(alone, least), most + anatomy(resident.config).layers + 2
    if len(residents) == 1:
        return alone

    def fit(count: int) -> bool:
        placements = place_together(residents, Devices((gpu,) * count), workload)
        return all(placement.fits for placement in placements)

    # The largest number comes first: if it is too small, the long search would be in vain.
    if not fit(most):
        return None
    return next(count for count in range(alone, most + 1) if fit(count))


def _least_gpus_alone(resident: Resident, gpu: float, workload: Workload) -> int | None:
    pieces = anatomy(resident.config).layers + 2  # embeddings, layers, final norm: more GPUs than these do not help
    for count in range(1, pieces + 1):
        if _fits(resident.config, resident.precision, [gpu] * count, workload):
            return count
    return None


def _limits(gpus: Sequence[float], activations: float) -> list[float]:
    """The bytes of each GPU that weights and cache may take; never 0, by which shares could not be computed."""
    return [max(gpu * (1 - RESERVED) - activations, 1.0) for gpu in gpus]


def _fits(config: PretrainedConfig, precision: str, gpus: Sequence[float], workload: Workload) -> bool:
    """What ``place`` answers, without balancing the load: quick enough for a search."""
    activations = _activation_bytes(config, precision, workload=workload)
    pieces = _pieces(config, precision, workload)
    return bool(_fill(_sizes(pieces), _limits(gpus, activations)))


def _place_one(resident: Resident, devices: Devices, workload: Workload) -> Placement:
    config, precision = resident.config, resident.precision
    if not devices.gpus and not devices.cpu_bytes:
        raise WorkbookError("A placement needs at least one device. Give the bytes of each, such as [80e9, 80e9].")
    pieces = _pieces(config, precision, workload)
    activations = _activation_bytes(config, precision, workload=workload)
    limits = _limits(devices.gpus, activations)
    gpus_alone = not devices.cpu_bytes and not devices.disk
    if gpus_alone or (limits and _fill(_sizes(pieces), limits)):
        return _on_gpus(pieces, limits, devices)
    placement = _offloaded(pieces, limits, devices, activations)
    if precision in QUANTIZED and (devices.gpus or "disk" in placement.device_map.values()):
        raise WorkbookError(
            f"{precision} weights cannot be offloaded: bitsandbytes refuses modules on the disk and leaves those in "
            "host memory unquantized. Give larger devices, or choose bf16."
        )
    return placement


def _on_gpus(pieces: Sequence[_Piece], limits: Sequence[float], devices: Devices) -> Placement:
    placed_on = _spread(_sizes(pieces), limits)
    used: dict[Device, int] = dict.fromkeys(range(len(limits)), 0)
    for piece, device in zip(pieces, placed_on, strict=True):
        used[device] += piece.size
    excess = sum(max(used[device] - limit, 0) for device, limit in enumerate(limits))
    missing = 0.0
    if excess > 0:
        # Whole layers waste some of each device, so more may be missing than the sum of all sizes says.
        missing = max(excess, sum(used.values()) - sum(limits))
    return Placement(_device_map(pieces, placed_on), used, _shortfall(missing, devices.text))


def _shortfall(missing: float, devices: str) -> Shortfall | None:
    if missing <= 0:
        return None
    return Shortfall(math.ceil(missing), devices)


def _device_map(pieces: Sequence[_Piece], placed_on: Sequence[Device]) -> dict[str, Device]:
    device_map: dict[str, Device] = {}
    for piece, device in zip(pieces, placed_on, strict=True):
        device_map.update(dict.fromkeys(piece.names, device))
    return device_map


def _offloaded(pieces: Sequence[_Piece], limits: Sequence[float], devices: Devices, activations: float) -> Placement:
    """The leading pieces on the GPUs (if none holds one: in host memory), the rest in host memory and on disk."""
    host = devices.cpu_bytes * (1 - RESERVED)
    overflow: Device = "disk" if devices.disk else "cpu"
    placed_on: list[Device] = [*_leading(pieces, limits)]
    main: Device = "cpu"  # runs what is offloaded, and keeps its cache
    if placed_on:
        main = placed_on[0]
    else:
        # No GPU holds a piece, so the CPU runs the model: its activations lie in host memory.
        host -= activations
        placed_on = ["cpu"] * len(_leading(pieces, [host]))
    rest = pieces[len(placed_on) :]
    if main == "cpu":
        # Host memory has been filled with the leading pieces.
        placed_on += [overflow] * len(rest)
    else:
        placed_on += _in_host_memory_or(overflow, rest, host)

    used: dict[Device, int] = dict.fromkeys([*range(len(limits)), "cpu", overflow], 0)
    for device, held in _held(pieces, placed_on, main).items():
        used[device] += held
    needed = used["cpu"]
    if main == "cpu" and devices.disk and rest:
        needed += max(piece.weights for piece in rest)  # read from disk, one at a time
    return Placement(_device_map(pieces, placed_on), used, _shortfall(needed - host, devices.text))


def _in_host_memory_or(overflow: Device, pieces: Sequence[_Piece], host: float) -> Iterator[Device]:
    """As many pieces as ``host`` bytes hold go to host memory, the others to ``overflow``."""
    for offloaded in accumulate(piece.weights for piece in pieces):
        if offloaded <= host:
            yield "cpu"
        else:
            yield overflow


def _held(pieces: Sequence[_Piece], placed_on: Sequence[Device], main: Device) -> dict[Device, int]:
    """The bytes on each device in use; ``main`` keeps the cache of what is offloaded, because it runs it."""
    held: dict[Device, int] = dict.fromkeys([*placed_on, main], 0)
    for piece, device in zip(pieces, placed_on, strict=True):
        held[device] += piece.weights
        if isinstance(device, int):
            held[device] += piece.cache
        else:
            held[main] += piece.cache
    return held


def _leading(pieces: Sequence[_Piece], limits: Sequence[float]) -> list[int]:
    """The devices of as many leading pieces as can stay on them, one device after the other filled up.

    Offloaded pieces run on the first device used. It must hold their whole cache and the weights of one of them at a
    time. That is the first device of all, unless more pieces stay if the first ones are left out.
    """
    for count in range(len(pieces), 0, -1):
        sizes = _sizes(pieces[:count])
        rest = pieces[count:]
        kept_free = sum(piece.cache for piece in rest)
        kept_free += max((piece.weights for piece in rest), default=0)
        for first in range(len(limits)):
            devices = _fill(sizes, [limits[first] - kept_free, *limits[first + 1 :]])
            # If its first device stays empty, it is not the one that runs the rest: the next `first` tries that.
            if devices and devices[0] == 0:
                return [first + device for device in devices]
    return []
