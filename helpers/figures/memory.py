"""Draw sizes: parameters, memory by precision and by device, the cache, training compute.

Sizes come in bytes; the axes show GiB, or MiB if all sizes of a figure are small.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from helpers.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    PURPLE,
    RED,
    _canvas,
    _legend_on_top,
    _limit_line,
    _number,
    _short,
    _space_for_bars,
    _styled,
    _unit_for,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from helpers.machine.memory import MemoryEstimate
    from helpers.machine.placement import Placement

_PART_COLOURS = {
    "weights": BLUE,
    "kv_cache": ORANGE,
    "activations": GREEN,
    "gradients": PURPLE,
    "optimizer": RED,
    "reserved": GREY,
}
_FREE = "#E4E4E4"


@_styled
def parameter_breakdown(table: DataFrame | Mapping[str, Mapping[str, float]], subject: str) -> Figure:
    """Where the parameters sit: one bar per part, largest first, with its count and its share of the whole.

    ``table`` is ``machine.parameter_table``'s, or any that maps "parameters" to a count for each part.
    """
    counts = dict(table["parameters"])
    total = sum(counts.values())
    parts, shares, labels = [], [], []
    for part, count in sorted(counts.items(), key=lambda item: item[1], reverse=True):
        if count:
            parts.append(part)
            shares.append(count / total * 100)
            labels.append(f"{_count(count)} ({_share(count / total)})")
    figure, (axis,) = _canvas(f"Where the {_count(total)} parameters sit", subject, 1.4 + 0.42 * len(parts))
    bars = axis.barh(parts, shares, color=BLUE)
    axis.bar_label(bars, labels, padding=4)
    # A quarter more than the longest bar leaves space for its label.
    axis.set(xlabel="share of all parameters (%)", xlim=(0, 1.25 * shares[0]))
    axis.invert_yaxis()
    axis.grid(axis="x")
    return figure


def _count(amount: float) -> str:
    for scale, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if amount >= scale:
            return f"{amount / scale:.1f}{letter}"
    return f"{amount:.0f}"


def _share(share: float) -> str:
    if 0 < share < 0.001:
        return "under 0.1%"
    if share >= 0.1:
        return f"{share:.0%}"
    return f"{share:.1%}"


@_styled
def memory_by_precision(estimates: Sequence[MemoryEstimate], machines: Mapping[str, float], subject: str) -> Figure:
    """Memory by precision, stacked by part, with a line for what each machine has (name -> bytes)."""
    totals = [estimate.total for estimate in estimates]
    unit, scale = _unit_for(max(totals))
    modes, names, stacks = [], [], []
    for estimate in estimates:
        names.append(estimate.precision)
        stacks.append(_scaled(estimate.parts, scale))
        if estimate.mode not in modes:
            modes.append(estimate.mode)
    figure, (axis,) = _canvas(f"Memory by precision, {' and '.join(modes)}", subject, 4.6)
    _stack(axis, names, stacks)
    for name, size in machines.items():
        _limit_line(axis, size / scale, f"{name}\n{_short(size / scale)} {unit}")
    axis.set(ylabel=f"memory ({unit})", ylim=(0, 1.1 * max(*totals, *machines.values(), 0) / scale))
    _space_for_bars(axis, len(estimates))
    _legend_on_top(axis)
    return figure


def part_name(part: str) -> str:
    """The name of a part of a MemoryEstimate for people: kv_cache -> KV cache."""
    return part.replace("kv_", "KV ").replace("_", " ")


def _scaled(parts: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: size / scale for name, size in parts.items()}


def _stack(axis: Axes, names: Sequence[str], stacks: Sequence[Mapping[str, float]], totals: bool = True) -> None:
    """One stacked bar per name; parts that are zero everywhere are left out; the total is on top if ``totals``."""
    import numpy as np

    base = np.zeros(len(names))
    for part in stacks[0]:
        heights = np.array([stack[part] for stack in stacks])
        if heights.any():
            colour = _PART_COLOURS.get(part, GREY)
            bars = axis.bar(names, heights, bottom=base, width=0.6, color=colour, label=part_name(part))
            base = base + heights
    if totals:
        # The labels of the topmost bars stand at the height of the whole stack.
        axis.bar_label(bars, list(map(_short, base)), padding=3)


@_styled
def placement(placed: Placement, capacities: Mapping[int | str, float], subject: str) -> Figure:
    """What each device holds and what stays free; ``capacities`` gives the bytes of each device."""
    devices = list(capacities)
    unit, scale = _unit_for(max(capacities.values()))
    sizes, needed, held = [], [], []
    for device, capacity in capacities.items():
        size, need = capacity / scale, placed.per_device_bytes.get(device, 0) / scale
        sizes.append(size)
        needed.append(need)
        held.append(min(size, need))
    verdict = "fits" if placed.fits else "does not fit"
    figure, (axis,) = _canvas(f"Placement over {len(devices)} devices: {verdict}", subject, 4.4)
    axis.bar(_device_names(devices, needed), held, width=0.6, color=BLUE, label="used")
    _remainder(axis, held, sizes, color=_FREE, label="free")
    _remainder(axis, sizes, needed, color=RED, label="too much")
    for size in sorted(set(sizes)):
        _limit_line(axis, size, f"{_short(size)} {unit}\nper device")
    axis.set(ylabel=f"memory ({unit})", ylim=(0, 1.08 * max(sizes + needed)))
    _space_for_bars(axis, len(devices))
    _legend_on_top(axis)
    return figure


def _device_names(devices: Sequence[int | str], needed: Sequence[float]) -> list[str]:
    """Labels such as "GPU 0" with what it holds below; the bare number if there are too many devices for more."""
    if len(devices) > 8:
        return list(map(str, devices))
    names = []
    for device, size in zip(devices, needed, strict=True):
        name = f"GPU {device}" if isinstance(device, int) else device
        names.append(f"{name}\n{_short(size)}")
    return names


def _remainder(axis: Axes, low: Sequence[float], high: Sequence[float], color: str, label: str) -> None:
    """Bars from ``low`` up to ``high`` where that is higher."""
    import numpy as np

    heights = np.maximum(np.subtract(high, low), 0)
    # Bars of no height would still appear in the legend.
    if heights.any():
        axis.bar(range(len(low)), heights, bottom=low, width=0.6, color=color, label=label)


@_styled
def memory_per_device(panels: Mapping[str, Sequence[Mapping[str, str | float]]], subject: str, *, fits: bool) -> Figure:
    """What each device holds by part, against its limit: a panel for each set of models in memory together.

    The rows of a panel (its title -> rows) hold ``name`` and, in bytes, ``limit`` and the parts to be stacked.
    """
    verdict = "fits" if fits else "does not fit"
    what = f"Memory of each device: {verdict}"
    figure, axes = _canvas(what, subject, 1.3 + 3.1 * len(panels), len(panels), stacked=True)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _device_panel(axis, title, rows)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _device_panel(axis: Axes, title: str, rows: Sequence[Mapping[str, str | float]]) -> None:
    import numpy as np

    sizes = [_number(row, "limit") or 0.0 for row in rows]
    unit, scale = _unit_for(max(sizes))
    few = len(rows) <= 8
    names, stacks, limits, tallest = [], [], [], max(sizes) / scale
    for row, size in zip(rows, sizes, strict=True):
        name = str(row["name"])
        # More names, and more totals, than these do not fit beside each other.
        names.append(name if few else name.rsplit(maxsplit=1)[-1])
        parts = {part: _number(row, part) or 0.0 for part in _PART_COLOURS if part in row}
        stacks.append(_scaled(parts, scale))
        tallest = max(tallest, sum(parts.values()) / scale)
        limits.append(size / scale)
    _stack(axis, names, stacks, totals=len(rows) <= 16)
    places = np.arange(len(rows))
    axis.hlines(limits, places - 0.4, places + 0.4, BLACK, "dashed")
    axis.set(ylabel=f"memory ({unit})", xlabel="" if few else "GPU", ylim=(0, 1.15 * tallest))
    known = " and ".join(map(_short, dict.fromkeys(limits)))
    axis.set_title(textwrap.fill(f"{title}; limit (dashed): {known} {unit}", 84), loc="left")
    _space_for_bars(axis, len(rows))


@_styled
def cache_growth(bytes_per_token: Mapping[str, int], max_tokens: int, subject: str) -> Figure:
    """The KV cache of one sequence as its context grows, one line per kind of cache (name -> bytes per token)."""
    figure, (axis,) = _canvas("KV cache of one sequence as its context grows", subject, 4.2)
    unit, scale = _unit_for(max(bytes_per_token.values()) * max_tokens)
    for colour, (name, size) in zip(PALETTE, bytes_per_token.items(), strict=False):
        end = size * max_tokens / scale
        axis.plot([0, max_tokens], [0, end], color=colour, linewidth=2.5)
        text = f"{name}\n{_short(end)} {unit}"
        axis.annotate(text, (max_tokens, end), (6, 0), textcoords="offset points", va="center")
    axis.set(xlabel="context (tokens)", ylabel=f"KV cache ({unit})", xlim=(0, max_tokens))
    axis.set_ylim(bottom=0)
    axis.grid()
    return figure


@_styled
def training_compute(flop: Mapping[str, float]) -> Figure:
    """Training compute by model (name -> FLOP, by 6 x parameters x tokens), also as a multiple of the smallest."""
    names, least = list(flop), min(flop.values())
    exponent = math.floor(math.log10(max(flop.values())))
    figure, (axis,) = _canvas("Training compute: 6 × parameters × tokens", ", ".join(names), 1.6 + 0.5 * len(names))
    values, labels = [], []
    for amount in flop.values():
        values.append(amount / 10**exponent)
        labels.append(f"{values[-1]:.2f} ({amount / least:.1f}×)")
    bars = axis.barh(names, values, color=BLUE)
    axis.bar_label(bars, labels, padding=4)
    # Formulas are switched off in this look, so the exponent is written in raised digits.
    power = str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    axis.set(xlabel=f"training compute (10{power} FLOP)", xlim=(0, 1.25 * max(values)))
    axis.invert_yaxis()
    return figure
