"""One model in several precisions in memory: which of them fit, and which fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.machine import hardware
from helpers.machine.memory import Workload
from helpers.machine.placement import Devices, Resident, place_together, shortfall
from helpers.models.finding import config
from helpers.models.loading import load, unload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PretrainedConfig

    from helpers.machine.hardware import Machine
    from helpers.models.loaded import Loaded
    from helpers.models.references import ModelRef


def _residents(ref: ModelRef, precisions: Sequence[str]) -> Iterator[dict[str, Loaded]]:
    """A model in each precision that fits here: all at once if they fit together, else one after the other.

    What was handed out is unloaded before the next is loaded, and at the end. Raises LoadError as ``load``.
    """
    machine = hardware.detect()
    missing = _shortfalls(ref, precisions, machine)
    fitting = [precision for precision in precisions if precision not in missing]
    groups = [[precision] for precision in fitting]
    if fitting and _fit_together(config(ref), fitting, machine):
        groups = [fitting]
    for group in groups:
        loaded = {precision: load(ref, precision) for precision in group}
        try:
            yield loaded
        finally:
            for model in loaded.values():
                unload(model)


def _shortfalls(ref: ModelRef, precisions: Sequence[str], machine: Machine | None = None) -> dict[str, str]:
    """The precisions in which a model does not fit on a machine (this one, unless given), and what it needs."""
    shape = config(ref)
    machine = machine or hardware.detect()
    needs: dict[str, str] = {}
    for precision in precisions:
        if missing := shortfall(shape, precision, machine):
            needs[precision] = str(missing)
    return needs


def _fit_together(config: PretrainedConfig, precisions: Sequence[str], machine: Machine) -> bool:
    """Whether a model fits in all these precisions at once, each with one sequence of 2048 tokens."""
    residents = [Resident(config, precision) for precision in precisions]
    placements = place_together(residents, Devices.free(machine), Workload())
    return all(placement.fits for placement in placements)
