"""Drawings of how things work: a decoder layer, heads and their cache, grids of 8 and 4 bits, LoRA, the loss.

They show shapes and numbers that they are given, but most are not to scale. Their width suits a telephone too: at 390
pixels the letters are still nine pixels high.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from helpers.base.units import GIB
from helpers.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, _new_figure, _short, _styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray
    from transformers import FalconConfig

_WIDTH = 6.4  # inches
_SOFT_BLUE, _SOFT_ORANGE, _SOFT_GREEN, _SOFT_GREY = "#D6E8F5", "#FCE8BF", "#CDEBDF", "#EEEEEE"
_OUTLIER = 6.0  # the magnitude from which LLM.int8() takes a column out
_TOKENS_A_ROW = 7


@_styled
def decoder_layer(config: FalconConfig, subject: str) -> Figure:
    """One decoder layer of Falcon's new architecture: attention and MLP read the same input, side by side."""
    figure = _new_figure(_WIDTH, 5.6, f"One of the {config.num_hidden_layers} decoder layers\n{subject}")
    axis = _paper(figure, 10, 9.3)
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    fused = (config.num_attention_heads + 2 * _shared(config)) * head
    attention = [
        f"query_key_value\n{hidden:,} → {fused:,}",
        f"attention\n{config.num_attention_heads} query heads,\n{_shared(config)} key-value heads",
        f"dense\n{hidden:,} → {hidden:,}",
    ]
    wide = config.ffn_hidden_size
    mlp = [f"dense_h_to_4h\n{hidden:,} → {wide:,}", "GELU", f"dense_4h_to_h\n{wide:,} → {hidden:,}"]
    for centre, norm, parts, colour in ((2.1, "ln_attn", attention, _SOFT_BLUE), (7.9, "ln_mlp", mlp, _SOFT_ORANGE)):
        _arrow(axis, (5, 1.1), (centre, 1.9))
        _column(axis, centre, [f"{norm}: layer norm", *parts], [_SOFT_GREY, *[colour] * 3])
        _arrow(axis, (centre, 7.6), (5 + math.copysign(0.4, centre - 5), 8.1))
    _arrow(axis, (5, 0.5), (5, 7.75), width=2.5)
    axis.text(5, 4.6, "residual stream", rotation=90, ha="center", va="center", backgroundcolor="white")
    _arrow(axis, (5, 8.5), (5, 9.25), width=2.5)
    axis.text(5, 8.1, "+", ha="center", va="center", fontsize=15, bbox={"boxstyle": "circle", "fc": "white"})
    axis.text(5, 0.15, f"{hidden:,} numbers per token", ha="center", va="center")
    return figure


def _column(axis: Axes, centre: float, texts: Sequence[str], colours: Sequence[str]) -> None:
    """Boxes one above the other, with arrows between them."""
    bottoms = (1.9, 3.0, 4.45, 6.45)
    heights = (0.7, 1.05, 1.6, 1.05)
    for number, (bottom, height) in enumerate(zip(bottoms, heights, strict=True)):
        _box(axis, (centre - 1.9, bottom), (3.8, height), texts[number], colours[number])
        if number:
            _arrow(axis, (centre, bottoms[number - 1] + heights[number - 1]), (centre, bottom))


@_styled
def shared_heads(config: FalconConfig, subject: str) -> Figure:
    """The query heads in their groups, each over its key-value head; and what a token adds to the cache, to scale."""
    heads, shared = config.num_attention_heads, _shared(config)
    title = f"{heads} query heads on {shared} key-value heads\n{subject}"
    figure = _new_figure(_WIDTH, 6.2, title)
    above, below = figure.subplots(2, 1, height_ratios=[2, 3])
    _groups(above, heads, shared)
    _cache_columns(below, config)
    return figure


def _groups(axis: Axes, heads: int, shared: int) -> None:
    """A block of dots per group of query heads, over the box of its key-value head."""
    size = heads // shared
    rows = math.ceil(math.sqrt(size))
    for group in range(shared):
        left = group * (rows + 1.5)
        across = [left + number % rows for number in range(size)]
        upwards = [3.0 + number // rows for number in range(size)]
        axis.scatter(across, upwards, s=22, color=BLUE, marker="s")
        _box(axis, (left - 0.5, 0), (rows, 1.5), "K V", ORANGE)
        axis.plot([left + rows / 2 - 0.5] * 2, [1.5, 2.5], color=BLACK, linewidth=1)
    axis.set(xlim=(-1, shared * (rows + 1.5) - 1), ylim=(-0.3, rows + 3))
    axis.set_title(f"each key and value (orange) serves {size} query heads (blue)", loc="left")
    axis.set_axis_off()


def _cache_columns(axis: Axes, config: FalconConfig, tokens: int = 8) -> None:
    """A column of the cache per token: stored for the key-value heads, and for a copy to every query head."""
    head = config.hidden_size // config.num_attention_heads
    shared, longest = _shared(config), config.max_position_embeddings
    for first, heads, colour in ((0, shared, ORANGE), (tokens + 3, config.num_attention_heads, GREY)):
        places = [first + token for token in range(tokens)]
        axis.bar(places, [heads] * tokens, width=0.85, color=colour, edgecolor=BLACK, linewidth=0.5)
        # Two bytes a number (bf16), a key and a value.
        size = 2 * 2 * config.num_hidden_layers * heads * head
        full = size * longest / GIB
        text = f"{heads} heads:\n{size / 1024:,.0f} KiB per token\n{_short(full)} GiB at {longest:,} tokens"
        axis.annotate(text, (first - 0.4, heads), (0, 4), textcoords="offset points", va="bottom")
    axis.set(ylabel="heads stored per layer", ylim=(0, 1.35 * config.num_attention_heads))
    axis.set_xticks([*range(tokens), *range(tokens + 3, 2 * tokens + 3)], [*range(1, tokens + 1)] * 2)
    axis.set_xlabel("tokens so far: each adds a column to the KV cache")
    axis.set_yticks([shared, config.num_attention_heads])


@_styled
def quantization_grids(inputs: ArrayLike, blocks: ArrayLike, code: Sequence[float], subject: str) -> Figure:
    """Why int8 keeps outliers apart, and where nf4 puts its 16 values.

    ``inputs``: one token's inputs of a layer. ``blocks`` (blocks by 64): weights, divided by the largest of their
    block; the first block is drawn, the errors are of all. ``code``: nf4's values, -1 to 1.
    """
    import numpy as np

    figure = _new_figure(_WIDTH, 6.6, f"Real numbers (dots) and the grid they are rounded to (lines)\n{subject}")
    axes = figure.subplots(4, 1)
    numbers = np.ravel(inputs)
    usual = numbers[np.abs(numbers) < _OUTLIER]
    largest, kept = float(np.abs(numbers).max()), float(np.abs(usual).max())
    with_outliers = f"int8 with the outliers: the largest input, {largest:.1f}, sets the step"
    _int8_panel(axes[0], largest, usual, with_outliers)
    without = f"int8 without {len(numbers) - len(usual)} outliers (magnitude {_OUTLIER:g} or more)"
    _int8_panel(axes[1], kept, usual, without)
    weights = np.asarray(blocks)
    evenly = "4 bits, evenly spaced"
    _four_bit_panel(axes[2], np.linspace(-1, 1, 16), weights, evenly)
    _four_bit_panel(axes[3], np.asarray(code), weights, "nf4: 16 values, dense where most weights are")
    return figure


def _int8_panel(axis: Axes, largest: float, values: NDArray[Any], title: str) -> None:
    """The middle of int8's grid whose last line, number 127, is at ``largest``."""
    step, window = largest / 127, 1.0
    near = int(window / step)
    _number_line(axis, [step * number for number in range(-near, near + 1)], values, BLUE)
    axis.set_title(f"{title}\nstep {step:.3f}", loc="left")
    axis.set_xlim(-window, window)


def _four_bit_panel(axis: Axes, grid: NDArray[Any], blocks: NDArray[Any], title: str) -> None:
    """A grid of 16 values, the weights of one block, and the mean error over all blocks."""
    import numpy as np

    # The nearest value is one of the two around a weight, found by the borders half-way between the values.
    nearest = grid[np.digitize(blocks, (grid[1:] + grid[:-1]) / 2)]
    error = float(np.abs(blocks - nearest).mean())
    _number_line(axis, grid, blocks[0], ORANGE)
    axis.set_title(
        f"{title}\nmean error {error:.4f} over {len(blocks):,} blocks (their largest weight is 1)", loc="left"
    )
    axis.set_xlim(-1.03, 1.03)


def _number_line(axis: Axes, grid: ArrayLike, values: NDArray[Any], colour: str) -> None:
    """The grid as lines, the values as dots in a band, so that equal ones do not hide each other."""
    axis.vlines(grid, 0, 1, color=colour, linewidth=1.1)
    heights = [0.15 + 0.7 * (number * 0.618 % 1) for number in range(len(values))]
    axis.scatter(values, heights, s=6, color=BLACK, zorder=3)
    axis.set(ylim=(0, 1), yticks=[])
    axis.spines["left"].set_visible(False)


@_styled
def lora_and_qlora(inputs: int, outputs: int, rank: int, subject: str) -> Figure:
    """A frozen matrix from ``inputs`` to ``outputs`` numbers with its two thin trained ones; in bf16 and in nf4."""
    figure = _new_figure(_WIDTH, 5.0, f"LoRA and QLoRA: one matrix, {inputs:,} → {outputs:,}, rank {rank}\n{subject}")
    trained, frozen = rank * (inputs + outputs), inputs * outputs
    # A scale of 32 bits for each 64 weights is half a bit more for each.
    for place, (name, store, bits) in enumerate((("LoRA", "bf16", 16), ("QLoRA", "nf4", 4.5))):
        axis = _paper(figure, 10, 11, (1, 2, place + 1))
        axis.set_title(f"{name}: the base in {store}", loc="left")
        _box(axis, (3.2, 0), (3.6, 1), "input x", "white")
        _box(axis, (0, 2.6), (5.2, 4.4), f"W, frozen\n{store}: {_megabytes(frozen * bits / 8)}", _SOFT_GREY)
        _box(axis, (6.4, 2.6), (3.2, 1.1), f"A: → {rank}", _SOFT_GREEN)
        _box(axis, (6.4, 5.9), (3.2, 1.1), f"B: {rank} →", _SOFT_GREEN)
        axis.text(6.0, 4.8, f"trained:\n{trained / 1e6:.2f} M numbers,\n{trained / frozen:.2%} of W's", va="center")
        for start, end in (((4.4, 1), (2.6, 2.6)), ((5.6, 1), (8, 2.6)), ((2.6, 7), (4.7, 8.5)), ((8, 7), (5.3, 8.5))):
            _arrow(axis, start, end)
        axis.text(5, 8.8, "+", ha="center", va="center", fontsize=15, bbox={"boxstyle": "circle", "fc": "white"})
        _box(axis, (0.4, 9.9), (9.2, 1), "W·x + (alpha / rank)·B·A·x", "white")
        _arrow(axis, (5, 9.2), (5, 9.9))
    return figure


def _megabytes(size: float) -> str:
    return f"{_short(size / 1e6)} MB"


@_styled
def loss_tokens(tokens: Sequence[str], trained: Sequence[bool], subject: str) -> Figure:
    """The tokens of a training example in reading order; those that carry the loss are green, with a check mark."""
    rows = math.ceil(len(tokens) / _TOKENS_A_ROW)
    figure = _new_figure(_WIDTH, 1.3 + 0.75 * rows, f"Which tokens carry the loss\n{subject}")
    axis = _paper(figure, _TOKENS_A_ROW, rows * 1.5 + 0.6)
    for number, (token, counts) in enumerate(zip(tokens, trained, strict=True)):
        left, row = number % _TOKENS_A_ROW, number // _TOKENS_A_ROW
        bottom = (rows - row - 1) * 1.5 + 0.6
        colour, label, tone = _SOFT_GREY, "-100", "#666666"
        if counts:
            colour, label, tone = _SOFT_GREEN, "loss", GREEN
        shown = token.replace(" ", "␣").replace("\n", "↵")
        size = 11 if len(shown) <= 9 else 7.5  # an end token is long
        _box(axis, (left + 0.03, bottom + 0.45), (0.94, 0.85), shown, colour, size)
        axis.text(left + 0.5, bottom + 0.17, label, ha="center", va="center", color=tone, fontsize=10)
    count = sum(trained)
    axis.text(0, 0.1, f"{count} of {len(tokens)} tokens count: the others are only read (label -100)", va="bottom")
    return figure


def _shared(config: FalconConfig) -> int:
    """The number of key-value heads; the configuration allows None for one."""
    return config.num_kv_heads or 1


def _paper(figure: Figure, width: float, height: float, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes without an axis, to draw on from (0, 0) to (width, height)."""
    axis = figure.add_subplot(*place)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return axis


def _box(
    axis: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str, font: float = 10.5
) -> None:
    """A rounded box with a text in its middle; ``corner`` is its lower left."""
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, fc=colour, ec="#777777", clip_on=False))
    axis.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=font)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], width: float = 1.2) -> None:
    look = {"arrowstyle": "-|>", "color": BLACK, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=look)
