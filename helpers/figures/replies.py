"""Draw what models say and learn: next tokens, the time of each token, scores, losses."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, NamedTuple, Protocol

from helpers.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PALETTE,
    _canvas,
    _legend_on_top,
    _number,
    _records,
    _short,
    _styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from helpers.figures.style import Cell
    from helpers.generation.generating import Candidate


class _Point(Protocol):
    """The losses at one step of a training, in nats per token; either may be None."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def held_out_loss(self) -> float | None: ...


class _Score(NamedTuple):
    """The share of one side's replies to a group of items that passed a rule, with its interval (0 to 1)."""

    items: str
    side: str
    rule: str
    share: float
    low: float
    high: float
    guessing: float | None


class _Bar(NamedTuple):
    """One side's replies to a group of items, by class; the interval of the right ones and the guess are percent."""

    side: str
    numbers: dict[str, int]
    items: int
    low: float
    high: float
    guessing: float


_RULE_TITLES = {"concise": "correct and concise"}  # what the rule asks for, where its name is shorter
_ANSWER_COLOURS = {"right": BLUE, "wrong": ORANGE, "no answer": GREY}


@_styled
def next_token_probabilities(by_temperature: Mapping[float, Sequence[Candidate]], subject: str) -> Figure:
    """The likeliest next tokens at several temperatures: one panel each, all in the order of the first.

    The candidates are those of ``generation.next_token_probabilities``.
    """
    tokens = list(next(iter(by_temperature.values())))
    height = 1.5 + 0.3 * len(tokens)
    figure, axes = _canvas("Probability of the next token by temperature", subject, height, len(by_temperature))
    for axis, (temperature, candidates) in zip(axes, by_temperature.items(), strict=True):
        probabilities = {candidate.token_id: candidate.probability for candidate in candidates}
        lengths = [probabilities.get(token.token_id, 0.0) for token in tokens]
        bars = axis.barh(range(len(tokens)), lengths, color=BLUE)
        axis.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=9)
        axis.set(title=f"temperature {temperature:g}", xlim=(0, 1.5), xlabel="probability", xticks=[0, 0.5, 1])
        axis.set_yticks(range(len(tokens)), [])
        axis.invert_yaxis()
    # The panels share their order, so the tokens stand at the first alone.
    axes[0].set_yticks(range(len(tokens)), [visible(token.text) for token in tokens])
    return figure


def visible(token: str) -> str:
    """A token's text with its spaces, tabs and newlines made visible."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


@_styled
def token_times(arrivals: Sequence[float], subject: str) -> Figure:
    """The time that each generated token took; the first, for which the model reads the whole prompt, is marked.

    ``arrivals`` are the seconds from the start of the generation to the arrival of each token; there may be none.
    """
    figure, (axis,) = _canvas("Time of each generated token", subject, 3.8)
    times = []
    for before, now in itertools.pairwise([0.0, *arrivals]):
        times.append(1000 * (now - before))
    if not times:
        axis.text(0.5, 0.5, "no token arrived", ha="center", transform=axis.transAxes)
        return figure
    axis.bar([1], times[:1], color=ORANGE, label=f"first token, which reads the prompt: {_short(times[0])} ms")
    axis.bar(range(2, len(times) + 1), times[1:], color=BLUE)
    if len(times) > 1:
        typical = statistics.median(times[1:])
        # Tokens that are accepted together arrive together.
        speed = f" ({1000 / typical:.0f} tokens/s)" if typical > 0 else ""
        label = f"median of the others: {_short(typical)} ms{speed}"
        axis.axhline(typical, color=BLACK, linestyle="--", linewidth=1, label=label)
    axis.set(xlabel="generated token", ylabel="time (ms)", xlim=(0, max(len(times), 10) + 1))
    _legend_on_top(axis)
    return figure


@_styled
def score_intervals(scores: DataFrame | Sequence[Mapping[str, Cell]], subject: str) -> Figure:
    """Shares with their 95% intervals: a row for each group of items, a mark for each side, a panel for each rule.

    ``scores`` is ``Comparison.scores``' table, or rows with items, side, rule, share, low and high (0 to 1). If a row
    has ``guessing``, the level that guesses reach, a dashed line marks it.
    """
    rows = _scores(scores)
    # Dictionaries keep the order in which rules, groups and sides occur.
    by_rule: dict[str, list[_Score]] = {}
    for row in rows:
        by_rule.setdefault(row.rule, []).append(row)
    groups = list(dict.fromkeys(row.items for row in rows))
    sides = list(dict.fromkeys(row.side for row in rows))
    figure, axes = _canvas("Share of the replies, with 95% intervals", subject, 1.7 + 0.55 * len(groups), len(by_rule))
    for axis, (rule, of_rule) in zip(axes, by_rule.items(), strict=True):
        _score_panel(axis, of_rule, groups, sides)
        axis.set(
            title=_RULE_TITLES.get(rule, rule),
            xlabel="share of the replies (%)",
            xlim=(-4, 104),
            ylim=(len(groups) - 0.5, -0.5),
        )
        axis.set_yticks(range(len(groups)), [""] * len(groups))
        axis.grid(axis="x")
    # The panels share their rows, so the groups' names stand at the first alone.
    axes[0].set_yticks(range(len(groups)), groups)
    handles, labels = axes[0].get_legend_handles_labels()
    if "guessing" in labels:
        # It is no side, so it comes after them.
        handles.append(handles.pop(labels.index("guessing")))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(3, len(sides)))
    return figure


def _scores(table: DataFrame | Sequence[Mapping[str, Cell]]) -> list[_Score]:
    scores = []
    for row in _records(table):
        share, low, high = (_number(row, column) or 0.0 for column in ("share", "low", "high"))
        items, side, rule = (str(row[column]) for column in ("items", "side", "rule"))
        scores.append(_Score(items, side, rule, share, low, high, _number(row, "guessing")))
    return scores


def _score_panel(axis: Axes, rows: Sequence[_Score], groups: Sequence[str], sides: Sequence[str]) -> None:
    for index, side in enumerate(sides):
        # The sides' marks of one group stand above each other, around the group's place.
        shift = (index - (len(sides) - 1) / 2) * 0.22
        shares, places, below, above = [], [], [], []
        for row in rows:
            if row.side == side:
                shares.append(100 * row.share)
                places.append(groups.index(row.items) + shift)
                below.append(100 * abs(row.share - row.low))
                above.append(100 * abs(row.share - row.high))
        marker, colour = "osD^v"[index % 5], PALETTE[index % len(PALETTE)]
        axis.errorbar(shares, places, xerr=[below, above], fmt=marker, color=colour, capsize=3, label=side)
    levels = {row.items: row.guessing for row in rows}
    for group, level in levels.items():
        if level is not None:
            _guessing_line(axis, 100 * level, groups.index(group), 0.42)


def _guessing_line(axis: Axes, level: float, place: float, half: float) -> None:
    """Mark the score of a guess (in percent) with a dashed line across the rows of one group."""
    # One entry in the legend stands for the lines of all groups.
    label = "_" if "guessing" in axis.get_legend_handles_labels()[1] else "guessing"
    axis.vlines(level, place - half, place + half, color=BLACK, linestyles="dashed", linewidth=1.2, label=label)


@_styled
def reply_classes(answers: DataFrame | Sequence[Mapping[str, Cell]], subject: str) -> Figure:
    """How many replies are right, wrong and no answer: a panel for each group of items, a bar for each side.

    ``answers`` is ``Comparison.answers``' table, or rows with items, side, of, right, wrong, no answer, low, high and
    guessing. A whisker is the 95% interval of the right ones, the dashed line what a guess would score.
    """
    groups: dict[str, list[_Bar]] = {}
    for row in _records(answers):
        count, low, high, guessing = (_number(row, name) or 0.0 for name in ("of", "low", "high", "guessing"))
        numbers = {name: round(_number(row, name) or 0) for name in _ANSWER_COLOURS}
        bar = _Bar(str(row["side"]), numbers, round(count), 100 * low, 100 * high, 100 * guessing)
        groups.setdefault(str(row["items"]), []).append(bar)
    height = 1.2 + sum(0.55 + 0.27 * len(bars) for bars in groups.values())
    title = "Right, wrong and no answer, by kind of item"
    figure, axes = _canvas(title, subject, height, len(groups), share_x=True, stacked=True)
    for axis, (group, bars) in zip(axes, groups.items(), strict=True):
        _class_bars(axis, bars)
        axis.set_title(f"{group}: {bars[0].items} items", loc="left")
    axes[-1].set(xlabel="share of the replies (%)", xlim=(0, 100))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _class_bars(axis: Axes, bars: Sequence[_Bar]) -> None:
    """The bars of one group of items, each with its numbers of replies inside."""
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour in _ANSWER_COLOURS.items():
        shares = [100 * bar.numbers[name] / bar.items for bar in bars]
        drawn = axis.barh(places, shares, left=left, height=0.74, color=colour, label=name)
        _numbers_inside(axis, drawn, [bar.numbers[name] for bar in bars], colour)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _guessing_line(axis, bars[0].guessing, (len(bars) - 1) / 2, len(bars) / 2)
    for place, bar in enumerate(bars):
        label = "_" if place else "95% interval of the right ones"
        # Below the numbers, so that it strikes none of them out.
        axis.plot([bar.low, bar.high], [place + 0.3] * 2, color=BLACK, linewidth=1.4, label=label, zorder=5)
    axis.set_yticks(places, [bar.side for bar in bars])
    axis.invert_yaxis()


def _numbers_inside(axis: Axes, drawn: BarContainer, numbers: Sequence[int], colour: str) -> None:
    """Write each number into its segment of a bar, unless the segment is too narrow for it."""
    texts = []
    for segment, number in zip(drawn.patches, numbers, strict=True):
        texts.append(str(number) if segment.get_width() >= 4 else "")
    ink = "white" if colour == BLUE else BLACK  # black is hard to read on blue
    # The segment's own colour behind a number keeps it readable where the guessing line crosses it.
    behind = {"facecolor": colour, "edgecolor": "none", "pad": 0.3}
    axis.bar_label(drawn, texts, label_type="center", fontsize=9, color=ink, bbox=behind)


@_styled
def loss_curve(history: Sequence[_Point], steps: int, subject: str, title: str = "Loss while fine-tuning") -> Figure:
    """The training loss, and the loss on held-out examples, by step (nats per token), over all ``steps`` to come.

    ``history`` holds points with ``step``, ``loss`` and ``held_out_loss`` (either may be None).
    """
    figure, (axis,) = _canvas(title, subject, 3.6)
    training, held_out = [], []
    for point in history:
        if point.loss is not None:
            training.append((point.step, point.loss))
        if point.held_out_loss is not None:
            held_out.append((point.step, point.held_out_loss))
    _curve(axis, training, "training batches", BLUE, "-")
    _curve(axis, held_out, "held-out examples", ORANGE, "o--")
    axis.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, steps), ylim=(0, None))
    axis.grid()
    if history:
        _legend_on_top(axis)
    return figure


def _curve(axis: Axes, points: Sequence[tuple[int, float]], name: str, colour: str, style: str) -> None:
    # At the start of a training one curve, or both, have no point yet.
    if points:
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, style, color=colour, label=f"{name}, now {losses[-1]:.3f}")
