"""Every figure of the workbook, drawn with matplotlib from plain data.

Each function returns a ``matplotlib.figure.Figure`` that shows itself in a notebook; pyplot is never used, so no
global state is left behind. Sizes are bytes on the way in and GiB or MiB on the axes. ``subject`` is the label of the
model (``ModelRef.label``) and stands in the title, so a stand-in is always named as one.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from helpers.types import GIB, MemoryEstimate, Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from helpers.generation import Candidate

P = ParamSpec("P")
F = TypeVar("F")

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#222222", "#B8B8B8"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW)
PART_COLOURS = {
    "weights": BLUE,
    "kv_cache": ORANGE,
    "activations": GREEN,
    "gradients": PURPLE,
    "optimizer": RED,
    "reserved": GREY,
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": BLACK,
    "text.parse_math": False,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.facecolor": "white",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": BLACK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
DOTS_PER_INCH = 100


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class WorkbookFigure(Figure):
        """A figure that shows itself in a notebook, sharp on fine screens, without pyplot."""

        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            return png(self), {"width": round(self.get_figwidth() * DOTS_PER_INCH)}

    return WorkbookFigure


def png(figure: Figure, scale: float = 1.5) -> bytes:
    """The figure as a PNG file, ``scale`` times as many pixels as its nominal 100 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH * scale)
    return buffer.getvalue()


def _styled(draw: Callable[P, F]) -> Callable[P, F]:
    """Draw in the workbook's one look."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> F:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _canvas(
    what: str, subject: str, height: float, panels: int = 1, share_x: bool = False, *, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure with its title and ``panels`` axes side by side; ``stacked``: one below the other."""
    figure = _figure_class()(figsize=(8, height), dpi=DOTS_PER_INCH, layout="constrained")
    title = "\n".join(line for text in (what, subject) for line in textwrap.wrap(text, 78))
    figure.suptitle(title, x=0.01, ha="left")
    rows, columns = (panels, 1) if stacked else (1, panels)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=share_x).ravel())


def _unit(largest: float) -> tuple[str, int]:
    """The unit for sizes up to ``largest`` bytes: GiB, or MiB where all are small."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)


def _short(value: float) -> str:
    """Three significant digits without an exponent: 332.59 -> 333, 9.0625 -> 9.06."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _records(rows: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame or of a sequence of mappings; a missing value becomes None."""
    records = rows.to_dict("records") if hasattr(rows, "to_dict") else [dict(row) for row in rows]
    return [{key: None if _missing(value) else value for key, value in record.items()} for record in records]


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


@_styled
def parameter_breakdown(table: Any, subject: str) -> Figure:
    """Where the parameters sit: one bar a part, largest first, with its count and its share of the whole.

    ``table`` is ``memory.parameter_table``'s, or any that maps "parameters" to a count for each part.
    """
    counts = {part: int(count) for part, count in dict(table["parameters"]).items() if count}
    parts = sorted(counts.items(), key=lambda item: item[1], reverse=True)
    total = sum(counts.values())
    figure, (axis,) = _canvas(f"Where the {_count(total)} parameters sit", subject, 1.4 + 0.42 * len(parts))
    bars = axis.barh([name for name, _ in parts], [count / total * 100 for _, count in parts], color=BLUE)
    axis.bar_label(bars, [f"{_count(count)} ({_share(count / total)})" for _, count in parts], padding=4)
    axis.set(xlabel="share of all parameters (%)", xlim=(0, 125 * parts[0][1] / total))
    axis.invert_yaxis()
    axis.grid(axis="x")
    return figure


def _count(number: float) -> str:
    for scale, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}"
    return f"{number:.0f}"


def _share(share: float) -> str:
    return "under 0.1%" if 0 < share < 0.001 else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


@_styled
def memory_by_precision(estimates: Sequence[MemoryEstimate], machines: Mapping[str, float], subject: str) -> Figure:
    """Memory by precision, stacked by part, with a line for what each machine has (name -> bytes)."""
    figure, (axis,) = _canvas(f"Memory by precision, {_modes(estimates)}", subject, 4.6)
    unit, scale = _unit(max(estimate.total for estimate in estimates))
    _stack(axis, [e.precision for e in estimates], [_scaled(e.parts, scale) for e in estimates])
    for name, size in machines.items():
        _limit(axis, size / scale, f"{name}\n{_short(size / scale)} {unit}")
    sizes = [estimate.total for estimate in estimates] + list(machines.values())
    axis.set(ylabel=f"memory ({unit})", ylim=(0, 1.1 * max(sizes) / scale))
    _slots(axis, len(estimates))
    _legend_on_top(axis)
    return figure


def _modes(estimates: Sequence[MemoryEstimate]) -> str:
    return " and ".join(dict.fromkeys(estimate.mode for estimate in estimates))


def part_name(part: str) -> str:
    """The name of a part of a MemoryEstimate for people: kv_cache -> KV cache."""
    return part.replace("kv_", "KV ").replace("_", " ")


def _scaled(parts: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: size / scale for name, size in parts.items()}


def _stack(axis: Axes, names: Sequence[str], stacks: Sequence[Mapping[str, float]], totals: bool = True) -> None:
    """One stacked bar a name; parts that are zero everywhere are left out; the total stands on top if there is room."""
    base = [0.0] * len(names)
    for part in stacks[0]:
        heights = [stack[part] for stack in stacks]
        if any(heights):
            colour = PART_COLOURS.get(part, GREY)
            bars = axis.bar(names, heights, bottom=base, width=0.6, color=colour, label=part_name(part))
            base = [below + height for below, height in zip(base, heights, strict=True)]
    if totals:
        axis.bar_label(bars, [_short(total) for total in base], padding=3)


def _limit(axis: Axes, height: float, text: str) -> None:
    """A dashed horizontal line with its name at its right end."""
    axis.axhline(height, color=BLACK, linestyle="--", linewidth=1)
    axis.annotate(
        text,
        (1, height),
        (5, 0),
        xycoords=axis.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        fontsize=10,
    )


def _legend_on_top(axis: Axes) -> None:
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, columnspacing=1.2)


def _slots(axis: Axes, bars: int, least: int = 4) -> None:
    """Room for at least ``least`` bars, so that one or two do not fill the whole width."""
    axis.set_xlim(-0.6, max(bars, least) - 0.4)


@_styled
def placement(placed: Placement, capacities: Mapping[int | str, float], subject: str) -> Figure:
    """What each device holds and what stays free; ``capacities`` gives the bytes of each device."""
    devices = list(capacities)
    unit, scale = _unit(max(capacities.values()))
    sizes = [capacities[device] / scale for device in devices]
    needed = [placed.per_device_bytes.get(device, 0) / scale for device in devices]
    held = [min(pair) for pair in zip(needed, sizes, strict=True)]
    names = _device_names(devices, needed)
    figure, (axis,) = _canvas(f"Placement over {len(devices)} devices: {_verdict(placed)}", subject, 4.4)
    axis.bar(names, held, width=0.6, color=BLUE, label="used")
    _remainder(axis, held, sizes, color="#E4E4E4", label="free")
    _remainder(axis, sizes, needed, color=RED, label="too much")
    for size in sorted(set(sizes)):
        _limit(axis, size, f"{_short(size)} {unit}\na device")
    axis.set(ylabel=f"memory ({unit})", ylim=(0, 1.08 * max(sizes + needed)))
    _slots(axis, len(devices))
    _legend_on_top(axis)
    return figure


@_styled
def memory_per_device(panels: Mapping[str, Sequence[Mapping[str, Any]]], subject: str, *, fits: bool) -> Figure:
    """What each device holds by part, against its limit: a panel for each set of models in memory together.

    The rows of a panel (its title -> rows) hold ``name`` and, in bytes, ``limit`` and the parts to be stacked.
    """
    what = f"Memory of each device: {'fits' if fits else 'does not fit'}"
    figure, axes = _canvas(what, subject, 1.3 + 3.1 * len(panels), len(panels), stacked=True)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        unit, scale = _unit(max(row["limit"] for row in rows))
        stacks = [{part: row[part] / scale for part in PART_COLOURS if part in row} for row in rows]
        few = len(rows) <= 8
        _stack(axis, [row["name"] if few else row["name"].split()[-1] for row in rows], stacks, totals=len(rows) <= 16)
        limits = [row["limit"] / scale for row in rows]
        ends = [[place + side for place in range(len(rows))] for side in (-0.4, 0.4)]
        axis.hlines(limits, *ends, BLACK, "dashed")
        tallest = max([*limits, *(sum(stack.values()) for stack in stacks)])
        axis.set(ylabel=f"memory ({unit})", xlabel="" if few else "GPU", ylim=(0, 1.15 * tallest))
        known = " and ".join(_short(limit) for limit in dict.fromkeys(limits))
        axis.set_title(textwrap.fill(f"{title}; limit (dashed): {known} {unit}", 84), loc="left")
        _slots(axis, len(rows))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _device_names(devices: Sequence[int | str], needed: Sequence[float]) -> list[str]:
    """ "GPU 0" with what it holds below; the bare number where there are too many for more."""
    if len(devices) > 8:
        return [str(device) for device in devices]
    names = [f"GPU {device}" if isinstance(device, int) else device for device in devices]
    return [f"{name}\n{_short(size)}" for name, size in zip(names, needed, strict=True)]


def _remainder(axis: Axes, low: Sequence[float], high: Sequence[float], color: str, label: str) -> None:
    """Bars from ``low`` up to ``high`` where that is higher; nothing at all where none is."""
    heights = [max(top - bottom, 0) for bottom, top in zip(low, high, strict=True)]
    if any(heights):
        axis.bar(range(len(low)), heights, bottom=low, width=0.6, color=color, label=label)


def _verdict(placed: Placement) -> str:
    return "fits" if placed.fits else "does not fit"


@_styled
def cache_growth(bytes_per_token: Mapping[str, int], max_tokens: int, subject: str) -> Figure:
    """The KV cache of one sequence as its context grows, one line for each way to cache (name -> bytes a token)."""
    figure, (axis,) = _canvas("KV cache of one sequence as its context grows", subject, 4.2)
    unit, scale = _unit(max(bytes_per_token.values()) * max_tokens)
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
def cache_speed(rows: Sequence[Any], subject: str) -> Figure:
    """Decoding speed by context, a panel for each batch size, a line for each kind of cache (``bench.CacheRow``s)."""
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    figure, axes = _canvas("Decoding speed as the context grows", subject, 4.2, len(sizes))
    names = {"grouped": "key-value heads alone", "library": "copied to all query heads"}
    for axis, size in zip(axes, sizes, strict=True):
        for colour, (kind, name) in zip((BLUE, ORANGE), names.items(), strict=True):
            shown = [row for row in rows if (row.batch_size, row.cache) == (size, kind)]
            places, speeds = [row.context_tokens for row in shown], [row.tokens_per_second for row in shown]
            lows, highs = ([size / getattr(row.seconds, end) for row in shown] for end in ("high", "low"))
            ends = [
                [speed - low for speed, low in zip(speeds, lows, strict=True)],
                [high - speed for speed, high in zip(speeds, highs, strict=True)],
            ]
            axis.errorbar(places, speeds, yerr=ends, fmt="o-", color=colour, capsize=4, linewidth=2, label=name)
        axis.set_title(f"batch size {size}", loc="left", fontsize=10)
        axis.set(xlabel="context (tokens)")
        axis.set_ylim(bottom=0)
        axis.grid()
    axes[0].set_ylabel("written tokens/s, whole batch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="the cache holds")
    return figure


@_styled
def next_token_probabilities(by_temperature: Mapping[float, Sequence[Candidate]], subject: str) -> Figure:
    """The likeliest next tokens at several temperatures: one panel each, all in the order of the first.

    The candidates are those of ``generation.next_token_probabilities``.
    """
    tokens = list(next(iter(by_temperature.values())))
    figure, axes = _canvas(
        "Probability of the next token by temperature", subject, 1.5 + 0.3 * len(tokens), len(by_temperature)
    )
    for axis, (temperature, candidates) in zip(axes, by_temperature.items(), strict=True):
        found = {candidate.token_id: candidate.probability for candidate in candidates}
        heights = [found.get(token.token_id, 0.0) for token in tokens]
        bars = axis.barh(range(len(tokens)), heights, color=BLUE)
        axis.bar_label(bars, [f"{height:.1%}" for height in heights], padding=3, fontsize=9)
        axis.set(title=f"temperature {temperature:g}", xlim=(0, 1.5), xlabel="probability", xticks=[0, 0.5, 1])
        axis.set_yticks(range(len(tokens)), [visible(token.text) for token in tokens] if axis is axes[0] else [])
        axis.invert_yaxis()
    return figure


def visible(token: str) -> str:
    """A token's text with its spaces, tabs and newlines made visible."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


@_styled
def precision_comparison(rows: Any, subject: str) -> Figure:
    """Stored size, speed and perplexity by precision.

    Rows (mappings or a DataFrame) hold ``precision``, ``stored_bytes``, ``tokens_per_second`` and ``perplexity``; a
    row that could not run holds None there and says why in ``lacks`` ("lacks 12 GiB"), which is shown in its place.
    """
    records = _records(rows)
    unit, scale = _unit(max((record.get("stored_bytes") or 0 for record in records), default=0))
    panels = {
        f"stored weights ({unit})": ("stored_bytes", scale),
        "speed (tokens/s)": ("tokens_per_second", 1),
        "perplexity (lower is better)": ("perplexity", 1),
    }
    figure, axes = _canvas("Size, speed and quality by precision", subject, 4.0, len(panels))
    for axis, (title, (column, divisor)) in zip(axes, panels.items(), strict=True):
        values = [record.get(column) for record in records]
        _bars_with_gaps(axis, records, [None if value is None else value / divisor for value in values])
        axis.set_title(title, loc="left")
    return figure


def _bars_with_gaps(axis: Axes, records: Sequence[Mapping[str, Any]], values: Sequence[float | None]) -> None:
    """One bar a precision; a missing value shows its reason where the bar would stand."""
    names = [record["precision"] for record in records]
    bars = axis.bar(names, [value or 0 for value in values], width=0.65, color=BLUE)
    axis.bar_label(bars, ["" if value is None else _short(value) for value in values], padding=3, fontsize=10)
    axis.set_ylim(0, 1.15 * max((value for value in values if value is not None), default=1.0))
    for place, (record, value) in enumerate(zip(records, values, strict=True)):
        if value is None:
            reason = textwrap.fill(record.get("lacks") or "not measured", 24)
            axis.annotate(
                reason, (place, 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="center", color="#666666"
            )


@_styled
def logit_differences(differences: Mapping[str, float], subject: str, against: str = "bf16") -> Figure:
    """How far the logits of each variant stand from those of ``against``: a bar at exactly zero changed nothing."""
    names = list(differences)
    figure, (axis,) = _canvas(f"Mean distance of the logits from {against}'s", subject, 1.5 + 0.5 * len(names))
    bars = axis.barh(names, list(differences.values()), color=BLUE)
    texts = ["exactly 0: nothing was changed" if value == 0 else f"{value:.3g}" for value in differences.values()]
    for label, value in zip(axis.bar_label(bars, texts, padding=4), differences.values(), strict=True):
        label.set_color(BLACK if value else RED)
    axis.set(xlabel="mean absolute difference of the logits", xlim=(0, 1.2 * max(differences.values()) or 1))
    axis.invert_yaxis()
    return figure


@_styled
def token_times(arrivals: Sequence[float], subject: str) -> Figure:
    """The time that each generated token took; the first, for which the model reads the whole prompt, is marked.

    ``arrivals`` are the seconds from the start of the generation to the arrival of each token.
    """
    figure, (axis,) = _canvas("Time of each generated token", subject, 3.8)
    times = [1000 * (now - before) for before, now in itertools.pairwise([0.0, *arrivals])]
    axis.bar([1], times[:1], color=ORANGE, label=f"first token, which reads the prompt: {_short(times[0])} ms")
    axis.bar(range(2, len(times) + 1), times[1:], color=BLUE)
    if len(times) > 1:
        typical = statistics.median(times[1:])
        label = f"median of the others: {_short(typical)} ms ({1000 / typical:.0f} tokens/s)"
        axis.axhline(typical, color=BLACK, linestyle="--", linewidth=1, label=label)
    axis.set(xlabel="generated token", ylabel="time (ms)", xlim=(0, max(len(times), 10) + 1))
    _legend_on_top(axis)
    return figure


@_styled
def training_compute(flop: Mapping[str, float]) -> Figure:
    """Training compute by model (name -> FLOP, by 6 x parameters x tokens), and how many times the least it is."""
    names, least = list(flop), min(flop.values())
    exponent = math.floor(math.log10(max(flop.values())))
    figure, (axis,) = _canvas("Training compute: 6 × parameters × tokens", ", ".join(names), 1.6 + 0.5 * len(names))
    values = [amount / 10**exponent for amount in flop.values()]
    bars = axis.barh(names, values, color=BLUE)
    labels = [f"{value:.2f} ({amount / least:.1f}×)" for value, amount in zip(values, flop.values(), strict=True)]
    axis.bar_label(bars, labels, padding=4)
    power = str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    axis.set(xlabel=f"training compute (10{power} FLOP)", xlim=(0, 1.25 * max(values)))
    axis.invert_yaxis()
    return figure


@_styled
def score_intervals(scores: Any, subject: str) -> Figure:
    """Shares with their 95% intervals: a row for each group of items, a mark for each side, a panel for each rule.

    ``scores`` is ``Comparison.scores``' table, or rows with items, side, rule, share, low and high (0 to 1).
    """
    rows = _records(scores)
    rules, groups, sides = (list(dict.fromkeys(row[key] for row in rows)) for key in ("rule", "items", "side"))
    figure, axes = _canvas("Share of the replies, with 95% intervals", subject, 1.7 + 0.55 * len(groups), len(rules))
    for axis, rule in zip(axes, rules, strict=True):
        for number, side in enumerate(sides):
            chosen = [row for row in rows if row["rule"] == rule and row["side"] == side]
            places = [groups.index(row["items"]) + (number - (len(sides) - 1) / 2) * 0.22 for row in chosen]
            share = [100 * row["share"] for row in chosen]
            errors = [[100 * abs(row["share"] - row[end]) for row in chosen] for end in ("low", "high")]
            marker, colour = "osD^v"[number % 5], PALETTE[number % len(PALETTE)]
            axis.errorbar(share, places, xerr=errors, fmt=marker, color=colour, capsize=3, label=side)
        axis.set(title=rule, xlabel="share of the replies (%)", xlim=(-4, 104), ylim=(len(groups) - 0.5, -0.5))
        axis.set_yticks(range(len(groups)), groups if axis is axes[0] else [""] * len(groups))
        axis.grid(axis="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sides))
    return figure


@_styled
def loss_curve(history: Sequence[Any], steps: int, subject: str, title: str = "Loss while fine-tuning") -> Figure:
    """The training loss, and the loss on held-out examples, by step (nats a token), over all ``steps`` to come.

    ``history`` holds points with ``step``, ``loss`` and ``held_out_loss`` (either may be None).
    """
    figure, (axis,) = _canvas(title, subject, 3.6)
    curves = (("loss", BLUE, "-", "training batches"), ("held_out_loss", ORANGE, "o--", "held-out examples"))
    for name, colour, style, label in curves:
        points = [(point.step, getattr(point, name)) for point in history if getattr(point, name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=f"{label}, now {points[-1][1]:.3f}")
    axis.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, steps), ylim=(0, None))
    axis.grid()
    if history:
        _legend_on_top(axis)
    return figure


@_styled
def nf4_code(code: Sequence[float], scaled: Any, subject: str, tail: float) -> Figure:
    """The 16 values of nf4 on the normal density they are quantiles of, over real weights divided by their block's
    largest.

    ``scaled`` holds these weights (-1 to 1); ``tail`` is the probability below the largest value.
    """
    import numpy as np
    from scipy.stats import norm

    figure, (axis,) = _canvas("The 16 values of nf4, and the weights they stand for", subject, 4.4)
    axis.hist(np.ravel(scaled), bins=101, range=(-1, 1), density=True, color="#CFE3F1", label="weights / largest of 64")
    places, deviation = np.linspace(-1.25, 1.25, 400), 1 / norm.ppf(tail)
    density = norm(scale=deviation)
    axis.plot(places, density.pdf(places), color=BLACK, linewidth=1.2, label="normal density")
    axis.vlines(code, 0, density.pdf(code), color=ORANGE, linewidth=2, label="nf4 values")
    for number, value in enumerate(code):
        axis.annotate(f"{value:.2f}", (value, -0.03 - 0.07 * (number % 2)), ha="center", va="top", fontsize=8)
    axis.set(xlabel="weight, divided by the largest magnitude of its block", ylabel="density", xlim=(-1.25, 1.25))
    axis.set_ylim(-0.17, None)
    axis.set_yticks([tick for tick in axis.get_yticks() if tick >= 0])
    axis.legend(loc="upper right")
    return figure


@_styled
def layer_errors(errors: Mapping[str, Sequence[Any]], subject: str) -> Figure:
    """The error of each matrix by precision, of its weights and of its output: grouped by kind, layer after layer.

    ``errors`` maps a precision to ``quantization.layer_errors``' rows (layer, weight, output). An error of exactly zero
    has no place on the logarithmic scale and is left out.
    """
    figure, axes = _canvas("Relative error of each matrix, alone", subject, 6.2, 2, share_x=True, stacked=True)
    order = sorted(next(iter(errors.values())), key=lambda row: _kind(row.layer))
    groups = {kind: len(list(rows)) for kind, rows in itertools.groupby(order, lambda row: _kind(row.layer))}
    starts = [0, *itertools.accumulate(groups.values())]
    for axis, (what, title) in zip(
        axes, {"weight": "weights", "output": "output, for a real text"}.items(), strict=True
    ):
        for number, (precision, rows) in enumerate(errors.items()):
            values = [getattr(row, what) or math.nan for row in sorted(rows, key=lambda row: _kind(row.layer))]
            for begin, end in itertools.pairwise(starts):
                label = precision if begin == 0 and not all(map(math.isnan, values)) else None
                style = {"color": PALETTE[number], "marker": "osD^"[number % 4], "markersize": 4, "label": label}
                axis.plot(range(begin, end), values[begin:end], **style)
        axis.set(ylabel="relative error")
        _logarithmic(axis)
        axis.set_title(title, loc="left")
        axis.grid(axis="y")
        for border in starts[1:-1]:
            axis.axvline(border - 0.5, color="#BBBBBB", linewidth=1)
    centres = [(begin + end - 1) / 2 for begin, end in itertools.pairwise(starts)]
    axes[-1].set_xticks(centres, [f"{kind}\n{count} layers" for kind, count in groups.items()], fontsize=9)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(errors))
    return figure


def _logarithmic(axis: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers: 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: _short(value))
    axis.yaxis.set_minor_locator(NullLocator())


def _kind(layer: str) -> str:
    """The matrix's name without the number of its layer: ``transformer.h.3.mlp.dense_h_to_4h`` -> dense_h_to_4h."""
    return layer.rpartition(".")[-1]


@_styled
def quality_against_bytes(sides: Mapping[str, Sequence[Mapping[str, Any]]], subject: str, margin: float) -> Figure:
    """What each precision costs in quality (against bf16, with its interval) beside what it leaves of bf16's bytes.

    ``sides`` maps a model's label to rows with ``precision``, ``share`` (of bf16's bytes, 0 to 1 and more) and
    ``change``, an Interval of the change of the loss in bits a byte. Up to ``margin`` is what "almost no difference"
    means here; it stands as the published claim.
    """
    figure, (axis,) = _canvas("Quality against bytes", subject, 4.8)
    axis.axhspan(-margin, margin, color="#E5F3EC", label=f"published: “almost no difference” (here ±{margin:g})")
    axis.axhline(0, color="#888888", linewidth=1)
    for number, (label, rows) in enumerate(sides.items()):
        shares = [100 * row["share"] for row in rows]
        middle = [row["change"].estimate for row in rows]
        ends = [[abs(row["change"].estimate - getattr(row["change"], end)) for row in rows] for end in ("low", "high")]
        style = {"fmt": "osD^v"[number % 5], "color": PALETTE[number % len(PALETTE)], "capsize": 4}
        axis.errorbar(shares, middle, yerr=ends, label=label, **style)
        place = {"xytext": (-7, 5), "ha": "right"} if number % 2 == 0 else {"xytext": (7, 5), "ha": "left"}
        for share, value, row in zip(shares, middle, rows, strict=True):
            text = {**place, "textcoords": "offset points", "fontsize": 10, "color": style["color"]}
            axis.annotate(row["precision"], (share, value), **text)
    axis.set(xlabel="bytes of the stored weights (% of bf16's)", ylabel="change of the loss (bits a byte)")
    largest = max((row["share"] for rows in sides.values() for row in rows), default=1)
    axis.set_xlim(0, 115 * largest)
    axis.margins(y=0.15)
    axis.grid()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


@_styled
def speed_against_bytes(rows: Sequence[Any], subject: str, *, interleaved: bool) -> Figure:
    """Decoding speed by stored bytes, a panel for each batch size, with the limit that the memory's bandwidth sets.

    ``rows`` are ``bench.SpeedRow``s of one model; bars run from the slowest to the fastest run. The published claim,
    that 8 bits are much faster than 4, stands over the panels with what was measured.
    """
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    runs = f"{rows[0].repeats} runs each, {'taken in turn' if interleaved else 'one precision after the other'}"
    figure, axes = _canvas(f"Speed against bytes: {runs}", subject, 4.6, len(sizes))
    unit, scale = _unit(max(row.stored_bytes for row in rows))
    for axis, size in zip(axes, sizes, strict=True):
        shown = [row for row in rows if row.batch_size == size and row.decode]
        for row in shown:
            ends = [[row.decode.median - row.decode.low], [row.decode.high - row.decode.median]]
            place = row.stored_bytes / scale
            axis.errorbar(place, row.decode.median, yerr=ends, fmt="o", color=BLUE, capsize=4)
            axis.annotate(row.precision, (place, row.decode.median), (7, 4), textcoords="offset points", fontsize=10)
        by_size = sorted(shown, key=lambda row: row.stored_bytes)
        places = [row.stored_bytes / scale for row in by_size]
        axis.plot(places, [row.limit for row in by_size], "--", color=GREY, label="limit by the memory's bandwidth")
        lacks = (f"{row.precision} {row.lacks}" for row in rows if row.batch_size == size and row.lacks)
        lacking = [textwrap.fill(text, 26) for text in lacks]
        notes = [f"batch size {size}", f"int8 / nf4: {_ratio(shown)}", *lacking]
        axis.set_title("\n".join(notes), loc="left", fontsize=10)
        axis.set(xlabel=f"stored weights ({unit})", xlim=(0, 1.45 * max(places, default=1)))
        _logarithmic(axis)
        axis.grid(axis="y")
    axes[0].set_ylabel("written tokens/s, whole batch")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        title="published: 8-bit is “much faster” than 4-bit (int8 / nf4 well above 1)",
    )
    return figure


def _ratio(rows: Sequence[Any]) -> str:
    speeds = {row.precision: row.decode.median for row in rows}
    return f"{speeds['int8'] / speeds['nf4']:.2f}" if {"int8", "nf4"} <= speeds.keys() else "not measured"


@_styled
def engine_speeds(rows: Sequence[Any], titles: Mapping[str, str], subject: str) -> Figure:
    """Decoding speed of engines side by side: a line of panels for each model, a panel for each batch size.

    ``rows`` are ``engines.measure.Row``s; points are medians with the least and largest run, on a logarithmic axis,
    and a dash over each group is the limit that the memory's bandwidth sets. What has no figure has no point.
    """
    models, sizes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "batch_size"))
    shown = [row for row in rows if row.decode]
    engines = [name for name in titles if any(row.engine == name for row in shown)]
    figure = _figure_class()(figsize=(10, 1.4 + 2.9 * len(models)), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(f"Writing speed of engines on the same weights\n{subject}", x=0.01, ha="left")
    for part, model in zip(figure.subfigures(len(models), 1, squeeze=False).ravel(), models, strict=True):
        part.suptitle(textwrap.fill(model, 100), x=0.01, ha="left", fontsize=11, fontweight="normal")
        axes = part.subplots(1, len(sizes), squeeze=False, sharey=True).ravel()
        for axis, size in zip(axes, sizes, strict=True):
            _engine_points(
                axis, [row for row in shown if (row.model, row.batch_size) == (model, size)], engines, titles
            )
            axis.set_title(f"batch {size}", loc="left", fontsize=10)
        axes[0].set_ylabel("tokens/s, whole batch")
    marks = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    entries = {label: mark for mark, label in marks}
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=2)
    return figure


def _engine_points(axis: Axes, rows: Sequence[Any], engines: Sequence[str], titles: Mapping[str, str]) -> None:
    contexts, width = sorted({row.context for row in rows}), 0.7 / max(1, len(engines))
    for row in rows:
        place = contexts.index(row.context) + (engines.index(row.engine) - (len(engines) - 1) / 2) * width
        ends = [[row.decode.median - row.decode.low], [row.decode.high - row.decode.median]]
        look = {"color": PALETTE[list(titles).index(row.engine)], "label": titles[row.engine]}
        axis.errorbar(place, row.decode.median, yerr=ends, fmt="o", capsize=3, **look)
    for place, context in enumerate(contexts):
        limit = next(row.limit for row in rows if row.context == context)
        axis.plot([place - 0.42, place + 0.42], [limit] * 2, "--", color=GREY, label="limit by the memory's bandwidth")
    axis.set_xticks(range(len(contexts)), [f"context {context:,}" for context in contexts], fontsize=10)
    axis.set_xlim(-0.5, max(0.5, len(contexts) - 0.5))
    axis.grid(axis="y")
    if rows:
        _logarithmic(axis)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
