"""Every figure of the workbook, drawn with matplotlib from plain data: how does it look as a picture?"""

from helpers.figures.memory import (
    cache_growth,
    memory_by_precision,
    memory_per_device,
    parameter_breakdown,
    part_name,
    placement,
    training_compute,
)
from helpers.figures.precision import (
    layer_errors,
    logit_differences,
    nf4_code,
    precision_comparison,
    quality_against_bytes,
)
from helpers.figures.replies import loss_curve, next_token_probabilities, score_intervals, token_times, visible
from helpers.figures.speed import cache_speed, engine_speeds, speed_against_bytes
from helpers.figures.style import BLUE, PALETTE, png

__all__ = [
    "BLUE",
    "PALETTE",
    "cache_growth",
    "cache_speed",
    "engine_speeds",
    "layer_errors",
    "logit_differences",
    "loss_curve",
    "memory_by_precision",
    "memory_per_device",
    "next_token_probabilities",
    "nf4_code",
    "parameter_breakdown",
    "part_name",
    "placement",
    "png",
    "precision_comparison",
    "quality_against_bytes",
    "score_intervals",
    "speed_against_bytes",
    "token_times",
    "training_compute",
    "visible",
]
