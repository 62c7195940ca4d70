"""The one look of the figures, and the pieces that several of them share.

Every function that draws returns a ``matplotlib.figure.Figure`` that shows itself in a notebook; pyplot is never used,
so no global state is left behind. Sizes are bytes on the way in and GiB or MiB on the axes. ``subject`` is the label
of the model (``ModelRef.label``) and stands in the title, so a stand-in is always named as one.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

P = ParamSpec("P")
F = TypeVar("F")
Cell = str | float | None
# Okabe and Ito, "Color Universal Design" (2008): told apart with every common colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#222222", "#B8B8B8"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW)
_STYLE: dict[Any, Any] = {  # matplotlib types its keys as one long list of literals
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": BLACK,
    # Tokens and model names may hold a dollar sign, which would start a formula.
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
_DOTS_PER_INCH = 100


@functools.cache
def _figure_class() -> type[Figure]:
    # Defined inside a function because its base class would import matplotlib together with this module.
    from matplotlib.figure import Figure

    class WorkbookFigure(Figure):
        """A figure that shows itself in a notebook, sharp on fine screens, without pyplot."""

        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            return png(self), {"width": round(self.get_figwidth() * _DOTS_PER_INCH)}

    return WorkbookFigure


def png(figure: Figure, scale: float = 1.5) -> bytes:
    """Return the figure as a PNG file with ``scale`` times as many pixels as its nominal 100 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH * scale)
    return buffer.getvalue()


def _styled(draw: Callable[P, F]) -> Callable[P, F]:
    """Draw in the workbook's one look."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> F:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            drawn = draw(*args, **kwargs)
        _check_drawn(drawn, draw.__name__)
        return drawn

    return wrapper


def _check_drawn(drawn: object, name: str) -> None:
    """Raise WorkbookError if a line or bar of a figure is not finite: matplotlib would leave it out without a word."""
    for axis in getattr(drawn, "axes", ()):
        for line in axis.lines:
            if not all(map(math.isfinite, _numbers(line.get_xydata()))):
                raise WorkbookError(_not_finite(name, axis.get_title(loc="left") or axis.get_ylabel()))
        for patch in axis.patches:
            if not all(map(math.isfinite, _numbers(patch.get_path().vertices))) or not _has_size(patch):
                raise WorkbookError(_not_finite(name, axis.get_title(loc="left") or axis.get_ylabel()))


def _numbers(points: Any) -> list[float]:
    return [float(value) for value in points.ravel()]


def _has_size(patch: Any) -> bool:
    """Whether a bar's place and size are finite; other patches have none."""
    sizes = [getattr(patch, name)() for name in ("get_x", "get_y", "get_width", "get_height") if hasattr(patch, name)]
    return all(math.isfinite(size) for size in sizes)


def _not_finite(name: str, where: str) -> str:
    return f"The figure {name} has a value that is not finite (NaN or infinity), in {where!r}. Find where it arose."


def _new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of this size, in inches, with its title at the left."""
    figure = _figure_class()(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _canvas(
    what: str, subject: str, height: float, panels: int = 1, share_x: bool = False, *, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure with its title and ``panels`` axes, side by side or, if ``stacked``, one below the other."""
    # matplotlib does not break titles; 78 characters of this size fill the eight inches.
    lines = [*textwrap.wrap(what, 78), *textwrap.wrap(subject, 78)]
    figure = _new_figure(8, height, "\n".join(lines))
    rows, columns = 1, panels
    if stacked:
        rows, columns = panels, 1
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=share_x).ravel())


def _unit_for(largest: float) -> tuple[str, int]:
    """The unit for sizes up to ``largest`` bytes, and its bytes: GiB, or MiB if all are small."""
    if largest >= GIB:
        return "GiB", GIB
    return "MiB", 2**20


def _short(value: float) -> str:
    """Three significant digits without an exponent: 332.59 -> 333, 9.0625 -> 9.06."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _records(rows: DataFrame | Sequence[Mapping[str, Cell]]) -> list[dict[str, Cell]]:
    """The rows of a DataFrame or of a sequence of mappings; a missing value becomes None."""
    # pandas is not imported for this question: without a DataFrame nobody needs it.
    plain = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    result: list[dict[str, Cell]] = []
    for row in plain:
        cells: dict[str, Cell] = {}
        for key, value in row.items():
            # pandas marks a missing value as nan, in columns of texts too.
            missing = isinstance(value, float) and math.isnan(value)
            cells[str(key)] = None if missing else value
        result.append(cells)
    return result


def _number(row: Mapping[str, Cell], column: str) -> float | None:
    """The number in a column of a row; None if there is none."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return None
    return value


def _limit_line(axis: Axes, height: float, text: str) -> None:
    """Draw a dashed horizontal line with its name at its right end."""
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
    """Put the legend into a row above the axes, where it covers nothing."""
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, columnspacing=1.2)


def _space_for_bars(axis: Axes, bars: int, least: int = 4) -> None:
    """Make space for at least ``least`` bars, so that one or two do not fill the whole width."""
    axis.set_xlim(-0.6, max(bars, least) - 0.4)


def _logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as ticks: 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: _short(value))
    # matplotlib's own minor ticks would be labelled with powers of ten.
    axis.yaxis.set_minor_locator(NullLocator())
