"""Two results on the same items: the difference with its width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from helpers import stats
from helpers.evaluation.choices import MultipleChoice
from helpers.evaluation.harness import Evaluation
from helpers.evaluation.likelihood import Perplexity
from helpers.types import Interval, WorkbookError, choose

Result = MultipleChoice | Perplexity | Evaluation


@dataclass(frozen=True)
class Paired:
    """The first result beside the second on the same ``count`` items; ``difference`` is first minus second.

    ``measure`` names what is compared: accuracy, bits per byte (less is better), or a metric of the harness.
    only_first, only_second: where items are right or wrong, how many only the one got right; ``p_value`` is that of
    McNemar's exact test on these. None for all other measures.
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
        """Whether the interval of the difference leaves out zero."""
        return not self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class _Measured:
    """What one result gives to a pair: a value and a weight for each item; the measure is their quotient of sums."""

    measure: str
    keys: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]


def paired(
    first: Result,
    second: Result,
    *,
    task: str | None = None,
    metric: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compares two results of ``multiple_choice``, ``perplexity`` or ``evaluate`` item by item.

    For results of the harness ``task`` names one task or group, unless given all tasks' items are taken together, each
    weighing the same; ``metric`` is, unless given, acc, or the first that every task has. For ``perplexity`` the
    measure is bits per byte and the items are texts. The interval of the difference is a bootstrap over the items,
    drawn in pairs (``stats.paired_bootstrap``). Right and wrong answers that differ on no item leave a bootstrap
    nothing to draw: then the interval is that of Clopper and Pearson for the share of items that would differ, both
    ways, which no difference can exceed.
    Raises WorkbookError for results of different kinds, or not of the same items, and for a task or metric that is not
    in them; ValueError for fewer than two items.
    """
    one, other = (_measured(result, task, metric) for result in (first, second))
    if one.measure != other.measure:
        raise WorkbookError(f"One result is of {one.measure}, the other of {other.measure}: compare like with like.")
    if one.keys != other.keys or one.weights != other.weights:
        raise WorkbookError("The results are not of the same items in the same order: measure both on the same ones.")
    difference = stats.paired_bootstrap(one.values, other.values, one.weights, confidence=confidence, seed=seed)
    found = Paired(one.measure, len(one.keys), _total(one), _total(other), difference)
    if not {*one.values, *other.values} <= {0.0, 1.0}:
        return found
    alone = [
        sum(a > b for a, b in zip(left, right, strict=True))
        for left, right in ((one.values, other.values), (other.values, one.values))
    ]
    if not any(alone):
        most = stats.most_without_one(len(one.keys), confidence)
        difference = Interval(0.0, -most, most, confidence)
    p_value = stats.mcnemar([v > 0 for v in one.values], [v > 0 for v in other.values])
    return Paired(one.measure, found.count, found.first, found.second, difference, *alone, p_value)


def _total(measured: _Measured) -> float:
    return sum(measured.values) / sum(measured.weights)


def _measured(result: Result, task: str | None, metric: str | None) -> _Measured:
    if isinstance(result, Evaluation):
        return _of_tasks(result, task, metric)
    if task is not None or metric is not None:
        raise WorkbookError("task and metric are for results of evaluate.")
    if isinstance(result, Perplexity):
        return _Measured("bits per byte", result.text_keys, result.bits, tuple(map(float, result.text_bytes)))
    keys = result.keys or tuple(f"{place}:{answer}" for place, answer in enumerate(result.answers))
    return _Measured("accuracy", keys, tuple(map(float, result.correct)), (1.0,) * len(keys))


def _of_tasks(result: Evaluation, task: str | None, metric: str | None) -> _Measured:
    names = tuple(result.items) if task is None else result.groups.get(task, (task,))
    if not set(names) <= result.items.keys():
        choose(str(task), [*result.groups, *result.items], "task")
    shared = [m for m in result.items[names[0]].values if all(m in result.items[name].values for name in names)]
    chosen = metric or ("acc" if "acc" in shared else next(iter(shared), None))
    if chosen not in shared:
        choose(str(metric), shared, "metric")
    pairs = [pair for name in names for pair in _pairs(result.items[name].values[chosen], chosen)]
    keys = tuple(key for name in names for key in result.items[name].keys)
    measure = "bits per byte" if chosen == "bits_per_byte" else chosen
    return _Measured(measure, keys, tuple(value for value, _ in pairs), tuple(weight for _, weight in pairs))


def _pairs(values: Sequence, metric: str) -> list[tuple[float, float]]:
    """(value, weight) of each item; a log-likelihood in nats becomes a loss in bits."""
    if metric == "bits_per_byte":
        return [(-total / math.log(2), size) for total, size in values]
    return [(value, 1.0) for value in values]
