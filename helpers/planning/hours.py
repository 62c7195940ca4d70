"""Estimate how long notebooks take on a profile's GPUs, from the bytes they read and the tokens they process.

``runs.work`` reads what the notebooks declare. ``_estimate`` turns it into seconds for each card of the profile's size
and two speeds of the disk. Nothing here was measured on such a machine: each constant below says where it comes from,
or that it is assumed. The budgets in the profiles are three times the slowest estimate, in whole minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from helpers.machine import anatomy, memory
from helpers.machine.memory import Workload
from helpers.machine.placement import Devices, Resident, place_together
from helpers.models import finding
from helpers.models.references import ModelRef
from helpers.planning.plan import CARDS, DECIMAL, _Hour, _Hours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from helpers.models.references import Profile
    from helpers.planning.plan import _Card

Kind = Literal["load", "reply", "read", "train"]
_DISKS = (1e9, 3e9)  # bytes per second: a fast network disk, and one local NVMe disk
# Assumed: the share of a card's bandwidth and of its peak that plain transformers reaches, and Python's time for the
# kernels of one layer. With these, Falcon-180B in bf16 on A100s writes 2.3 tokens per second.
_OF_BANDWIDTH, _OF_PEAK, _LAYER_SECONDS = 0.5, 0.4, 1e-3
# A pass in int8 against one in bf16: bitsandbytes issue #490, eight A100s.
_INT8_TIMES_BF16 = 5
_FP32_SLOWER = 16  # A100: 19.5 TFLOPS in fp32, 312 in bf16 (data sheet); torch's default uses no TF32
_LOAD_SECONDS = 30.0  # assumed, of each load: building the model, its checks, moving the last weights to the GPUs


@dataclass(frozen=True)
class Work:
    """One thing that a notebook does ``count`` times with a model, in one precision.

    load: read its files. reply: write ``tokens`` tokens after a ``prompt`` of so many; read: read ``tokens`` tokens of
    a text; both ``together`` at once. train: a step over ``together`` rows of ``tokens`` tokens.
    """

    ref: ModelRef
    precision: str
    kind: Kind
    count: int
    tokens: int = 0
    prompt: int = 0
    together: int = 1


@dataclass(frozen=True)
class _Pace:
    """A pass of a model in a precision: the bytes it moves for one row and for several, and its work per token."""

    one_row_bytes: float
    rows_bytes: float
    flops_per_token: float
    layers: int

    def seconds(self, card: _Card, rows: int, tokens: int) -> float:
        """A pass over ``rows`` of ``tokens`` tokens each: the slower of moving bytes and computing, and Python."""
        moved = self.one_row_bytes if rows * tokens == 1 else self.rows_bytes
        moving = moved / (card.bandwidth * _OF_BANDWIDTH)
        computing = self.flops_per_token * rows * tokens / (card.flops * _OF_PEAK)
        # Layers work one after the other, device by device: one card's bandwidth and peak count.
        return max(moving, computing) + self.layers * _LAYER_SECONDS


def _estimate(profile: Profile, works: Mapping[str, Sequence[Work]], other: Mapping[str, float]) -> tuple[_Hours, ...]:
    """The hours of notebooks, in their order, which matters: a copy saved by one is read by those after it.

    ``other``: seconds of each notebook that do not depend on the profile's models, as measured on a laptop. Work in a
    precision in which a model does not fit is left out, as the notebooks leave it out.
    """
    cards = [card for card in CARDS if card.gigabytes == round(profile.requires.gpu_bytes / DECIMAL)]
    saved: set[tuple[str, str]] = set()
    hours = []
    for name, declared in works.items():
        entries = [work for work in declared if _fits(work, profile)]
        files = _Files.of(entries, saved)
        times = []
        for card in cards:
            passes = sum(_work_seconds(work, card) for work in entries)
            for disk in _DISKS:
                seconds = (
                    other.get(name, 0) + files.loads * _LOAD_SECONDS + (files.read + files.written) / disk + passes
                )
                times.append(_Hour(card.name, disk, seconds))
        hours.append(_Hours(name, files.loads, files.read, files.written, files.unsaved, files.later, tuple(times)))
    return tuple(hours)


@dataclass(frozen=True)
class _Files:
    """Bytes that the loads of a notebook read and write.

    ``unsaved``: those read if no copy were saved; ``later``: by another run, which finds all copies.
    """

    loads: int
    read: int
    written: int
    unsaved: int
    later: int

    @classmethod
    def of(cls, entries: Sequence[Work], saved: set[tuple[str, str]]) -> _Files:
        """Count them; ``saved`` are the copies that there are, and gains those that are saved now."""
        loads = read = written = unsaved = later = 0
        for work in entries:
            if work.kind == "load":
                more_read, more_written = _load_bytes(work, saved)
                loads, unsaved = loads + work.count, unsaved + work.count * _file_bytes(work.ref)
                read, written = read + more_read, written + more_written
                # By now each copy is there.
                later += _load_bytes(work, saved)[0]
        return cls(loads, read, written, unsaved, later)


def _fits(work: Work, profile: Profile) -> bool:
    """Whether a model fits on the profile's GPUs in a precision, with one sequence of 2048 tokens."""
    need = profile.requires
    devices = Devices((need.gpu_bytes,) * need.gpus)
    resident = Resident(finding.config(work.ref), work.precision, work.ref.name)
    (placement,) = place_together([resident], devices, Workload())
    return placement.fits


def _load_bytes(work: Work, saved: set[tuple[str, str]]) -> tuple[int, int]:
    """Bytes read and written by loads, of which the first may save a quantized copy that the others read."""
    published, key = _file_bytes(work.ref), (work.ref.id, work.precision)
    if work.precision not in work.ref.keep:
        return work.count * published, 0
    copy = memory.weight_bytes(finding.config(work.ref), work.precision)
    if key in saved:
        return work.count * copy, 0
    saved.add(key)
    return published + (work.count - 1) * copy, copy


def _file_bytes(ref: ModelRef) -> int:
    return ref.download_bytes or 0


def _work_seconds(work: Work, card: _Card) -> float:
    """The passes of one entry on a card."""
    if work.kind == "load" or not work.count:
        return 0.0
    pace = _pace(work.ref, work.precision)
    together = min(work.together, work.count)
    if work.kind == "train":
        # Forward, the same again for the gradients' sake (checkpointing), backward: none for the frozen weights.
        return work.count * 3 * pace.seconds(card, work.together, work.tokens)
    batches = math.ceil(work.count / together)
    if work.kind == "read":
        return batches * pace.seconds(card, together, work.tokens)
    prefill = pace.seconds(card, together, max(1, work.prompt))
    return batches * (prefill + max(0, work.tokens - 1) * pace.seconds(card, together, 1))


@cache
def _pace(ref: ModelRef, precision: str) -> _Pace:
    config = finding.config(ref)
    stored = memory.weight_bytes(config, precision)
    bf16 = memory.weight_bytes(config, "bf16")
    shape = anatomy.anatomy(config)
    one = several = float(stored)
    if precision == "int8":
        one = several = float(_INT8_TIMES_BF16 * bf16)
    if precision == "nf4":
        # bitsandbytes multiplies one row with the 4-bit weights; for more it writes them in 16 bits and reads these.
        several = float(stored + 2 * bf16)
    flops = 2.0 * anatomy.count_parameters(config)
    if precision == "fp32":
        flops *= _FP32_SLOWER
    return _Pace(one, several, flops, shape.layers)
