"""Exercises of notebook 00: cache, training compute, context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.verdict import _is_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.exercises.verdict import Check, Hint

_FALCON = "tiiuae/falcon-180B"
_SECONDS_PER_DAY = 86400


def _kv_bytes(function: Callable[[int, int, int, int], int]) -> Hint:
    # The second case is Falcon's with all query heads; the others differ in one factor each, so that none goes unseen.
    cases = [(80, 8, 64, 2), (80, 232, 64, 2), (80, 8, 128, 2), (8, 2, 32, 4)]
    for layers, heads, head_dim, size in cases:
        if function(layers, heads, head_dim, size) != 2 * layers * heads * head_dim * size:
            return (
                f"The result for {layers} layers and {heads} heads of {head_dim} is wrong. "
                "Are both keys and values counted?"
            )
    return None


def _training_days(days: float) -> Hint:
    from helpers.machine import anatomy, sharding

    # 4096 A100s at 40% of their bf16 peak of 312 TFLOP/s (NVIDIA's data sheet), for the 3.5T tokens of the article.
    flop = sharding.training_flop(anatomy.count_parameters(anatomy.published_config(_FALCON)), 3.5e12)
    expected = flop / (4096 * 312e12 * 0.4) / _SECONDS_PER_DAY
    if _is_close(days, expected, 0.02):
        return None
    return "Divide 6·N·D by what 4096 GPUs do in a second at 40% of 312 TFLOP/s, then by the seconds of a day."


def _longest_context(tokens: int) -> Hint:
    from helpers.machine import anatomy, memory

    config = anatomy.published_config(_FALCON)
    free = 8 * 80e9 - memory.weight_bytes(config, "bf16")
    if _is_close(tokens, free / memory.kv_bytes_per_token(config, "bf16", heads="library"), 0.01):
        return None
    return "Subtract the bytes of the weights from 640 GB, then divide by the cache bytes per token with all 232 heads."


CHECKS: dict[str, Check] = {"00-1": _kv_bytes, "00-2": _training_days, "00-3": _longest_context}
