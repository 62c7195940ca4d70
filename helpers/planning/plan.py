"""What a plan holds, as data: memory by precision, every device part by part, speed limits, download, disk.

``planner.make`` computes a plan, ``output`` shows it. The table ``CARDS`` lists the GPUs whose published memory
bandwidth is known here. Sizes are bytes; GB (1e9 bytes) is the size of a card as sold.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.machine import hardware
from helpers.machine.memory import Workload
from helpers.machine.placement import Shortfall

PARTS = ("weights", "kv_cache", "activations", "reserved")
SIZES = (24, 40, 48, 80, 141)  # GB of a card, as sold
COUNTS = (1, 2, 4, 8, 16)
DECIMAL = 1e9
GIGABIT = 1e9 / 8  # bytes per second over a line of 1 Gbit/s
AS_MANY_AS_FIT = Workload(context_tokens=None)  # one sequence of 2048 tokens, or of the model's own limit
# What notebook 04 asks at once; no question with its reply has more tokens, since a token is a byte of text or more.
QUESTIONS = Workload(batch_size=56, context_tokens=144)


@dataclass(frozen=True)
class _Card:
    """A GPU with its memory in GB, as sold, its published memory bandwidth and its peak in 16 bits.

    bandwidth: bytes per second. flops: of dense products in bf16 or fp16, accumulated in fp32.
    """

    name: str
    gigabytes: int
    bandwidth: float
    source: str
    flops: float = 0.0


CARDS = (
    _Card("RTX 3090", 24, 936e9, "NVIDIA specifications", 71e12),
    _Card("RTX 4090", 24, 1008e9, "NVIDIA specifications", 165e12),
    _Card("A100 40GB", 40, 1555e9, "NVIDIA A100 data sheet", 312e12),
    _Card("RTX A6000", 48, 768e9, "NVIDIA RTX A6000 data sheet", 155e12),
    _Card("L40S", 48, 864e9, "NVIDIA L40S data sheet", 362e12),
    _Card("A100 80GB", 80, 2039e9, "NVIDIA A100 data sheet, SXM", 312e12),
    _Card("H100 80GB", 80, 3350e9, "NVIDIA H100 data sheet, SXM", 989e12),
    _Card("H200", 141, 4800e9, "NVIDIA H200 data sheet", 989e12),
)


def _sold_as(gpus: Sequence[float]) -> str:
    """GPUs of these bytes in words, by their decimal size: "4 GPUs of 80 GB and 2 of 40 GB"."""
    kinds: list[str] = []
    for size, same in itertools.groupby(gpus):
        count = len(list(same))
        number = str(count)
        if not kinds:  # the noun stands once
            number += " GPU"
            if count > 1:
                number += "s"
        kinds.append(f"{number} of {size / DECIMAL:g} GB")
    return " and ".join(kinds)


@dataclass(frozen=True)
class _Here:
    """What was measured on this machine: ``disk_free`` in bytes, and ``memory_bandwidth``.

    ``disk`` is None, and ``disk_problem`` says why, if it could not be measured; the bandwidth is None unless a plan
    without GPUs asked for it.
    """

    disk_folder: str
    disk_free: int
    disk: hardware.DiskSpeed | None
    disk_problem: str = ""
    memory_bandwidth: hardware.Bandwidth | None = None


@dataclass(frozen=True)
class _Need:
    """One model, alone, in one precision. ``least_gpus``: of the largest of these devices; None without GPUs."""

    model: str
    precision: str
    parts: dict[str, int]
    total: int
    shortfall: Shortfall | None
    least_gpus: int | None

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.shortfall is None


@dataclass(frozen=True)
class _Device:
    """A device with what it holds; the activations of models that are in memory together are added up."""

    name: str
    limit: int
    weights: int
    kv_cache: int
    activations: int
    reserved: int

    @property
    def held(self) -> int:
        """The sum of the parts."""
        return self.weights + self.kv_cache + self.activations + self.reserved

    @property
    def free(self) -> int:
        """What is left; negative if the device holds too much."""
        return self.limit - self.held


@dataclass(frozen=True)
class _Group:
    """Models that are in memory at the same time (``models``), or one after the other in equal shape (``or``).

    ``shortfalls``: one for each of the models that does not fit beside those before it.
    """

    models: tuple[str, ...]
    precision: str
    devices: tuple[_Device, ...]
    shortfalls: tuple[Shortfall, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not self.shortfalls

    @property
    def why_not(self) -> str:
        """What is missing, in words; empty if the models fit."""
        return "; ".join(map(str, self.shortfalls))

    @property
    def label(self) -> str:
        """Its models and their precision, in words."""
        return f"{' and '.join(self.models)} in {self.precision}"


@dataclass(frozen=True)
class _SpeedLimit:
    """The most tokens per second, of all sequences together, that the memory's bandwidth (bytes per second) allows."""

    model: str
    precision: str
    card: str
    bandwidth: float
    bytes_read: int
    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class _Repository:
    """A model's files: where they are, how large, how long reading them takes on this machine's disk."""

    model: str
    place: str
    stored_bytes: int
    download_bytes: int
    load_seconds: float | None


@dataclass(frozen=True)
class _Hour:
    """The estimated seconds of a notebook on cards of a kind, with a disk of this many bytes per second."""

    card: str
    disk: float
    seconds: float


@dataclass(frozen=True)
class _Hours:
    """What a notebook will take on the profile's GPUs, estimated.

    ``read_bytes`` and ``written_bytes`` are those of model files. ``unsaved_bytes`` would be read without saved copies,
    ``later_bytes`` are read by another run, which finds them.
    """

    notebook: str
    loads: int
    read_bytes: int
    written_bytes: int
    unsaved_bytes: int
    later_bytes: int
    times: tuple[_Hour, ...]


@dataclass(frozen=True)
class _Plan:
    """All that is planned for a profile, or for a model on GPUs.

    ``on_gpus``: False if all is in host memory. ``contexts``: the tokens of one sequence, each number that a model
    is planned for. ``questions``: the groups with ``QUESTIONS`` in place of ``work``; empty for a plan of no profile.
    ``budgets``: seconds by notebook ("expected", "budget", and "cell" for each cell). ``hours``: of the notebooks on
    the profile's GPUs; empty without GPUs.
    """

    title: str
    machine: str
    on_gpus: bool
    work: Workload
    contexts: tuple[int, ...]
    stand_ins: dict[str, str]
    needs: tuple[_Need, ...]
    groups: tuple[_Group, ...]
    speeds: tuple[_SpeedLimit, ...]
    repositories: tuple[_Repository, ...]
    downloaded_bytes: int
    disk_needed: int
    here: _Here
    remedies: tuple[str, ...]
    questions: tuple[_Group, ...] = ()
    budgets: dict[str, dict[str, float | None]] = field(default_factory=dict)
    article: tuple[dict[Hashable, Any], ...] = ()
    hours: tuple[_Hours, ...] = ()

    @property
    def download_bytes(self) -> int:
        """The sum of the distinct repositories."""
        return sum(repository.download_bytes for repository in self.repositories)

    @property
    def fits(self) -> bool:
        """Whether all models that are in memory at the same time fit on the devices."""
        return all(group.fits for group in self.groups)
