"""Find the tasks of EleutherAI's lm-evaluation-harness, with their data, before a model is loaded.

A task is a YAML file: of the project (``TASKS``), of a folder that the caller gives, or of the harness' own. Tasks that
say ``chat: true`` in their ``metadata`` are kept apart, because they are asked in the model's chat format.
"""

from __future__ import annotations

import functools
import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

from helpers.base.errors import WorkbookError
from helpers.base.files import ROOT
from helpers.base.jsonl import read_records
from helpers.models.workarounds.lm_eval_model import same_random_state

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from types import ModuleType

    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks.manager import TaskDict  # noqa: TC004 (it takes seconds to import)

TASKS = ROOT / "notebooks/data/tasks"
_FEWSHOT_SEED = 1234  # the harness' own


class _DataDownloadError(WorkbookError):
    """A task's data set is not on this machine and could not be downloaded from the hub."""

    exit_code = 1


@dataclass(frozen=True)
class _PreparedTasks:
    """Tasks with their data (see ``_prepared``): those asked as plain text, and those asked in the chat format."""

    plain: TaskDict
    chat: TaskDict


@contextmanager
def _prepared(names: Sequence[str], folder: Path = TASKS) -> Iterator[_PreparedTasks]:
    """The tasks or groups of these names with their data, which needs no model. Local data lie in a temporary cache.

    Raises WorkbookError for an unknown task and for missing data, both as ``evaluate``.
    """
    # The harness draws a random name for each task, even if it needs none.
    with same_random_state(), TemporaryDirectory() as cache:
        manager = _manager(names, folder, cache)
        plain, chat = [], []
        for name in dict.fromkeys(names):
            loaded = _loaded(manager, name)
            if _in_chat(loaded):
                chat.append(loaded)
            else:
                plain.append(loaded)
        yield _PreparedTasks(_merged(plain), _merged(chat))


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """Silence the harness' warnings: that a model object, not a name, was passed, and of every item it shortens."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _manager(names: Sequence[str], folder: Path, cache: str) -> TaskManager:
    """A manager of the folders' tasks, and of the harness' own if a name or a member of a group is not among them."""
    from lm_eval.tasks import TaskManager

    # Of two tasks with the same name, the manager keeps the one in the later folder.
    folders = list(dict.fromkeys((TASKS, folder.resolve())))
    with _only_errors(logging.getLogger("lm_eval")):
        manager = TaskManager(include_path=folders, include_defaults=False)
        known = ", ".join(manager.all_subtasks + manager.all_groups)
        if isinstance(names, str) or not names:
            raise WorkbookError(f"Give a list of tasks, of these: {known}; you gave {names!r}.")
        # The harness' own tasks are added only if they are needed, because reading them takes long.
        if not all(_is_known(manager, name) for name in names):
            for name, entry in _harness_tasks().items():
                manager.task_index.setdefault(name, entry)
    unknown = [repr(name) for name in names if not _is_known(manager, name)]
    if unknown:
        raise WorkbookError(
            f"Give a list of tasks, of these: {known}, or of the lm-evaluation-harness' own; "
            f"none has the name {', '.join(unknown)}."
        )
    _find_files(manager, folders, cache, _with_members(manager, names))
    return manager


@functools.cache
def _harness_tasks() -> Mapping[str, Entry]:
    """The harness' own tasks by name. Reading their thousands of files takes half a minute, so it is done once."""
    from lm_eval.tasks import TaskManager

    tasks: dict[str, Entry] = TaskManager(include_defaults=True).task_index
    return tasks


def _is_known(manager: TaskManager, name: str) -> bool:
    """Whether there is a task or group of this name and, for a group, all its members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(_is_known(manager, _member_name(member)) for member in members)


def _member_name(member: str | Mapping[str, Any]) -> str:
    """The name of a group's member, which its file gives as a name, a group or a task with settings of its own."""
    if isinstance(member, str):
        return member
    name: str = member.get("group") or member["task"]
    return name


def _with_members(manager: TaskManager, names: Sequence[str]) -> set[str]:
    """These names, and those of all members of the groups among them."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            members = (manager.task_index[name].cfg or {}).get("task")
            left += map(_member_name, members) if isinstance(members, list) else []
    return found


def _find_files(manager: TaskManager, folders: Sequence[Path], cache: str, wanted: Collection[str]) -> None:
    """Make the data files of the folders' tasks absolute; ``datasets`` reads them through a cache of their own.

    Raises WorkbookError for a JSON Lines file of a wanted task that is not valid.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, entry in manager.task_index.items():
        if entry.yaml_path is None or not any(map(entry.yaml_path.is_relative_to, folders)):
            continue
        config = load_yaml(entry.yaml_path)
        options = config.get("dataset_kwargs", {})
        if "data_files" in options:
            files = {}
            for split, file in options["data_files"].items():
                path = entry.yaml_path.parent / file
                files[split] = str(_plain_copy(path, cache) if name in wanted and path.suffix == ".jsonl" else path)
            config["dataset_kwargs"] = {**options, "data_files": files, "cache_dir": cache}
            # With a path, the manager would read the file again; without one it uses the configuration.
            entry.cfg, entry.yaml_path = config, None


def _plain_copy(file: Path, cache: str) -> Path:
    """A copy of a JSON Lines file as every library reads it, with what the project's own reader found in the file."""
    lines = [json.dumps(record) + "\n" for _, record in read_records(file)]
    copy = Path(mkdtemp(dir=cache)) / file.name
    copy.write_text("".join(lines), encoding="utf-8")
    return copy


def _loaded(manager: TaskManager, name: str) -> TaskDict:
    """A task or group with its data. Solved examples are drawn with the harness' seed."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    try:
        with _no_dataset_bars(datasets), _only_errors(logging.getLogger("lm_eval")):
            loaded = manager.load([name])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _DataDownloadError(
            f"Could not download the data of {name}: {error}. If this machine has a network, unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE and run this again, or try later. If it has none, copy the Hugging Face cache "
            "(HF_HOME) of a machine where it has run, or give a folder of task files with local data "
            "(workbook leaderboard --tasks)."
        ) from error
    for task in loaded["tasks"].values():
        if isinstance(task, ConfigurableTask) and task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return loaded


def _in_chat(tasks: TaskDict) -> bool:
    """Whether the tasks are to be asked in a chat format. Raises WorkbookError for a group in which only some are."""
    asked = set()
    for task in tasks["tasks"].values():
        metadata = task.config.metadata or {}
        asked.add(bool(metadata.get("chat")))
    if len(asked) > 1:
        mixed = ", ".join(tasks["groups"])
        raise WorkbookError(f"Some tasks of {mixed} are in chat format and others are not. Name the tasks one by one.")
    return asked == {True}


def _merged(loaded: Sequence[TaskDict]) -> TaskDict:
    merged: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for tasks in loaded:
        merged["tasks"] |= tasks["tasks"]
        merged["groups"] |= tasks["groups"]
        merged["group_map"] |= tasks["group_map"]
    return merged


@contextmanager
def _no_dataset_bars(datasets: ModuleType) -> Iterator[None]:
    """Let ``datasets`` read the small local files without progress bars."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
