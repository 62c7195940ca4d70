"""Draw how fast models read and write: by kind of cache, by precision, by engine."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Protocol

from helpers.figures.style import BLUE, GREY, ORANGE, PALETTE, _canvas, _logarithmic, _new_figure, _styled, _unit_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BANDWIDTH_LIMIT = "limit by the memory's bandwidth"


# Figures lie below the modules that measure, so what they draw is described here by the fields that are read.
class _Spread(Protocol):
    @property
    def median(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class _CacheRow(Protocol):
    @property
    def cache(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def seconds(self) -> _Spread: ...
    @property
    def tokens_per_second(self) -> float: ...


class _SpeedRow(Protocol):
    @property
    def precision(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def decode(self) -> _Spread | None: ...
    @property
    def limit(self) -> float: ...
    @property
    def missing(self) -> str: ...


class _EngineRow(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def decode(self) -> _Spread | None: ...
    @property
    def limit(self) -> float: ...


@_styled
def cache_speed(rows: Sequence[_CacheRow], subject: str) -> Figure:
    """Decoding speed by context, a panel for each batch size, a line for each kind of cache (see ``speed.caches``)."""
    sizes = _batch_sizes(rows)
    figure, axes = _canvas("Decoding speed as the context grows", subject, 4.2, len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        of_size = [row for row in rows if row.batch_size == size]
        _cache_line(axis, of_size, "grouped", "key-value heads alone", BLUE)
        _cache_line(axis, of_size, "library", "copied to all query heads", ORANGE)
        axis.set_title(f"batch size {size}", loc="left", fontsize=10)
        axis.set(xlabel="context (tokens)")
        axis.set_ylim(bottom=0)
        axis.grid()
    axes[0].set_ylabel("written tokens/s, whole batch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="the cache holds")
    return figure


def _batch_sizes(rows: Sequence[_CacheRow] | Sequence[_SpeedRow] | Sequence[_EngineRow]) -> list[int]:
    """The batch sizes in the order in which they occur."""
    return list(dict.fromkeys(row.batch_size for row in rows))


def _cache_line(axis: Axes, rows: Sequence[_CacheRow], kind: str, name: str, colour: str) -> None:
    """The speed of one kind of cache, by context."""
    contexts, speeds, below, above = [], [], [], []
    for row in rows:
        if row.cache != kind:
            continue
        speed = row.tokens_per_second
        contexts.append(row.context_tokens)
        speeds.append(speed)
        # The longest time is the lowest speed.
        below.append(speed - row.batch_size / row.seconds.high)
        above.append(row.batch_size / row.seconds.low - speed)
    axis.errorbar(contexts, speeds, yerr=[below, above], fmt="o-", color=colour, capsize=4, linewidth=2, label=name)


@_styled
def speed_against_bytes(rows: Sequence[_SpeedRow], subject: str, *, interleaved: bool) -> Figure:
    """Decoding speed by stored bytes, a panel for each batch size, with the limit that the memory's bandwidth sets.

    ``rows`` are those of ``speed.measure`` for one model; bars run from the slowest to the fastest run. The published
    claim, that 8 bits are much faster than 4, stands over the panels with what was measured.
    """
    sizes = _batch_sizes(rows)
    order = "taken in turn" if interleaved else "one precision after the other"
    what = f"Speed against bytes: {rows[0].repeats} runs each, {order}"
    figure, axes = _canvas(what, subject, 4.6, len(sizes))
    unit, scale = _unit_for(max(row.stored_bytes for row in rows))
    for axis, size in zip(axes, sizes, strict=True):
        of_size = [row for row in rows if row.batch_size == size]
        farthest = _speed_points(axis, of_size, scale)
        axis.set_title(_speed_title(size, of_size), loc="left", fontsize=10)
        axis.set(xlabel=f"stored weights ({unit})", xlim=(0, 1.45 * farthest))
        _logarithmic(axis)
        axis.grid(axis="y")
    axes[0].set_ylabel("written tokens/s, whole batch")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        title="published: 8-bit is “much faster” than 4-bit (int8 / nf4 well above 1)",
    )
    return figure


def _speed_points(axis: Axes, rows: Sequence[_SpeedRow], scale: int) -> float:
    """Draw the rows that have a speed, and the limit over them; returns the place of the largest, or 1."""
    ends = []
    for row in rows:
        if row.decode is not None:
            place = row.stored_bytes / scale
            _point(axis, place, row.decode, capsize=4)
            axis.annotate(row.precision, (place, row.decode.median), (7, 4), textcoords="offset points", fontsize=10)
            ends.append((place, row.limit))
    places, limits = [], []
    # The line leads from the smallest model to the largest, in whatever order they were measured.
    for place, limit in sorted(ends):
        places.append(place)
        limits.append(limit)
    axis.plot(places, limits, "--", color=GREY, label=_BANDWIDTH_LIMIT)
    return max(places, default=1)


def _point(
    axis: Axes, place: float, speed: _Spread, *, capsize: int, color: str = BLUE, label: str | None = None
) -> None:
    """The median of several runs, with a bar from the slowest to the fastest."""
    ends = [[speed.median - speed.low], [speed.high - speed.median]]
    axis.errorbar(place, speed.median, yerr=ends, fmt="o", color=color, capsize=capsize, label=label)


def _speed_title(batch_size: int, rows: Sequence[_SpeedRow]) -> str:
    speeds, reasons = {}, []
    for row in rows:
        if row.decode is not None:
            speeds[row.precision] = row.decode.median
        if row.missing:
            reasons.append(textwrap.fill(f"{row.precision}: {row.missing}", 26))
    ratio = "not measured"
    if "int8" in speeds and "nf4" in speeds:
        ratio = f"{speeds['int8'] / speeds['nf4']:.2f}"
    return "\n".join([f"batch size {batch_size}", f"int8 / nf4: {ratio}", *reasons])


@_styled
def engine_speeds(rows: Sequence[_EngineRow], titles: Mapping[str, str], subject: str) -> Figure:
    """Decoding speed of engines side by side: a line of panels for each model, a panel for each batch size.

    ``rows`` are those of ``speed.rounds``; points are medians with the least and largest run, on a logarithmic axis,
    and a dash over each group is the limit that the memory's bandwidth sets. A row without a speed has no point.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    sizes = _batch_sizes(rows)
    shown = [row for row in rows if row.decode]
    figure = _new_figure(10, 1.4 + 2.9 * len(models), f"Writing speed of engines on the same weights\n{subject}")
    for part, model in zip(figure.subfigures(len(models), 1, squeeze=False).ravel(), models, strict=True):
        part.suptitle(textwrap.fill(model, 100), x=0.01, ha="left", fontsize=11, fontweight="normal")
        axes = part.subplots(1, len(sizes), squeeze=False, sharey=True).ravel()
        for axis, size in zip(axes, sizes, strict=True):
            of_panel = [row for row in shown if (row.model, row.batch_size) == (model, size)]
            _engine_panel(axis, of_panel, _measured_engines(shown, titles), titles)
            axis.set_title(f"batch {size}", loc="left", fontsize=10)
        axes[0].set_ylabel("tokens/s, whole batch")
    _common_legend(figure)
    return figure


def _measured_engines(rows: Sequence[_EngineRow], titles: Mapping[str, str]) -> list[str]:
    measured = {row.engine for row in rows}
    return [name for name in titles if name in measured]


def _common_legend(figure: Figure) -> None:
    """One legend of all panels: an engine may be missing from some of them."""
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        marks, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, marks, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=2)


def _engine_panel(axis: Axes, rows: Sequence[_EngineRow], engines: Sequence[str], titles: Mapping[str, str]) -> None:
    contexts = sorted({row.context for row in rows})
    limits: dict[int, float] = {}
    for row in rows:
        if row.decode is not None:
            # The engines of one context stand beside each other within 0.7 of the distance to the next.
            shift = (engines.index(row.engine) - (len(engines) - 1) / 2) * 0.7 / max(1, len(engines))
            # An engine keeps its colour even if others are missing.
            colour = PALETTE[list(titles).index(row.engine)]
            place = contexts.index(row.context) + shift
            _point(axis, place, row.decode, capsize=3, color=colour, label=titles[row.engine])
            limits.setdefault(row.context, row.limit)
    for place, context in enumerate(contexts):
        axis.plot([place - 0.42, place + 0.42], [limits[context]] * 2, "--", color=GREY, label=_BANDWIDTH_LIMIT)
    axis.set_xticks(range(len(contexts)), [f"context {context:,}" for context in contexts], fontsize=10)
    axis.set_xlim(-0.5, max(0.5, len(contexts) - 0.5))
    axis.grid(axis="y")
    if rows:
        _logarithmic(axis)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
