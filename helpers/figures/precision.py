"""Draw what a precision costs in size, speed and quality, and how nf4 works: the figures of notebook 02."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, TypedDict

from helpers.figures.style import (
    BLACK,
    BLUE,
    ORANGE,
    PALETTE,
    RED,
    _canvas,
    _logarithmic,
    _number,
    _records,
    _short,
    _styled,
    _unit_for,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from pandas import DataFrame

    from helpers.base.stats import Interval
    from helpers.figures.style import Cell
    from helpers.models.quantization import LayerError


class _Cost(TypedDict):
    """What a precision costs: its share of bf16's bytes (0 to 1 and more) and the change of the loss, bits per byte."""

    precision: str
    share: float
    change: Interval


@_styled
def precision_comparison(rows: DataFrame | Sequence[Mapping[str, Cell]], subject: str) -> Figure:
    """Stored size, speed and perplexity by precision.

    Rows (mappings or a DataFrame) hold ``precision``, ``stored_bytes``, ``tokens_per_second`` and ``perplexity``; a
    row that could not run holds None there and says why in ``missing`` ("12 GiB missing"), which is shown in its place.
    """
    table = _records(rows)
    unit, scale = _unit_for(max([_number(row, "stored_bytes") or 0 for row in table], default=0))
    panels = [
        (f"stored weights ({unit})", "stored_bytes", scale),
        ("speed (tokens/s)", "tokens_per_second", 1),
        ("perplexity (lower is better)", "perplexity", 1),
    ]
    figure, axes = _canvas("Size, speed and quality by precision", subject, 4.0, len(panels))
    for axis, (title, column, divisor) in zip(axes, panels, strict=True):
        values = []
        for row in table:
            value = _number(row, column)
            values.append(None if value is None else value / divisor)
        _bars_with_gaps(axis, table, values)
        axis.set_title(title, loc="left")
    return figure


def _bars_with_gaps(axis: Axes, rows: Sequence[Mapping[str, Cell]], values: Sequence[float | None]) -> None:
    """One bar per precision; a missing value shows its reason where the bar would stand."""
    names, heights, labels = [], [], []
    for row, value in zip(rows, values, strict=True):
        names.append(str(row["precision"]))
        heights.append(value or 0)
        labels.append("" if value is None else _short(value))
    bars = axis.bar(names, heights, width=0.65, color=BLUE)
    axis.bar_label(bars, labels, padding=3, fontsize=10)
    # Without any value, the empty axis runs to 1.
    axis.set_ylim(0, 1.15 * (max(heights, default=0) or 1.0))
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            reason = textwrap.fill(str(row.get("missing") or "not measured"), 24)
            # Upright and measured in shares of the panel's height: the bars' scale does not matter to it.
            axis.annotate(
                reason, (place, 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="center", color="#666666"
            )


@_styled
def logit_differences(differences: Mapping[str, float], subject: str, against: str = "bf16") -> Figure:
    """How far the logits of each variant are from those of ``against``: a bar at exactly zero changed nothing."""
    names, values = list(differences), list(differences.values())
    figure, (axis,) = _canvas(f"Mean distance of the logits from {against}'s", subject, 1.5 + 0.5 * len(names))
    bars = axis.barh(names, values, color=BLUE)
    for label, value in zip(axis.bar_label(bars, fmt="{:.3g}", padding=4), values, strict=True):
        label.set_color(BLACK)
        if value == 0:
            label.set_text("exactly 0: nothing was changed")
            label.set_color(RED)
    # An axis from 0 to 0 is an error, which happens if nothing at all was changed.
    axis.set(xlabel="mean absolute difference of the logits", xlim=(0, 1.2 * max(values) or 1))
    axis.invert_yaxis()
    return figure


@_styled
def nf4_code(code: Sequence[float], scaled: ArrayLike, subject: str, tail: float) -> Figure:
    """The 16 values of nf4 on the normal density they are quantiles of, over real weights.

    ``scaled`` holds these weights divided by their block's largest (-1 to 1); ``tail`` is the probability below the
    largest value.
    """
    import numpy as np
    from scipy.stats import norm

    figure, (axis,) = _canvas("The 16 values of nf4, and the weights they stand for", subject, 4.4)
    axis.hist(np.ravel(scaled), bins=101, range=(-1, 1), density=True, color="#CFE3F1", label="weights / largest of 64")
    # The code is scaled so that its largest value, the quantile of the tail, is 1: the density is scaled alike.
    places, deviation = np.linspace(-1.25, 1.25, 400), 1 / norm.ppf(tail)
    density = norm(scale=deviation)
    axis.plot(places, density.pdf(places), color=BLACK, linewidth=1.2, label="normal density")
    axis.vlines(code, 0, density.pdf(code), color=ORANGE, linewidth=2, label="nf4 values")
    for index, value in enumerate(code):
        # Neighbouring labels alternate between two heights, because those near zero would overlap.
        axis.annotate(f"{value:.2f}", (value, -0.03 - 0.07 * (index % 2)), ha="center", va="top", fontsize=8)
    axis.set(xlabel="weight, divided by the largest magnitude of its block", ylabel="density", xlim=(-1.25, 1.25))
    axis.set_ylim(-0.17, None)
    ticks = axis.get_yticks()
    axis.set_yticks(ticks[ticks >= 0])
    axis.legend(loc="upper right")
    return figure


@_styled
def layer_errors(errors: Mapping[str, Sequence[LayerError]], subject: str) -> Figure:
    """The error of each matrix by precision, of its weights and of its output: grouped by kind, layer after layer.

    ``errors`` maps a precision to ``quantization.layer_errors``' rows. An error of exactly zero has no place on the
    logarithmic scale and is left out.
    """
    figure, axes = _canvas("Relative error of each matrix, alone", subject, 6.2, 2, share_x=True, stacked=True)
    weights, outputs = {}, {}
    for precision, rows in errors.items():
        # sorted is stable: within a kind the layers keep their order.
        in_order = sorted(rows, key=_kind)
        weights[precision] = [row.weight for row in in_order]
        outputs[precision] = [row.output for row in in_order]
    # Every precision has the same matrices, so the last one tells how many there are of each kind.
    starts, centres, names = [0], [], []
    for kind, count in Counter(map(_kind, in_order)).items():
        centres.append(starts[-1] + (count - 1) / 2)
        names.append(f"{kind}\n{count} layers")
        starts.append(starts[-1] + count)
    _error_panel(axes[0], "weights", weights, starts)
    _error_panel(axes[1], "output, for a real text", outputs, starts)
    axes[1].set_xticks(centres, names, fontsize=9)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(errors))
    return figure


def _error_panel(axis: Axes, title: str, errors: Mapping[str, Sequence[float]], starts: Sequence[int]) -> None:
    """Lines of the errors by precision; ``starts`` are the borders between the kinds of matrices."""
    for index, (precision, values) in enumerate(errors.items()):
        colour, marker = PALETTE[index], "osD^"[index % 4]
        for begin, end in itertools.pairwise(starts):
            # One line per kind, so that no line leads from one kind to the next; the legend names the first alone.
            label = precision if begin == 0 and any(values) else None
            places = [place for place in range(begin, end) if values[place]]
            heights = [values[place] for place in places]
            axis.plot(places, heights, color=colour, marker=marker, markersize=4, label=label)
    axis.set(ylabel="relative error")
    _logarithmic(axis)
    axis.set_title(title, loc="left")
    axis.grid(axis="y")
    for border in starts[1:-1]:
        axis.axvline(border - 0.5, color="#BBBBBB", linewidth=1)


def _kind(row: LayerError) -> str:
    """The matrix's name without the number of its layer: ``transformer.h.3.mlp.dense_h_to_4h`` -> dense_h_to_4h."""
    return row.layer.rpartition(".")[-1]


@_styled
def quality_against_bytes(sides: Mapping[str, Sequence[_Cost]], subject: str, margin: float) -> Figure:
    """What each precision costs in quality (against bf16, with its interval) against what it leaves of bf16's bytes.

    ``sides`` maps a model's label to rows with ``precision``, ``share`` (of bf16's bytes, 0 to 1 and more) and
    ``change``, an Interval of the change of the loss in bits per byte. Up to ``margin`` is what "almost no difference"
    means here; it stands as the published claim.
    """
    figure, (axis,) = _canvas("Quality against bytes", subject, 4.8)
    axis.axhspan(-margin, margin, color="#E5F3EC", label=f"published: “almost no difference” (here ±{margin:g})")
    axis.axhline(0, color="#888888", linewidth=1)
    for index, (label, rows) in enumerate(sides.items()):
        _costs(axis, index, label, rows)
    largest = max((row["share"] for row in itertools.chain(*sides.values())), default=1)
    axis.set(xlabel="bytes of the stored weights (% of bf16's)", ylabel="change of the loss (bits per byte)")
    axis.set_xlim(0, 115 * largest)
    axis.margins(y=0.15)
    axis.grid()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def _costs(axis: Axes, index: int, label: str, rows: Sequence[_Cost]) -> None:
    """The points of one model, with their intervals; ``index`` chooses marker and colour."""
    shares, changes, below, above = [], [], [], []
    for row in rows:
        change = row["change"]
        shares.append(100 * row["share"])
        changes.append(change.estimate)
        below.append(abs(change.estimate - change.low))
        above.append(abs(change.estimate - change.high))
    marker, colour = "osD^v"[index % 5], PALETTE[index % len(PALETTE)]
    axis.errorbar(shares, changes, yerr=[below, above], label=label, fmt=marker, color=colour, capsize=4)
    # The two models' points of one precision often coincide: their names go to different sides.
    offset, align = (7, 5), "left"
    if index % 2 == 0:
        offset, align = (-7, 5), "right"
    for share, value, row in zip(shares, changes, rows, strict=True):
        axis.annotate(
            row["precision"],
            (share, value),
            xytext=offset,
            ha=align,
            textcoords="offset points",
            fontsize=10,
            color=colour,
        )
