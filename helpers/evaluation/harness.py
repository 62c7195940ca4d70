"""Measure a loaded model with the tasks of EleutherAI's lm-evaluation-harness.

``evaluate`` prepares the tasks (``tasks.py``), shows the harness the model in its own chat format, and turns what the
harness returns into rows and into values by item, which ``pairs.py`` compares. The harness' lower interface,
``evaluator.evaluate``, is used: ``simple_evaluate`` also seeds all random generators, asks the hub for the model's
commit and collects facts on the machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from helpers.base.errors import WorkbookError
from helpers.evaluation.harness_model import _harness_model
from helpers.evaluation.options import _OPTION_BATCH
from helpers.evaluation.tasks import TASKS, _only_errors, _prepared
from helpers.models.finite import explained
from helpers.models.loaded import inference
from helpers.models.workarounds.lm_eval_model import same_random_state, slow_bars_only

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from lm_eval.tasks.manager import TaskDict
    from pandas import DataFrame

    from helpers.evaluation.tasks import _PreparedTasks
    from helpers.models.loaded import Loaded

ItemValues = tuple[float, ...] | tuple[tuple[float, float], ...]
_BOOTSTRAPS = 1000  # for the errors of metrics without a formula, such as LAMBADA's perplexity


@dataclass(frozen=True)
class _EvaluationRow:
    """One metric of one task, over ``count`` items; ``standard_error`` is the harness' own, None if it gives none.

    shots: the number of solved examples before each item.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    count: int
    shots: int = 0


@dataclass(frozen=True)
class _ItemScores:
    """One task item by item: ``keys`` are the harness' hashes of the items, ``values`` by metric those of the items.

    The value of an item is a number, or for bits_per_byte a pair: its log-likelihood in nats and its bytes.
    """

    keys: tuple[str, ...]
    values: Mapping[str, ItemValues]


@dataclass(frozen=True)
class _Evaluation:
    """What lm-evaluation-harness measured; ``version`` is the harness' own.

    log_likelihoods: for each multiple-choice task, the log-likelihoods (nats) of each item's options; items: every task
    item by item; groups: the tasks of each group; truncated: how many requests lost their beginning to fit the context.
    """

    rows: tuple[_EvaluationRow, ...]
    log_likelihoods: Mapping[str, tuple[tuple[float, ...], ...]]
    version: str
    items: Mapping[str, _ItemScores] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    truncated: int = 0

    def table(self) -> DataFrame:
        """One row for each metric of each task."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def evaluate(
    loaded: Loaded,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    folder: Path = TASKS,
    batch_size: int = _OPTION_BATCH,
    truncate: bool = False,
) -> _Evaluation:
    """Run EleutherAI's lm-evaluation-harness over tasks or groups, by the name that their file gives them.

    A name is looked up in ``folder``, then in notebooks/data/tasks/, then among the harness' own tasks, which takes
    half a minute; their data sets come from the hub. ``data_files`` of a task in the two folders map each split to one
    file name, relative to the task's file. Tasks with ``chat: true`` in their ``metadata`` are asked in the model's
    chat format, and answers begin as its replies do; generated answers are those of ``generate``, which also end at the
    task's own stop strings. All other tasks are asked as plain text. ``limit`` takes only the first
    items of each task. With ``truncate``, an item with more tokens than the context loses its beginning, as is usual,
    and is counted. (The harness' own command line does not know the chat format.) The random state stays as it was.
    Raises WorkbookError for an unknown task, listing the known ones, for a limit below 1, or if an item has more tokens
    than the context, or if a data set cannot be downloaded.
    """
    if limit is not None and limit < 1:
        raise WorkbookError(f"limit must be at least 1, but is {limit}.")
    with _prepared(tasks, folder) as prepared:
        return _measure(loaded, prepared, limit, batch_size=batch_size, truncate=truncate)


def _measure(
    loaded: Loaded,
    tasks: _PreparedTasks,
    limit: int | None = None,
    *,
    batch_size: int = _OPTION_BATCH,
    truncate: bool = False,
) -> _Evaluation:
    """``evaluate`` over tasks that are prepared."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    parts = []
    bars = slow_bars_only(lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    quiet = _only_errors(logging.getLogger("lm_eval"))
    with bars, same_random_state(), explained(loaded), inference(loaded.model), quiet:
        for chat, chosen in ((False, tasks.plain), (True, tasks.chat)):
            if not chosen["tasks"]:
                continue
            model = _harness_model(loaded, chat, batch_size, truncate)
            results = lm_eval.evaluator.evaluate(
                model,
                chosen,
                limit=limit,
                bootstrap_iters=_BOOTSTRAPS,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
            parts.append(_evaluation(results, chosen, model.truncated, lm_eval.__version__))
    return _joined(parts)


def choice_rows(rows: Dataset) -> Dataset:
    """The rows of animal_items.jsonl that are a choice: ``process_docs`` of the harness' task animal_choice."""
    return rows.select([number for number, kind in enumerate(rows["kind"]) if kind == "choice"])


def _evaluation(results: Mapping[str, Any], tasks: TaskDict, truncated: int, version: str) -> _Evaluation:
    samples: Mapping[str, list[dict[str, Any]]] = results["samples"]
    groups, rows, items, log_likelihoods = {}, [], {}, {}
    for name, group in tasks["groups"].items():
        groups[name] = tuple(task.task_name for task in group.get_all_tasks())
        rows += _rows(name, results)
    for name, task in tasks["tasks"].items():
        rows += _rows(name, results)
        items[name] = _items(name, samples[name])
        if task.OUTPUT_TYPE == "multiple_choice":
            log_likelihoods[name] = tuple(_option_values(item) for item in samples[name])
    return _Evaluation(tuple(rows), log_likelihoods, version, items, groups, truncated)


def _option_values(item: Mapping[str, Any]) -> tuple[float, ...]:
    """The log-likelihood of each option; the harness pairs it with whether the option is the greedy reply."""
    return tuple(log_likelihood for log_likelihood, _ in item["filtered_resps"])


def _joined(parts: Sequence[_Evaluation]) -> _Evaluation:
    rows: list[_EvaluationRow] = []
    log_likelihoods: dict[str, tuple[tuple[float, ...], ...]] = {}
    items: dict[str, _ItemScores] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for part in parts:
        rows += part.rows
        log_likelihoods |= part.log_likelihoods
        items |= part.items
        groups |= part.groups
    truncated = sum(part.truncated for part in parts)
    return _Evaluation(tuple(rows), log_likelihoods, parts[0].version, items, groups, truncated)


def _rows(name: str, results: Mapping[str, Any]) -> list[_EvaluationRow]:
    """The metrics of a task or group: the harness keys each "metric,filter", and its error "metric_stderr,filter"."""
    values = results["results"][name]
    shots = results["n-shot"].get(name, 0)
    rows = []
    for key in values:
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        # A metric without an error has the text "N/A" in its place; a single item has the error nan.
        standard_error = float(error) if isinstance(error, float) and math.isfinite(error) else None
        if not math.isfinite(values[key]):
            raise WorkbookError(f"The harness gives {values[key]} for {metric} of {name}. Look at its single items.")
        rows.append(_EvaluationRow(name, metric, values[key], standard_error, values["sample_len"], shots))
    return rows


def _items(name: str, samples: Sequence[Mapping[str, Any]]) -> _ItemScores:
    """The items of a task in their order, under its first filter."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    keys = tuple(f"{name}:{sample['doc_id']}:{sample['doc_hash']}" for sample in first)
    values: dict[str, ItemValues] = {}
    for metric in first[0]["metrics"]:
        of_items = [sample[metric] for sample in first]
        if metric == "bits_per_byte":
            values[metric] = tuple((float(log_likelihood), float(size)) for log_likelihood, size in of_items)
        elif not isinstance(of_items[0], tuple):
            values[metric] = tuple(map(float, of_items))
    return _ItemScores(keys, values)
