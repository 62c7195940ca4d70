"""The Open LLM Leaderboard of 2023: four tasks, and their average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.evaluation.harness import TASKS, Evaluation, EvaluationRow, measure, prepared
from helpers.types import Loaded, WorkbookError

if TYPE_CHECKING:
    from pandas import DataFrame

GROUP = "leaderboard_2023"
METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc"}
PUBLISHED = {"Falcon-180B": 68.74, "Llama 2": 67.35}  # averages when Falcon-180B was announced, September 2023
BATCH = 4  # requests of 25 examples are long


@dataclass(frozen=True)
class LeaderboardScore:
    """One task in percent, with its standard error; ``count`` items after ``shots`` solved examples each."""

    task: str
    shots: int
    metric: str
    score: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Leaderboard:
    """The four scores of a model; ``version`` is the harness', ``limit`` the items of each task, None: all of them.

    truncated: the requests that lost their beginning because they take more tokens than the context.
    """

    model: str
    precision: str
    scores: tuple[LeaderboardScore, ...]
    version: str
    limit: int | None
    truncated: int

    @property
    def average(self) -> float:
        """The mean of the four scores, in percent."""
        return math.fsum(score.score for score in self.scores) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """Of the average: the four tasks' items are independent, so their variances add up, over 4 squared."""
        return math.sqrt(math.fsum(score.standard_error**2 for score in self.scores)) / len(self.scores)

    @property
    def published(self) -> dict[str, float]:
        """The averages to put it beside, in percent."""
        return dict(PUBLISHED)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the average has to know."""
        notes = [f"lm-evaluation-harness {self.version}; the leaderboard's was of 2023, so some tenths are no finding"]
        if self.limit:
            notes.append(f"the first {self.limit} items of each task only: this is not the leaderboard's average")
        if self.truncated:
            notes.append(f"{self.truncated} requests lost their beginning: they take more tokens than the context")
        return tuple(notes)

    def table(self) -> DataFrame:
        """The four scores, the average, and the published averages, in percent."""
        import pandas as pd

        rows = [vars(score) for score in self.scores]
        rows += [{"task": "average", "score": self.average, "standard_error": self.standard_error}]
        rows += [{"task": f"published average, {name}", "score": value} for name, value in self.published.items()]
        return pd.DataFrame(rows).set_index("task")


def leaderboard_average(
    load: Callable[[], Loaded], *, limit: int | None = None, folder: Path = TASKS, batch_size: int = BATCH
) -> Leaderboard:
    """The leaderboard's four tasks with its shots and metrics of 2023, through the harness that is installed here.

    ARC-challenge 25-shot acc_norm, HellaSwag 10-shot acc_norm, MMLU 5-shot acc, TruthfulQA-MC2 0-shot. As there, MMLU
    is the mean of its subjects, each weighing the same. The harness of 2023 drew other examples, so a difference of
    some tenths is no finding. ``load`` gives the model and is called when the data are there. ``folder`` may hold task
    files of the four names that take the place of the harness' own, with local data perhaps.
    Raises DataUnavailable where a data set cannot be had, WorkbookError for a limit below 2, which has no error.
    """
    if limit is not None and limit < 2:
        raise WorkbookError(f"limit must be at least 2, or there is no standard error, but is {limit}.")
    with prepared([GROUP], folder) as tasks:
        loaded = load()
        found = measure(loaded, tasks, limit, batch_size=batch_size, truncate=True)
    scores = tuple(_score(found, task, metric) for task, metric in METRICS.items())
    return Leaderboard(loaded.ref.label, loaded.report.precision, scores, found.version, limit, found.truncated)


def _score(found: Evaluation, task: str, metric: str) -> LeaderboardScore:
    """The unweighted mean over the members of a group (a single task: itself), in percent."""
    members = found.groups.get(task, (task,))
    rows = [_row(found, member, metric) for member in members]
    value = math.fsum(row.value for row in rows) / len(rows)
    error = math.sqrt(math.fsum(row.standard_error**2 for row in rows)) / len(rows)
    return LeaderboardScore(task, rows[0].shots, metric, 100 * value, 100 * error, sum(row.count for row in rows))


def _row(found: Evaluation, task: str, metric: str) -> EvaluationRow:
    return next(row for row in found.rows if (row.task, row.metric) == (task, metric))
