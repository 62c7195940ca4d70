"""The memory planner: sliders over the memory that a published model needs, and how it lies on GPUs.

Every number is one of ``machine``'s: this module only shows what ``estimate``, ``place`` and ``shard`` return.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB
from helpers.figures.memory import memory_by_precision, part_name, placement
from helpers.figures.style import png
from helpers.machine.memory import MemoryEstimate
from helpers.machine.placement import Placement
from helpers.panels.html import _counted, _Html, _render, _show, _Views
from helpers.panels.widgets import _error_html, _Panel

if TYPE_CHECKING:
    from ipywidgets import ValueWidget
    from matplotlib.figure import Figure

_PRECISIONS = ("fp32", "bf16", "int8", "nf4")


@dataclass(frozen=True)
class _Setup:
    """What the memory planner plans for; by default what the article names for Falcon-180B in bf16 (A16).

    ``batch_size`` counts the sequences on all GPUs together; ``gpu_gb`` is a GPU's size as sold (80 GB: 80e9 bytes).
    """

    model: str = "tiiuae/falcon-180B"
    precision: str = "bf16"
    mode: str = "inference"
    batch_size: int = 1
    context_tokens: int = 2048
    gpu_gb: int = 80
    gpu_count: int = 8


@dataclass(frozen=True)
class _Plan:
    """What a setup needs, and how that lies on its GPUs."""

    setup: _Setup
    estimate: MemoryEstimate
    placed: Placement


def memory_planner(setup: _Setup = _Setup()) -> _MemoryPlanner | _Views:
    """Sliders over ``machine.estimate`` and ``machine.place``; unattended, the table and the figures of ``setup``."""
    return _show(lambda: _MemoryPlanner(setup), lambda: _plan_views(setup))


def _plan_views(setup: _Setup) -> _Views:
    planned = _plan(setup)
    return _Views([_plan_html(planned), *_plan_figures(planned)])


def _plan(setup: _Setup) -> _Plan:
    """The estimate and the placement for a setup. Raises WorkbookError if precision and mode do not go together.

    Inference places whole layers (``machine.place``), training is spread evenly (``machine.shard``).
    """
    from helpers.machine import anatomy, memory, sharding
    from helpers.machine import placement as machine_placement

    estimate = _estimate(setup)
    config = anatomy.published_config(setup.model)
    workload = memory.Workload(setup.batch_size, setup.context_tokens)
    gpus = [setup.gpu_gb * 1e9] * setup.gpu_count
    if setup.mode == "inference":
        placed = machine_placement.place(config, setup.precision, gpus, workload=workload)
    else:
        placed = sharding.shard(config, setup.precision, gpus, mode=setup.mode, workload=workload)
    return _Plan(setup, estimate, placed)


def _estimate(setup: _Setup) -> MemoryEstimate:
    from helpers.machine import anatomy, memory

    config = anatomy.published_config(setup.model)
    workload = memory.Workload(setup.batch_size, setup.context_tokens)
    return memory.estimate(config, setup.precision, mode=setup.mode, workload=workload)


def _plan_html(planned: _Plan) -> _Html:
    """What is planned, the parts in GiB, their sum, and whether that fits."""
    rows = []
    for name, size in planned.estimate.parts.items():
        if size:
            rows.append((part_name(name), _gib(size)))
    rows.append(("sum", _gib(planned.estimate.total)))
    title, verdict = _setup_text(planned.setup), _verdict_text(planned)
    return _render("plan.j2", title=title, rows=rows, verdict=verdict, fits=planned.placed.fits)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _setup_text(setup: _Setup) -> str:
    """What a setup plans for, in words."""
    sequences = _counted(setup.batch_size, "sequence", "sequences")
    return f"{setup.model}, {setup.mode} in {setup.precision}, {sequences} of {setup.context_tokens} tokens"


def _verdict_text(planned: _Plan) -> str:
    """Whether a plan fits, as a sentence."""
    setup, placed = planned.setup, planned.placed
    gpus = f"{_counted(setup.gpu_count, 'GPU', 'GPUs')} of {setup.gpu_gb} GB"
    if placed.shortfall:
        return f"Does not fit on {gpus}: it {placed.shortfall}."
    held, size = max(placed.per_device_bytes.values()), setup.gpu_gb * 1e9
    fullest = f"the fullest holds {held / GIB:.1f} of {size / GIB:.1f} GiB"
    how = "in whole layers" if setup.mode == "inference" else "spread evenly (ZeRO-3)"
    return f"Fits on {gpus}, {how}: {fullest}."


def _plan_figures(planned: _Plan) -> list[Figure]:
    """The memory of every precision that goes with the mode, and the load of each GPU."""
    setup = planned.setup
    size = setup.gpu_gb * 1e9
    machine = {f"{setup.gpu_count}x {setup.gpu_gb} GB": size * setup.gpu_count}
    return [
        memory_by_precision(_estimates(setup), machine, setup.model),
        placement(planned.placed, dict.fromkeys(range(setup.gpu_count), size), setup.model),
    ]


def _estimates(setup: _Setup) -> list[MemoryEstimate]:
    """The memory in every precision that goes with the mode."""
    estimates = []
    for precision in _PRECISIONS:
        # Some precisions do not go with some modes: nf4 not with full training.
        with suppress(WorkbookError):
            estimates.append(_estimate(replace(setup, precision=precision)))
    return estimates


class _MemoryPlanner(_Panel):
    """Memory of a published model, part by part, as its controls say; ``controls`` has one for each of its settings."""

    def __init__(self, setup: _Setup) -> None:
        import ipywidgets as w

        self.controls = _planner_controls(setup)
        self.table = w.HTML()
        self.pictures = [w.Image(format="png", layout={"width": "520px", "margin": "4px"}) for _ in range(2)]
        self.figures = w.HBox(self.pictures, layout={"flex_flow": "row wrap"})
        settings = w.VBox(list(self.controls.values()))
        top = w.HBox([settings, self.table], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        self.box = w.VBox([top, self.figures])
        for control in self.controls.values():
            control.observe(lambda _: self.update(), "value")
        self.update()

    @property
    def setup(self) -> _Setup:
        """The setup that the controls show."""
        return _Setup(**{name: control.value for name, control in self.controls.items()})

    def update(self) -> None:
        """Show the plan for the controls' setup, or why there is none."""
        try:
            planned = _plan(self.setup)
        except WorkbookError as error:
            self.table.value = _error_html(error)
            self.figures.layout.display = "none"
            return
        self.table.value = _plan_html(planned)
        for picture, figure in zip(self.pictures, _plan_figures(planned), strict=True):
            picture.value = png(figure)
        self.figures.layout.display = "flex"


def _planner_controls(setup: _Setup) -> dict[str, ValueWidget]:
    """One control for each field of ``_Setup``."""
    import ipywidgets as w

    from helpers.machine.anatomy import published_models
    from helpers.machine.memory import MODES

    contexts = sorted({setup.context_tokens, *(2**power for power in range(7, 14))})
    sizes = [(f"{size} GB", size) for size in sorted({setup.gpu_gb, 16, 24, 40, 48, 80, 141})]
    slider = partial(w.IntSlider, min=1, max=64, continuous_update=False)
    controls: dict[str, ValueWidget] = {
        "model": w.Dropdown(options=published_models(), value=setup.model, description="Model"),
        "precision": w.Dropdown(options=_PRECISIONS, value=setup.precision, description="Precision"),
        "mode": w.Dropdown(options=MODES, value=setup.mode, description="Work"),
        "batch_size": slider(setup.batch_size, description="Sequences"),
        "context_tokens": w.SelectionSlider(
            options=contexts,
            value=setup.context_tokens,
            description="Context (tokens)",
            continuous_update=False,
        ),
        "gpu_gb": w.Dropdown(options=sizes, value=setup.gpu_gb, description="GPU memory"),
        "gpu_count": slider(setup.gpu_count, description="GPUs"),
    }
    for control in controls.values():
        control.style.description_width = "110px"
        control.layout.width = "380px"
    return controls
