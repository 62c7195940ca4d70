"""The figures: what is drawn, not how its pixels look."""

import io
import math
import subprocess
import sys

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from helpers import figures
from helpers.base import GIB, Interval, WorkbookError
from helpers.generation import Candidate
from helpers.machine import MemoryEstimate, Placement, Shortfall, parameter_table, published_config
from helpers.models import NF4_TAIL, LayerError, ModelRef, nf4_code
from helpers.speed.benchmark import _SpeedRow, _Spread
from helpers.speed.caches import _CacheRow
from helpers.training import Point

GB = 10**9
MIB = 2**20
SUBJECT = ModelRef("env/models/falcon-mini", "falcon", "plain", "embedded", stand_in_for="tiiuae/falcon-180B").label
ROWS = [
    {"precision": "fp32", "missing": "345 GiB missing"},
    {"precision": "bf16", "stored_bytes": 16 * MIB, "tokens_per_second": 86.0, "perplexity": 12.3},
    {"precision": "nf4", "stored_bytes": 6 * MIB, "tokens_per_second": 101.0, "perplexity": 13.2},
]
WITHOUT = {"precision": "fp32", "missing": "needs 200.1 GiB more than 2 devices of 74.5 GiB can hold"}
CACHE_ROWS = [_CacheRow(kind, 1, 128, 64, _Spread(0.1, 0.09, 0.2)) for kind in ("library", "grouped")]
SCORES = [
    {"items": items, "side": side, "rule": rule, "share": share, "low": share - 0.1, "high": share + 0.2}
    for items, share in (("yes_no", 0.5), ("all", 0.25))
    for side in ("falcon", "llama")
    for rule in ("correct", "concise")
]
ANSWERS = [
    {"items": "choice", "side": side, "of": 40, "right": right, "wrong": wrong, "no answer": 40 - right - wrong,
     "share": right / 40, "low": right / 80, "high": 0.9, "guessing": 0.5}
    for side, right, wrong in (("mini", 10, 1), ("smol", 20, 20))
]  # fmt: skip
FIGURES = {
    "parameter_breakdown": lambda: figures.parameter_breakdown({"parameters": {"MLP": 75, "attention": 25}}, SUBJECT),
    "memory_by_precision": lambda: figures.memory_by_precision([MemoryEstimate("bf16", "inference", GIB)], {}, SUBJECT),
    "placement": lambda: figures.placement(Placement({}, {0: GIB}), {0: 2 * GIB}, SUBJECT),
    "cache_speed": lambda: figures.cache_speed(CACHE_ROWS, SUBJECT),
    "cache_growth": lambda: figures.cache_growth({"232 heads": 4_751_360, "8 heads": 163_840}, 2048, SUBJECT),
    "next_token_probabilities": lambda: figures.next_token_probabilities({0.6: [Candidate(" a", 0.7, 1)]}, SUBJECT),
    "precision_comparison": lambda: figures.precision_comparison(ROWS, SUBJECT),
    "precision_comparison_long_reason": lambda: figures.precision_comparison([WITHOUT, *ROWS[1:]], SUBJECT),
    "logit_differences": lambda: figures.logit_differences({"int8": 0.03, "nf4": 0.0}, SUBJECT),
    "score_intervals": lambda: figures.score_intervals(SCORES, SUBJECT),
    "reply_classes": lambda: figures.reply_classes(ANSWERS, SUBJECT),
    "loss_curve": lambda: figures.loss_curve([Point(5, 2.0)], 10, SUBJECT),
    "token_times": lambda: figures.token_times([0.08, 0.09, 0.102], SUBJECT),
    "nf4_code": lambda: figures.nf4_code(nf4_code(), [0.0, 0.5, 1.0], SUBJECT, NF4_TAIL),
    "layer_errors": lambda: figures.layer_errors({"nf4": [LayerError("h.0.dense", 0.1, 0.2, 0, 8)]}, SUBJECT),
    "quality_against_bytes": lambda: figures.quality_against_bytes(
        {SUBJECT: [{"precision": "nf4", "share": 0.4, "change": Interval(0.01, 0.0, 0.02)}]}, SUBJECT, 0.02
    ),
    "speed_against_bytes": lambda: figures.speed_against_bytes(
        [_SpeedRow("m", "nf4", 1, 8, 4, 3, 9, 9, 1e9, *[_Spread(1.0, 1.0, 1.0)] * 3, 1)], SUBJECT, interleaved=True
    ),
}


def heights(axis):
    return [[bar.get_height() for bar in group] for group in axis.containers]


def widths(axis):
    return [bar.get_width() for bar in axis.containers[0]]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_the_stand_in_in_its_title(name):
    assert "falcon-mini (stand-in for tiiuae/falcon-180B)" in FIGURES[name]().get_suptitle()


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_the_look_and_pyplot_stay_inside():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from helpers import figures; figures.token_times([0.1, 0.2], 'x')._repr_png_()\n"
        "assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_shows_itself_as_a_sharp_picture_on_white():
    data, metadata = figures.token_times([0.1, 0.2], "x")._repr_png_()
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    assert metadata == {"width": 800}
    assert image.width == 1200
    assert image.getpixel((0, 0)) == image.getpixel((image.width - 1, image.height - 1)) == (255, 255, 255, 255)


def test_parameter_breakdown_of_falcon_180b():
    figure = figures.parameter_breakdown(parameter_table(published_config("tiiuae/falcon-180B")), SUBJECT)
    axis = figure.axes[0]
    assert "178.6 B" in figure.get_suptitle()
    matrix = 4 * 14848**2 * 80
    assert widths(axis)[:2] == pytest.approx([matrix / 178_557_088_768 * 100] * 2)
    assert [tick.get_text() for tick in axis.get_yticklabels()][-1] == "norms"
    assert texts(axis)[0] == "70.5 B (40%)"
    assert texts(axis)[-2:] == ["965.5 M (0.5%)", "4.8 M (under 0.1%)"]
    assert sum(widths(axis)) == pytest.approx(100)


def test_memory_by_precision_stacks_the_parts_that_exist():
    estimates = [
        MemoryEstimate("bf16", "inference", weights=332 * GIB, kv_cache=9 * GIB),
        MemoryEstimate("nf4", "inference", weights=87 * GIB, kv_cache=9 * GIB),
    ]
    axis = figures.memory_by_precision(estimates, {"8x80 GB": 640 * GB}, SUBJECT).axes[0]
    assert heights(axis) == [[332, 87], [9, 9]]
    assert legend(axis) == ["weights", "KV cache"]
    assert texts(axis) == ["341", "96", "8x80 GB\n596 GiB"]
    assert axis.lines[0].get_ydata()[0] == pytest.approx(640e9 / 2**30)
    assert axis.get_ylabel() == "memory (GiB)"


def test_small_models_are_shown_in_mib():
    axis = figures.memory_by_precision([MemoryEstimate("bf16", "full", 16 * MIB)], {}, SUBJECT).axes[0]
    assert axis.get_ylabel() == "memory (MiB)"
    assert heights(axis) == [[16]]


def test_placement_shows_used_free_and_too_much():
    placed = Placement({}, {0: 60 * GIB, 1: 90 * GIB}, Shortfall(10 * GIB, "2 devices of 80.0 GiB"))
    figure = figures.placement(placed, {0: 80 * GIB, 1: 80 * GIB}, SUBJECT)
    axis = figure.axes[0]
    assert "2 devices: does not fit" in figure.get_suptitle()
    assert heights(axis) == [[60, 80], [20, 0], [0, 10]]
    assert legend(axis) == ["used", "free", "too much"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["GPU 0\n60", "GPU 1\n90"]
    assert texts(axis) == ["80 GiB\nper device"]


def test_placement_over_many_devices_numbers_them():
    figure = figures.placement(Placement({}, {}), dict.fromkeys(range(64), GIB), SUBJECT)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [str(device) for device in range(64)]
    assert "64 devices: fits" in figure.get_suptitle()


def test_cache_growth_ends_where_the_arithmetic_says():
    axis = figures.cache_growth({"232 heads": 4_751_360, "8 heads": 163_840}, 2048, SUBJECT).axes[0]
    assert [line.get_ydata()[-1] for line in axis.lines] == [9.0625, 0.3125]
    assert texts(axis) == ["232 heads\n9.06 GiB", "8 heads\n0.312 GiB"]


def test_next_token_probabilities_has_a_panel_for_each_temperature():
    the, formula = Candidate(" the", 0.75, 1), Candidate("$x$\n", 0.25, 2)
    by_temperature = {0.1: [the._replace(probability=1.0), formula._replace(probability=0.0)], 1.0: [formula, the]}
    first, second = figures.next_token_probabilities(by_temperature, SUBJECT).axes
    assert [first.get_title(), second.get_title()] == ["temperature 0.1", "temperature 1"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["␣the", "$x$↵"]
    assert widths(first) == [1.0, 0.0]
    assert widths(second) == [0.75, 0.25]


@pytest.mark.parametrize("rows", [ROWS, pd.DataFrame(ROWS)], ids=["dicts", "frame"])
def test_precision_comparison_shows_what_is_missing(rows):
    axes = figures.precision_comparison(rows, SUBJECT).axes
    assert [axis.get_title("left") for axis in axes] == [
        "stored weights (MiB)",
        "speed (tokens/s)",
        "perplexity (lower is better)",
    ]
    assert [heights(axis)[0] for axis in axes] == [[0, 16, 6], [0, 86, 101], [0, 12.3, 13.2]]
    for axis in axes:
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["fp32", "bf16", "nf4"]
        assert texts(axis)[-1] == "345 GiB missing"


def test_a_long_reason_stays_inside_its_panel():
    figure = figures.precision_comparison([WITHOUT, *ROWS[1:]], SUBJECT)
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        assert axis.texts[-1].get_window_extent().y1 <= axis.get_window_extent().y1
        assert " ".join(axis.texts[-1].get_text().split()) == WITHOUT["missing"]


def test_a_precision_without_a_reason_is_called_not_measured():
    axis = figures.precision_comparison([{"precision": "fp16"}, ROWS[1]], SUBJECT).axes[0]
    assert "not measured" in texts(axis)


def test_logit_differences_marks_exactly_zero():
    axis = figures.logit_differences({"int8": 0.031, "plain transformers": 0.0}, SUBJECT).axes[0]
    assert widths(axis) == [0.031, 0.0]
    assert texts(axis) == ["0.031", "exactly 0: nothing was changed"]


def test_logit_differences_that_are_all_zero_can_be_drawn():
    axis = figures.logit_differences({"nf4": 0.0}, SUBJECT, against="fp32").axes[0]
    assert axis.get_xlim() == (0, 1)


def test_token_times_marks_the_first_and_the_median_of_the_others():
    axis = figures.token_times([0.080, 0.090, 0.102, 0.152], SUBJECT).axes[0]
    assert heights(axis) == [[80], pytest.approx([10, 12, 50])]
    assert axis.lines[0].get_ydata()[0] == pytest.approx(12)
    assert legend(axis)[0] == "median of the others: 12 ms (83 tokens/s)"
    assert "80 ms" in legend(axis)[1]


def test_one_token_has_no_median():
    assert len(figures.token_times([0.080], SUBJECT).axes[0].lines) == 0


def test_training_compute_of_the_article():
    flop = {"Falcon-180B": 6 * 180e9 * 3.5e12, "Llama-2-70B": 6 * 70e9 * 2e12}
    figure = figures.training_compute(flop)
    axis = figure.axes[0]
    assert widths(axis) == pytest.approx([3.78, 0.84])
    assert texts(axis) == ["3.78 (4.5×)", "0.84 (1.0×)"]
    assert axis.get_xlabel() == "training compute (10²⁴ FLOP)"
    assert "Falcon-180B" in figure.get_suptitle()


def test_score_intervals_stand_where_the_scores_are():
    figure = figures.score_intervals(SCORES, SUBJECT)
    correct, concise = figure.axes
    assert (correct.get_title(), concise.get_title()) == ("correct", "correct and concise")
    assert [label.get_text() for label in correct.get_yticklabels()] == ["yes_no", "all"]
    for container in correct.containers:
        marks, _, (bars,) = container
        assert marks.get_xdata() == pytest.approx([50, 25])
        ends = [sorted(segment[:, 0]) for segment in bars.get_segments()]
        assert ends == [pytest.approx([40, 70]), pytest.approx([15, 45])]
    falcon, llama = (container[0].get_ydata() for container in correct.containers)
    assert all(a < b for a, b in zip(falcon, llama, strict=True))


def test_score_intervals_mark_what_a_guess_would_score():
    rows = [row | {"guessing": 0.3 if row["rule"] == "correct" else None} for row in SCORES]
    figure = figures.score_intervals(rows, SUBJECT)
    correct, concise = figure.axes
    lines = [group for group in correct.collections if group.get_linestyle()[0][1]]  # dashed
    assert [segment[:, 0].tolist() for line in lines for segment in line.get_segments()] == [[30, 30]] * 2
    assert not [group for group in concise.collections if group.get_linestyle()[0][1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["falcon", "llama", "guessing"]


def test_reply_classes_stack_to_the_whole_with_the_guessing_line():
    figure = figures.reply_classes([*ANSWERS, *(row | {"items": "all"} for row in ANSWERS)], SUBJECT)
    choice, everything = figure.axes
    assert (choice.get_title(loc="left"), everything.get_title(loc="left")) == ("choice: 40 items", "all: 40 items")
    assert [[bar.get_width() for bar in group] for group in choice.containers] == [[25, 50], [2.5, 50], [72.5, 0]]
    assert [bar.get_x() for bar in choice.containers[2]] == [27.5, 100]
    # numbers of replies; a segment too narrow for its number has none
    assert [text for text in texts(choice) if text] == ["10", "20", "20", "29"]
    assert [label.get_text() for label in choice.get_yticklabels()] == ["mini", "smol"]
    (guess,) = choice.collections
    assert guess.get_segments()[0][:, 0].tolist() == [50, 50]
    assert [list(line.get_xdata()) for line in choice.lines] == [[12.5, 90], [25, 90]]


def test_the_loss_curve_shows_both_losses_over_all_steps():
    history = [Point(0, None, 3.0), Point(5, 2.0), Point(10, 1.0), Point(10, None, 1.5)]
    (axis,) = figures.loss_curve(history, 20, SUBJECT).axes
    training, held_out = axis.lines
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([5, 10], [2.0, 1.0])
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([0, 10], [3.0, 1.5])
    assert axis.get_xlim() == (0, 20)
    assert legend(axis) == ["training batches, now 1.000", "held-out examples, now 1.500"]
    assert figures.loss_curve([], 20, SUBJECT).axes[0].lines[:] == []


def test_the_nf4_figure_marks_every_value_on_the_density():
    code = nf4_code()
    figure = figures.nf4_code(code, [-1.0, 0.0, 0.1, 1.0], SUBJECT, NF4_TAIL)
    (axis,) = figure.axes
    assert texts(axis) == [f"{value:.2f}" for value in code]
    (stems,) = [lines for lines in axis.collections if len(lines.get_segments()) == 16]
    ends = {round(segment[1][0], 3): segment[1][1] for segment in stems.get_segments()}
    deviation = 1 / 1.8481  # the tail's quantile of the normal distribution
    assert ends[0.0] == pytest.approx(1 / (deviation * math.sqrt(2 * math.pi)), rel=1e-3)
    assert ends[1.0] == pytest.approx(ends[0.0] * math.exp(-(1.8481**2) / 2), rel=1e-3)
    assert SUBJECT in figure.get_suptitle()


def errors_of(*values):
    kinds = ("mlp.up", "attention.dense")
    return [LayerError(f"h.{n}.{kind}", value, 2 * value, 0, 8) for n, value in enumerate(values) for kind in kinds]


def test_layer_errors_are_grouped_by_kind():
    weights, outputs = figures.layer_errors({"bf16": errors_of(0, 0), "nf4": errors_of(0.1, 0.2)}, SUBJECT).axes
    assert [label.get_text() for label in outputs.get_xticklabels()] == ["dense\n2 layers", "up\n2 layers"]
    curves = [line.get_ydata() for line in outputs.lines if line.get_color() == figures.PALETTE[1]]
    assert [list(values) for values in curves] == [[0.2, 0.4], [0.2, 0.4]]
    assert all(math.isnan(y) for line in weights.lines if line.get_color() == figures.BLUE for y in line.get_ydata())
    assert weights.get_yscale() == outputs.get_yscale() == "log"


def test_a_reply_without_tokens_or_without_time_between_them_has_a_figure():
    """B4: a model that answers nothing; and tokens that were accepted together."""
    (axis,) = figures.token_times([], SUBJECT).axes
    assert [text.get_text() for text in axis.texts] == ["no token arrived"]
    (axis,) = figures.token_times([0.1, 0.1, 0.1], SUBJECT).axes
    assert any("median of the others: 0 ms" in label for label in axis.get_legend_handles_labels()[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_with_a_value_that_is_not_finite_is_refused(bad):
    """B1: matplotlib leaves such a point out without a word."""
    with pytest.raises(WorkbookError, match="The figure token_times has a value that is not finite"):
        figures.token_times([0.1, bad], SUBJECT)
    with pytest.raises(WorkbookError, match="layer_errors"):
        figures.layer_errors({"nf4": errors_of(bad, 0.2)}, SUBJECT)


def test_logarithmic_ticks_are_plain_numbers():
    figure = figures.layer_errors({"nf4": errors_of(0.011, 0.3)}, SUBJECT)
    FigureCanvasAgg(figure).draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"0.01", "0.02", "0.05"} <= set(shown)
    assert not any("$" in text for text in shown)


def test_quality_against_bytes_shows_intervals_and_the_claim():
    changes = {"int8": Interval(0.001, -0.002, 0.004), "nf4": Interval(0.03, 0.02, 0.05)}
    rows = [{"precision": p, "share": s, "change": changes[p]} for p, s in (("int8", 0.6), ("nf4", 0.4))]
    figure = figures.quality_against_bytes({"one (stand-in)": rows, "other": rows[:1]}, SUBJECT, 0.02)
    (axis,) = figure.axes
    first, second = axis.containers
    marks, _, (bars,) = first
    assert list(marks.get_xdata()) == pytest.approx([60, 40])
    assert [sorted(segment[:, 1]) for segment in bars.get_segments()] == [
        pytest.approx([-0.002, 0.004]),
        pytest.approx([0.02, 0.05]),
    ]
    assert len(second[0].get_xdata()) == 1
    assert texts(axis) == ["int8", "nf4", "int8"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["published: “almost no difference” (here ±0.02)", "one (stand-in)", "other"]


def speed_row(precision, batch_size, stored, speed=None, missing=""):
    spread = speed and _Spread(speed, 0.9 * speed, 1.2 * speed)
    return _SpeedRow("m", precision, batch_size, 8, 4, 3, stored, stored, 1e9, spread, spread, spread, 1, missing)


def test_speed_against_bytes_shows_runs_limit_and_the_claim():
    rows = [speed_row("int8", 1, 4 * MIB, 30.0), speed_row("nf4", 1, 2 * MIB, 40.0)]
    rows += [
        speed_row("int8", 16, 4 * MIB, missing="9.5 GiB missing for this batch"),
        speed_row("nf4", 16, 2 * MIB, 90.0),
    ]
    figure = figures.speed_against_bytes(rows, SUBJECT, interleaved=True)
    one, many = figure.axes
    assert one.get_title("left") == "batch size 1\nint8 / nf4: 0.75"
    assert " ".join(many.get_title("left").split("\n")[2:]) == "int8: 9.5 GiB missing for this batch"
    assert sorted(texts(one)) == ["int8", "nf4"]
    (limit,) = [line for line in one.lines if line.get_linestyle() == "--"]
    assert list(limit.get_ydata()) == pytest.approx([1e9 / (2 * MIB), 1e9 / (4 * MIB)])
    (bars,) = one.containers[0][2]
    assert sorted(bars.get_segments()[0][:, 1]) == pytest.approx([27, 36])
    assert "much faster" in figure.legends[0].get_title().get_text()
    assert "3 runs each, taken in turn" in figure.get_suptitle()
    assert (
        "one precision after the other" in figures.speed_against_bytes(rows, SUBJECT, interleaved=False).get_suptitle()
    )
