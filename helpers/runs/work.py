"""What the notebooks do with the profile's models, as their headers declare it: ``workbook: work:``.

A role has a list of entries, such as ``falcon: [{load: 1}, {reply: 4, tokens: max_new_tokens, prompt: 10}]``. A value
is a whole number, the name of a parameter of the notebook, or a list of these, which are multiplied. An entry is done
in all the precisions that ``models:`` declares for the role, unless it names ``precisions`` of its own. ``in_turn`` is
the number of loads if the model is alone in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from helpers.planning.hours import Kind, Work
from helpers.runs.document import UsageError, _metadata, _read_notebook
from helpers.runs.notebook import _plan_run, _precisions

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.models.references import Profile
    from helpers.runs.notebook import _DeclaredModel, _Plan

_KINDS: tuple[Kind, ...] = ("load", "reply", "read", "train")
_COUNTS = ("tokens", "prompt", "together")


def declared_work(profile: Profile, folder: Path) -> dict[str, list[Work]]:
    """What each notebook of a folder that declares it does with the profile's models, by the notebook's name.

    Raises UsageError for a declaration that is not valid.
    """
    works: dict[str, list[Work]] = {}
    for plan in _plan_run(profile, folder, (), {}, {}):
        declaration = _metadata(_read_notebook(plan.path)).get("work")
        if declaration is not None:
            works[plan.name] = list(_of_notebook(plan, declaration, profile))
    return works


def _of_notebook(plan: _Plan, declaration: object, profile: Profile) -> Iterator[Work]:
    """All that one notebook declares. Raises UsageError for a declaration that is not valid."""
    if not isinstance(declaration, dict) or not all(isinstance(entries, list) for entries in declaration.values()):
        raise UsageError(f"{plan.name}: `workbook: work:` must name roles, each with a list of entries.")
    declared = {model.role: model for model in plan.models or ()}
    for name, entries in declaration.items():
        role = profile.repair if name == "repair" else name
        if role not in declared:
            raise UsageError(f"{plan.name} declares work of {name!r}, but no such model. Add it to `models:`.")
        for entry in entries:
            yield from _works(declared[role], entry, plan, profile)


def _works(model: _DeclaredModel, entry: object, plan: _Plan, profile: Profile) -> Iterator[Work]:
    """An entry in each of its precisions. Raises UsageError for one that is not valid."""
    title = f"{plan.name}, work of {model.role}, {entry}"
    if not isinstance(entry, Mapping):
        raise UsageError(f"{title} is not valid. Write {{load: 1}} or {{reply: 4, tokens: 50, prompt: 10}}.")
    kind = _kind(entry, title)
    numbers = {}
    for name in (kind, *_COUNTS, "in_turn"):
        if name in entry:
            numbers[name] = _number(entry[name], plan.effective, title)
    count, in_turn = numbers.pop(kind), numbers.pop("in_turn", None)
    if in_turn is not None and not _together(model.role, profile):
        count = in_turn
    precisions = model.precisions
    if "precisions" in entry:
        precisions = _precisions(entry["precisions"], profile, title)
    for precision in dict.fromkeys(precisions):  # bf16 may be named twice: as such, and as the profile's
        yield Work(model.ref, precision, kind, count, **numbers)


def _kind(entry: Mapping[str, object], title: str) -> Kind:
    """What an entry says is done. Raises UsageError if it does not say one thing, or says what nobody reads."""
    kinds = [kind for kind in _KINDS if kind in entry]
    if len(kinds) != 1 or entry.keys() - {*_KINDS, *_COUNTS, "precisions", "in_turn"}:
        raise UsageError(
            f"{title} is not valid. Give one of {', '.join(_KINDS)}, and {', '.join(_COUNTS)}, precisions or in_turn."
        )
    return kinds[0]


def _together(role: str, profile: Profile) -> bool:
    """Whether a model stays in memory beside another one: then nothing makes a notebook load it again."""
    return any(role in group and len(group) > 1 for group in profile.resident)


def _number(value: object, parameters: Mapping[str, object], title: str) -> int:
    """A value of an entry as a number. Raises UsageError if it is none, and for an unknown parameter."""
    if isinstance(value, list) and value:
        return math.prod(_number(factor, parameters, title) for factor in value)
    if isinstance(value, str) and value in parameters:
        value = parameters[value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{title}: {value!r} is neither a whole number nor a parameter of the notebook.")
    return value
