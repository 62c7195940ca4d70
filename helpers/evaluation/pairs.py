"""Compare two results on the same items: their difference, its interval, and a test if items are right or wrong.

Pairs tell small differences far better than two separate scores do: both results share the difficulty of each item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError, choose
from helpers.base.stats import Interval
from helpers.evaluation.harness import _Evaluation
from helpers.evaluation.likelihood import _Perplexity
from helpers.evaluation.options import _MultipleChoice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from helpers.evaluation.harness import ItemValues

Result = _MultipleChoice | _Perplexity | _Evaluation


@dataclass(frozen=True)
class _Paired:
    """Two results on the same ``count`` items; ``difference`` is the first minus the second.

    ``measure`` names what is compared: accuracy, bits per byte (less is better), or a metric of the harness.
    If items are right or wrong, ``only_first`` and ``only_second`` count those that only this result got right, and
    ``p_value`` is that of McNemar's exact test on these. For all other measures the three are None.
    """

    measure: str
    count: int
    first: float
    second: float
    difference: Interval
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None

    @property
    def detected(self) -> bool:
        """Whether zero lies outside the interval of the difference."""
        return not self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class _Measured:
    """What one result gives to a pair: a value and a weight per item. The measure is the quotient of their sums."""

    measure: str
    keys: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def quotient(self) -> float:
        return sum(self.values) / sum(self.weights)

    @property
    def are_outcomes(self) -> bool:
        """Whether every item is simply right (1) or wrong (0)."""
        return set(self.values) <= {0.0, 1.0}


def _paired(
    first: Result,
    second: Result,
    *,
    task: str | None = None,
    metric: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> _Paired:
    """Compare two results of ``multiple_choice``, ``perplexity`` or ``evaluate`` item by item.

    For results of the harness, ``task`` names one task or group; without it, the items of all tasks are taken together,
    each with the same weight. ``metric`` is acc by default, or the first metric that every task has. For
    ``perplexity`` the measure is bits per byte and the items are texts. The interval of the difference is that of
    ``stats.paired_difference``: a bootstrap over the items.
    Raises WorkbookError for results of different kinds or of different items, and for a task or metric that they do
    not have; ValueError for fewer than two items.
    """
    left, right = _measured(first, task, metric), _measured(second, task, metric)
    if left.measure != right.measure:
        raise WorkbookError(
            f"One result is of {left.measure}, the other of {right.measure}. Compare results of the same measure."
        )
    # A text cut at another length has the same beginning but other bytes, so the weights are compared too.
    if left.keys != right.keys or left.weights != right.weights:
        raise WorkbookError("The results are not of the same items in the same order. Measure both on the same items.")
    difference = stats.paired_difference(left.values, right.values, left.weights, confidence=confidence, seed=seed)
    pair = _Paired(left.measure, len(left.keys), left.quotient, right.quotient, difference)
    if not (left.are_outcomes and right.are_outcomes):
        return pair
    left_correct = [value > 0 for value in left.values]
    right_correct = [value > 0 for value in right.values]
    only_first, only_second = stats.discordant_pairs(left_correct, right_correct)
    p_value = stats.mcnemar(left_correct, right_correct)
    return replace(pair, only_first=only_first, only_second=only_second, p_value=p_value)


def _measured(result: Result, task: str | None, metric: str | None) -> _Measured:
    if isinstance(result, _Evaluation):
        return _of_tasks(result, task, metric)
    if task is not None or metric is not None:
        raise WorkbookError("task and metric are for results of evaluate. Leave them out for other results.")
    if isinstance(result, _Perplexity):
        sizes = tuple(float(size) for size in result.text_bytes)
        return _Measured("bits per byte", result.text_keys, result.bits, sizes)
    outcomes = tuple(float(correct) for correct in result.correct)
    # A result made by hand may have no keys; its items are then known by their order and answers.
    keys = result.keys or tuple(f"{number}:{answer}" for number, answer in enumerate(result.answers))
    return _Measured("accuracy", keys, outcomes, (1.0,) * len(keys))


def _of_tasks(result: _Evaluation, task: str | None, metric: str | None) -> _Measured:
    names = _task_names(result, task)
    chosen = _shared_metric(result, names, metric)
    keys: list[str] = []
    values: list[float] = []
    weights: list[float] = []
    for name in names:
        scores = result.items[name]
        keys += scores.keys
        for value, weight in _weighted(scores.values[chosen]):
            values.append(value)
            weights.append(weight)
    measure = "bits per byte" if chosen == "bits_per_byte" else chosen
    return _Measured(measure, tuple(keys), tuple(values), tuple(weights))


def _task_names(result: _Evaluation, task: str | None) -> tuple[str, ...]:
    """The tasks that ``task`` names: itself, the members of a group, or for None all."""
    if task is None:
        return tuple(result.items)
    names = result.groups.get(task, (task,))
    if not set(names) <= result.items.keys():
        choose(str(task), [*result.groups, *result.items], "task")
    return names


def _shared_metric(result: _Evaluation, names: Sequence[str], metric: str | None) -> str:
    """The metric to compare by, checked to be one of every task."""
    # A dictionary, not a set: without acc the first metric is taken, in the order of the harness.
    shared = dict.fromkeys(result.items[names[0]].values)
    for name in names[1:]:
        for other in shared.keys() - result.items[name].values.keys():
            del shared[other]
    if metric is not None:
        return choose(metric, shared, "metric")
    if not shared:
        raise WorkbookError("The tasks have no metric in common. Compare them one by one: name a task.")
    if "acc" in shared:
        return "acc"
    return next(iter(shared))


def _weighted(values: ItemValues) -> Iterator[tuple[float, float]]:
    """(value, weight) of each item; a log-likelihood in nats becomes a loss in bits."""
    for value in values:
        if isinstance(value, tuple):
            log_likelihood, size = value
            yield -log_likelihood / math.log(2), size
        else:
            yield value, 1.0
