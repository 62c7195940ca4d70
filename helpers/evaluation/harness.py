"""The bridge to EleutherAI's lm-evaluation-harness.

Its lower interface, ``evaluator.evaluate``, is used: ``simple_evaluate`` also seeds all random generators, asks the hub
for the model's commit and collects facts on the machine.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from helpers.evaluation.choices import BATCH_SIZE, check_room
from helpers.generation import context_tokens, inference, input_device
from helpers.types import ROOT, Loaded, Message, WorkbookError
from helpers.workarounds.lm_eval_model import logits_without_cache, same_random_state, slow_bars_only, untied_copy

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from pandas import DataFrame

TASKS = ROOT / "notebooks/data/tasks"
FEWSHOT_SEED = 1234  # the harness' own
BOOTSTRAPS = 1000  # for the errors of metrics without a formula, such as LAMBADA's perplexity


class DataUnavailable(WorkbookError):
    """A task's data set is neither on this machine nor to be had from the hub."""

    exit_code = 1


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one task, over ``count`` items; ``standard_error`` is the harness' own, None where it has none.

    shots: the solved examples before each item.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    count: int
    shots: int = 0


@dataclass(frozen=True)
class ItemScores:
    """One task item by item: ``keys`` are the harness' hashes of the items, ``values`` what each metric made of each.

    The value of an item is a number, or for bits_per_byte a pair: its log-likelihood in nats and its bytes.
    """

    keys: tuple[str, ...]
    values: Mapping[str, tuple[float, ...] | tuple[tuple[float, float], ...]]


@dataclass(frozen=True)
class Evaluation:
    """What lm-evaluation-harness measured; ``version`` is the harness' own.

    log_likelihoods: by task of multiple choice, the log-likelihoods (nats) of each item's options; items: every task
    item by item; groups: the tasks of each group; truncated: the requests that lost their beginning to fit the context.
    """

    rows: tuple[EvaluationRow, ...]
    log_likelihoods: Mapping[str, tuple[tuple[float, ...], ...]]
    version: str
    items: Mapping[str, ItemScores] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    truncated: int = 0

    def table(self) -> DataFrame:
        """One row for each metric of each task."""
        import pandas as pd

        return pd.DataFrame(self.rows)


@dataclass(frozen=True)
class Prepared:
    """Tasks with their data: those asked as plain text, and those asked in the chat format (``prepared``)."""

    plain: TaskDict
    chat: TaskDict


def evaluate(
    loaded: Loaded,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    folder: Path = TASKS,
    batch_size: int = BATCH_SIZE,
    truncate: bool = False,
) -> Evaluation:
    """Runs EleutherAI's lm-evaluation-harness over tasks or groups, by the name that their file gives them.

    They are looked for in ``folder``, then in notebooks/data/tasks/, then among the harness' own, which takes half a
    minute, and whose data sets come from the hub. ``data_files`` of a task in the two folders map each split to one
    file name, relative to the task's file. Tasks with ``chat: true`` in their ``metadata`` are asked in the model's
    chat format, and answers begin as its replies do; all others as plain text. ``limit`` takes the first items of each
    task only. With ``truncate`` an item that takes more tokens than the context loses its beginning, as is usual, and
    is counted. The harness' own command line would not know the chat format. The random state stays as it was.
    Raises WorkbookError for an unknown task, listing the tasks there are, for a limit below 1, or where an item takes
    more tokens than the context; DataUnavailable where a data set cannot be had.
    """
    check_limit(limit)
    with prepared(tasks, folder) as found:
        return measure(loaded, found, limit, batch_size=batch_size, truncate=truncate)


def check_limit(limit: int | None) -> None:
    """Raises WorkbookError for a limit below 1."""
    if limit is not None and limit < 1:
        raise WorkbookError(f"limit must be at least 1, but is {limit}.")


@contextmanager
def prepared(names: Sequence[str], folder: Path = TASKS) -> Iterator[Prepared]:
    """The tasks or groups of these names with their data, which needs no model. Local data lie in a temporary cache.

    Raises WorkbookError for an unknown task, DataUnavailable where a data set cannot be had, both as ``evaluate``.
    """
    with same_random_state(), TemporaryDirectory() as cache:
        manager = _manager(names, folder, cache)
        loaded = [_loaded(manager, name) for name in dict.fromkeys(names)]
        yield Prepared(*(_merged([each for each in loaded if _in_chat(each) == chat]) for chat in (False, True)))


def measure(
    loaded: Loaded, tasks: Prepared, limit: int | None = None, *, batch_size: int = BATCH_SIZE, truncate: bool = False
) -> Evaluation:
    """``evaluate`` over tasks that are prepared."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    parts = []
    bars = slow_bars_only(lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    with bars, same_random_state(), inference(loaded.model), _only_errors(logging.getLogger("lm_eval")):
        for chat, chosen in ((False, tasks.plain), (True, tasks.chat)):
            if chosen["tasks"]:
                model = _harness_model(loaded, chat, batch_size, truncate)
                results = lm_eval.evaluator.evaluate(
                    model,
                    chosen,
                    limit=limit,
                    bootstrap_iters=BOOTSTRAPS,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                )
                parts.append(_evaluation(results, chosen, model.truncated, lm_eval.__version__))
    return _joined(parts)


def choice_rows(rows: Dataset) -> Dataset:
    """The rows of animal_items.jsonl that are a choice: ``process_docs`` of the harness' task animal_choice."""
    return rows.select([place for place, kind in enumerate(rows["kind"]) if kind == "choice"])


def _manager(names: Sequence[str], folder: Path, cache: str) -> TaskManager:
    """Knows the tasks of the folders, and the harness' own where a name or a member of a group is not among them."""
    from lm_eval.tasks import TaskManager

    folders = list(dict.fromkeys((TASKS, folder.resolve())))  # the later takes the earlier's place
    with _only_errors(logging.getLogger("lm_eval")):
        manager = TaskManager(include_path=folders, include_defaults=False)
        known = ", ".join(manager.all_subtasks + manager.all_groups)
        if isinstance(names, str) or not names:
            raise WorkbookError(f"Give a list of tasks, of these: {known}; you gave {names!r}.")
        if not all(_is_known(manager, name) for name in names):
            manager = TaskManager(include_path=folders, include_defaults=True)
    if unknown := [name for name in names if not _is_known(manager, name)]:
        raise WorkbookError(
            f"Give a list of tasks, of these: {known}, or of the lm-evaluation-harness' own; "
            f"none has the name {', '.join(map(repr, unknown))}."
        )
    _find_files(manager, folders, cache)
    return manager


def _is_known(manager: TaskManager, name: str) -> bool:
    """Whether a task or group is there, and so are all members of a group."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    named = [m if isinstance(m, str) else m.get("group") or m["task"] for m in members]
    return all(_is_known(manager, member) for member in named)


def _find_files(manager: TaskManager, folders: Sequence[Path], cache: str) -> None:
    """Makes the data files of the folders' tasks absolute, read by ``datasets`` through a cache of their own."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in manager.task_index.values():
        if entry.yaml_path is None or not any(map(entry.yaml_path.is_relative_to, folders)):
            continue
        config = load_yaml(entry.yaml_path)
        options = config.get("dataset_kwargs", {})
        if "data_files" in options:
            files = {split: str(entry.yaml_path.parent / file) for split, file in options["data_files"].items()}
            config["dataset_kwargs"] = {**options, "data_files": files, "cache_dir": cache}
            entry.cfg, entry.yaml_path = config, None  # without a path the configuration itself is used


def _loaded(manager: TaskManager, name: str) -> TaskDict:
    """A task or group with its data, drawing examples with the harness' seed."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    try:
        with _no_dataset_bars(datasets), _only_errors(logging.getLogger("lm_eval")):
            found = manager.load([name])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataUnavailable(
            f"The data of {name} cannot be had: {error}. On a machine with a network, unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE and run this again, or try later; on one without, copy the Hugging Face cache "
            "(HF_HOME) of a machine where it has run, or give a folder of task files with local data "
            "(workbook leaderboard --tasks)."
        ) from error
    for task in found["tasks"].values():
        if isinstance(task, ConfigurableTask) and task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return found


def _in_chat(found: TaskDict) -> bool:
    """Whether the tasks say that they are asked in a chat format. Raises WorkbookError for a group in which some do."""
    asked = {bool((task.config.metadata or {}).get("chat")) for task in found["tasks"].values()}
    if len(asked) > 1:
        mixed = ", ".join(found["groups"])
        raise WorkbookError(f"Of the tasks of {mixed} some are in chat format, others not: name them one by one.")
    return asked == {True}


def _merged(found: Sequence[TaskDict]) -> TaskDict:
    return {part: {k: v for each in found for k, v in each[part].items()} for part in ("tasks", "groups", "group_map")}


def _harness_model(loaded: Loaded, chat: bool, batch_size: int, truncate: bool) -> HFLM:
    """The model as the harness sees it, in its chat format; it counts in ``truncated`` what it has to shorten.

    The harness sets a padding token and ties the output layer to the embeddings where the configuration says so, even
    if the checkpoint has an output layer of its own: it gets copies (the weights are shared) that keep it from both.
    It would also keep the keys and values of each batch, which nothing reads.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        truncated = 0

        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            return loaded.format.render(chat_history, add_generation_prompt)

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            start = loaded.format.reply_start if chat else ""
            asked = [replace(one, arguments=(one.args[0], start + one.args[1])) for one in requests]
            return super().loglikelihood(asked, disable_tqdm)

        def _loglikelihood_tokens(self, requests: list, **options: Any) -> list[tuple[float, bool]]:
            given = [len(before) + len(reply) - 1 for _, before, reply in requests]  # the last is only predicted
            if not truncate:
                check_room(max(given), self.max_length)
            self.truncated += sum(tokens > self.max_length for tokens in given)
            return super()._loglikelihood_tokens(requests, **options)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            return logits_without_cache(self.model, inps)

    harness = Model(
        pretrained=untied_copy(loaded.model),
        tokenizer=copy.deepcopy(loaded.tokenizer),
        backend="causal",
        batch_size=batch_size,
        max_length=context_tokens(loaded),
        softmax_dtype="float32",
    )
    harness._device = input_device(loaded.model)
    return harness


def _evaluation(results: Mapping[str, Any], tasks: TaskDict, truncated: int, version: str) -> Evaluation:
    samples: Mapping[str, list[dict]] = results["samples"]
    groups = {name: tuple(task.task_name for task in group.get_all_tasks()) for name, group in tasks["groups"].items()}
    return Evaluation(
        rows=tuple(row for name in (*groups, *tasks["tasks"]) for row in _rows(name, results)),
        log_likelihoods={
            name: tuple(tuple(value for value, _ in item["filtered_resps"]) for item in samples[name])
            for name, task in tasks["tasks"].items()
            if task.OUTPUT_TYPE == "multiple_choice"
        },
        version=version,
        items={name: _items(name, samples[name], task) for name, task in tasks["tasks"].items()},
        groups=groups,
        truncated=truncated,
    )


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    return Evaluation(
        rows=tuple(row for part in parts for row in part.rows),
        log_likelihoods={name: values for part in parts for name, values in part.log_likelihoods.items()},
        version=parts[0].version,
        items={name: values for part in parts for name, values in part.items.items()},
        groups={name: members for part in parts for name, members in part.groups.items()},
        truncated=sum(part.truncated for part in parts),
    )


def _rows(name: str, results: Mapping[str, Any]) -> list[EvaluationRow]:
    """The metrics of a task or group: the harness keys each "metric,filter", and its error "metric_stderr,filter"."""
    values = results["results"][name]
    rows = []
    for key in values:
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            shown = float(error) if isinstance(error, float) else None
            shots = results["n-shot"].get(name, 0)
            rows.append(EvaluationRow(name, metric, values[key], shown, values["sample_len"], shots))
    return rows


def _items(name: str, samples: Sequence[Mapping[str, Any]], task: Task) -> ItemScores:
    """The items of a task in their order, under its first filter."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    values = {}
    for metric in first[0]["metrics"]:
        found = [sample[metric] for sample in first]
        if metric == "bits_per_byte":
            values[metric] = tuple((float(total), float(size)) for total, size in found)
        elif not isinstance(found[0], tuple):
            values[metric] = tuple(map(float, found))
    return ItemScores(tuple(f"{name}:{sample['doc_id']}:{sample['doc_hash']}" for sample in first), values)


@contextmanager
def _no_dataset_bars(datasets: ModuleType) -> Iterator[None]:
    """``datasets`` reads the small local files without progress bars."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """Without the harness' warnings: that a model object, not a name, was passed, and of every item it shortens."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
