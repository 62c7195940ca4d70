"""Measure the average of the Open LLM Leaderboard of 2023, which the article quotes: four tasks and their mean.

The tasks' own files and their data sets come from the harness and the hub, or from a folder. The installed harness is
newer than the leaderboard's, so differences of a few tenths are not meaningful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.evaluation.harness import _measure
from helpers.evaluation.tasks import TASKS, _prepared

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pandas import DataFrame

    from helpers.evaluation.harness import _Evaluation, _EvaluationRow
    from helpers.models.loaded import Loaded

_GROUP = "leaderboard_2023"
_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc"}
PUBLISHED = {"Falcon-180B": 68.74, "Llama 2": 67.35}  # averages when Falcon-180B was announced, September 2023
_BATCH_SIZE = 4  # requests of 25 examples are long


@dataclass(frozen=True)
class _LeaderboardScore:
    """One task in percent, with its standard error; ``count`` items after ``shots`` solved examples each."""

    task: str
    shots: int
    metric: str
    score: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Leaderboard:
    """The four scores of a model; ``version`` is the harness', ``limit`` the items of each task (None: all of them).

    truncated: how many requests lost their beginning because they take more tokens than the context.
    """

    model: str
    precision: str
    scores: tuple[_LeaderboardScore, ...]
    version: str
    limit: int | None
    truncated: int

    @property
    def average(self) -> float:
        """The mean of the four scores, in percent."""
        return math.fsum(score.score for score in self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of the average of four independent tasks: the root of their summed variances, over four."""
        return math.hypot(*(score.standard_error for score in self.scores)) / len(self.scores)

    @property
    def published(self) -> dict[str, float]:
        """The published averages to compare with, in percent."""
        return dict(PUBLISHED)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the average needs to know."""
        notes = [
            f"lm-evaluation-harness {self.version}; the leaderboard used that of 2023, so differences of a few tenths "
            "are not meaningful"
        ]
        if self.limit:
            notes.append(f"the first {self.limit} items of each task only: this is not the leaderboard's average")
        if self.truncated:
            notes.append(f"{self.truncated} requests lost their beginning: they take more tokens than the context")
        return tuple(notes)

    def table(self) -> DataFrame:
        """The four scores, the average, and the published averages, in percent."""
        import pandas as pd

        rows = [vars(score) for score in self.scores]
        rows.append({"task": "average", "score": self.average, "standard_error": self.standard_error})
        for name, value in self.published.items():
            rows.append({"task": f"published average, {name}", "score": value})
        return pd.DataFrame(rows).set_index("task")


def leaderboard_average(
    load: Callable[[], Loaded], *, limit: int | None = None, folder: Path = TASKS, batch_size: int = _BATCH_SIZE
) -> Leaderboard:
    """Measure the leaderboard's four tasks with its shots and metrics of 2023, through the installed harness.

    ARC-challenge 25-shot acc_norm, HellaSwag 10-shot acc_norm, MMLU 5-shot acc, TruthfulQA-MC2 0-shot. As on the
    leaderboard, MMLU is the mean of its subjects, each with the same weight. The harness of 2023 drew other examples,
    so differences of a few tenths are not meaningful. ``load`` returns the model; it is called once the data are there.
    ``folder`` may hold task files of the four names, for example with local data, which replace the harness' own.
    Raises WorkbookError if a data set cannot be downloaded, or for a limit below 2, which has no error.
    """
    if limit is not None and limit < 2:
        raise WorkbookError(f"limit must be at least 2, or there is no standard error, but is {limit}.")
    with _prepared([_GROUP], folder) as tasks:
        loaded = load()
        evaluation = _measure(loaded, tasks, limit, batch_size=batch_size, truncate=True)
    scores = tuple(_score(evaluation, task, metric) for task, metric in _METRICS.items())
    return Leaderboard(
        loaded.ref.label, loaded.report.precision, scores, evaluation.version, limit, evaluation.truncated
    )


def _score(evaluation: _Evaluation, task: str, metric: str) -> _LeaderboardScore:
    """The unweighted mean over the members of a group (of a single task: itself), in percent."""
    members = evaluation.groups.get(task, (task,))
    values, errors, count = [], [], 0
    for member in members:
        row = _row(evaluation, member, metric)
        values.append(row.value)
        # A limit of 1 is refused, and all four metrics are means: each of them has a standard error.
        errors.append(row.standard_error or 0.0)
        count += row.count
    value = math.fsum(values) / len(members)
    error = math.hypot(*errors) / len(members)
    return _LeaderboardScore(task, row.shots, metric, 100 * value, 100 * error, count)


def _row(evaluation: _Evaluation, task: str, metric: str) -> _EvaluationRow:
    return next(row for row in evaluation.rows if (row.task, row.metric) == (task, metric))
