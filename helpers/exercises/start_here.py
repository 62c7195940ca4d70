"""Exercises of notebook 00: cache, training compute, context, the smallest machine for a load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.reading import _expected, _is_close, _number, _numbers, _other_unit, _UnreadableError
from helpers.exercises.verdict import _Exercise, _Found

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.exercises.verdict import Outcome

_FALCON = "tiiuae/falcon-180B"
_SECONDS_PER_DAY = 86400
_GIGABYTES = (24, 40, 48, 80, 96, 141)  # of the cards that exercise 4 offers
_REPLIES, _CONTEXT = 8, 2048  # the load of exercise 4


def _kv_bytes(function: Callable[[int, int, int, int], object]) -> Outcome:
    # The second case is Falcon's with all query heads; the others differ in one factor each, so that none goes unseen.
    cases = [(80, 8, 64, 2), (80, 232, 64, 2), (80, 8, 128, 2), (8, 2, 32, 4)]
    for layers, heads, head_dim, size in cases:
        given, expected = _number(function(layers, heads, head_dim, size)), 2 * layers * heads * head_dim * size
        if given == expected:
            continue
        if off := _other_unit(given, expected, {"in KiB": 1 / 2**10, "in bits": 8}, 1e-9):
            return f"{off} Return bytes."
        return (
            f"For {layers} layers, {heads} heads of {head_dim} numbers and {size} bytes each it returns {given:,.0f}, "
            "which is not right."
        )
    return None


def _training_days(answer: object) -> Outcome:
    from helpers.machine import anatomy, sharding

    # 4096 A100s at 40% of their bf16 peak of 312 TFLOP/s (NVIDIA's data sheet), for the 3.5T tokens of the article.
    flop = sharding.training_flop(anatomy.count_parameters(anatomy.published_config(_FALCON)), 3.5e12)
    days, expected = _number(answer), flop / (4096 * 312e12 * 0.4) / _SECONDS_PER_DAY
    if _is_close(days, expected, 0.02):
        return None
    if off := _other_unit(days, expected, {"in seconds": _SECONDS_PER_DAY, "in hours": 24, "in years": 1 / 365.25}):
        return f"{off} Give days."
    if _is_close(days, expected * 0.4):
        return "That is the time at the full peak. The GPUs reach only a share of it."
    if _is_close(days, expected * 4096):
        return "That is the time of a single GPU."
    return f"{days:,.4g} days is not right."


def _longest_context(answer: object) -> Outcome:
    from helpers.machine import anatomy, memory

    config = anatomy.published_config(_FALCON)
    tokens, free = _number(answer), 8 * 80e9 - memory.weight_bytes(config, "bf16")
    per_token = memory.kv_bytes_per_token(config, "bf16", heads="library")
    if _is_close(tokens, free / per_token):
        return None
    if _is_close(tokens, 8 * 80e9 / per_token):
        return "That leaves no memory for the weights."
    if _is_close(tokens, free / memory.kv_bytes_per_token(config, "bf16", heads="kv")):
        return "That is the answer for a cache of 8 heads. How many does transformers itself store?"
    return f"{tokens:,.0f} tokens is not right. (80 GB are 80e9 bytes here.)"


def _smallest_machine(answer: object) -> Outcome:
    from helpers.base.units import gib
    from helpers.machine import anatomy, memory, placement

    config = anatomy.published_config(_FALCON)
    load = memory.Workload(batch_size=_REPLIES, context_tokens=_CONTEXT)
    count, size = _machine(answer)
    placed = placement.place(config, "int8", [size * 1e9] * count, workload=load)
    if placed.shortfall:
        return f"{count} GPUs of {size} GB do not hold it: it {placed.shortfall}."
    for other in _GIGABYTES:
        least = placement.least_gpus([placement.Resident(config, "int8")], other * 1e9, load)
        if least is not None and least * other < count * size:
            return f"It fits, but {count * size} GB is not the least: the planner finds a machine of fewer bytes."
    total = memory.estimate(config, "int8", workload=load).total
    return _Found(
        f"No machine of these cards with fewer bytes holds it. The load itself is {gib(total)}, the machine has "
        f"{gib(count * size * 1e9)}: whole layers, and what stays free on each GPU, take the rest."
    )


def _machine(answer: object) -> tuple[int, int]:
    """The number of GPUs and the gigabytes of each; a mapping or a pair. Raises _UnreadableError for another answer."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    count, size = _numbers(answer, 2)
    if size >= 1e9:
        size /= 1e9
    if size not in _GIGABYTES and count in _GIGABYTES:
        raise _UnreadableError("Give the number of GPUs first, then the gigabytes of one.")
    if size not in _GIGABYTES:
        raise _UnreadableError(f"The cards have {', '.join(map(str, _GIGABYTES))} GB; {size:g} is not among them.")
    if count < 1 or count != int(count):
        raise _UnreadableError(_expected("a whole number of GPUs", count))
    return int(count), int(size)


EXERCISES = {
    "00-1": _Exercise(
        _kv_bytes,
        (
            "The notebook describes what a token leaves in the cache. Does each head keep one vector, or more?",
            "Change one argument at a time: if a head has twice as many numbers, how should the result change?",
        ),
    ),
    "00-2": _Exercise(
        _training_days,
        (
            "The notebook computes how many operations a training takes. Which quantities does that need?",
            "How many of these operations does one GPU do in a second, if it reaches the given share of its peak?",
            "4096 GPUs work at the same time. The time in seconds is not yet the time in days.",
        ),
    ),
    "00-3": _Exercise(
        _longest_context,
        (
            "The cache gets the memory that the weights leave. Both are counted in bytes: 1 GB is 1e9 bytes here.",
            "machine.kv_bytes_per_token knows two numbers of heads; its documentation names them (put ? after it).",
        ),
    ),
    "00-4": _Exercise(
        _smallest_machine,
        (
            "The sum of the bytes is only a lower bound: a GPU holds whole layers, and keeps a part free.",
            "machine.least_gpus says how many GPUs of one size do. Ask it for each size.",
            "Compare the sum of the bytes of each machine, not the number of GPUs.",
        ),
    ),
}
