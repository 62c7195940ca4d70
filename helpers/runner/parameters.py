"""Which notebooks run and with which parameters, checked strictly before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.runner.declaration import DeclaredModel, declared_models
from helpers.runner.notebook import Document, UsageError, cells_hash, declared_parameters, hash_of, read_notebook
from helpers.types import Budget, Profile, choose

_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Plan:
    """One notebook of a run: where it is, what it is given, its time, and the models that it declares."""

    name: str
    path: Path
    given: dict[str, object]
    effective: dict[str, object]
    budget: Budget
    inputs: str
    models: tuple[DeclaredModel, ...]


def plan_run(
    profile: Profile, folder: Path, only: Sequence[str], raw: Mapping[str, str], earlier: Mapping[str, str]
) -> list[Plan]:
    """Plan the notebooks of ``folder`` with their parameters: the profile's, overridden by ``raw`` (YAML texts).

    ``earlier`` are the texts that a resumed run was given; they apply to the notebooks that have such a parameter.

    Raises UsageError for an unknown notebook or parameter, a value of another type than the notebook's default, a
    notebook without a parameters cell, or one for which the profile sets no budget.
    """
    documents: dict[Path, Document] = {}
    defaults: dict[Path, dict[str, object]] = {}
    for path in select(folder, only):
        documents[path] = read_notebook(path)
        defaults[path] = declared_parameters(documents[path], path.name)
    _check_names(raw, defaults.values())
    # Only ``raw`` is checked: the resumed run may have been given parameters of notebooks that are not chosen now.
    texts = {**earlier, **raw}
    return [_plan(profile, path, document, defaults[path], texts) for path, document in documents.items()]


def select(folder: Path, only: Sequence[str]) -> list[Path]:
    """Return the notebooks of a folder in order; with ``only``, those whose names start with one of these texts.

    Raises UsageError when a text fits no notebook, or the folder holds none.
    """
    notebooks = sorted(folder.glob("*.ipynb"))
    names = [path.stem for path in notebooks]
    if not notebooks:
        raise UsageError(f"no notebooks in {folder}: generate them with 'workbook render'")
    names = [path.stem for path in notebooks]
    for prefix in only:
        if not any(name.startswith(prefix) for name in names):
            choose(prefix, names, "notebook whose name starts with", UsageError)
    if not only:
        return notebooks
    return [path for path in notebooks if path.stem.startswith(tuple(only))]


def parse_parameters(options: Iterable[str]) -> dict[str, str]:
    """``["seed=1"]`` -> ``{"seed": "1"}``. Raises UsageError for a text without name and equals sign."""
    texts = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"write a parameter as name=value, not {name!r}")
        texts[name.strip()] = value
    return texts


def _plan(
    profile: Profile, path: Path, document: Document, defaults: Mapping[str, object], texts: Mapping[str, str]
) -> Plan:
    given = _given(profile, path.stem, defaults, texts)
    if path.stem not in profile.budgets:
        raise UsageError(f"profile {profile.name} sets no time budget for {path.stem}: add one to its file")
    # Neither budgets nor other notebooks' parameters change what this notebook computes: a change runs nothing again.
    models = asdict(profile)
    del models["budgets"], models["parameters"]
    return Plan(
        name=path.stem,
        path=path,
        given=given,
        effective={**defaults, **given},
        budget=profile.budgets[path.stem],
        inputs=hash_of([cells_hash(document), given, models]),
        models=declared_models(document, profile, path.name),
    )


def _given(
    profile: Profile, notebook: str, defaults: Mapping[str, object], texts: Mapping[str, str]
) -> dict[str, object]:
    """What a notebook is given: the profile's name, what the profile sets for it, then what the command line says."""
    given: dict[str, object] = {}
    if "profile" in defaults:
        given["profile"] = profile.name
    for name, value in profile.parameters.get(notebook, {}).items():
        if name not in defaults:
            raise UsageError(f"profile {profile.name} sets {name!r} for {notebook}, which has only: {_list(defaults)}")
        given[name] = _same_type(name, value, defaults[name])
    for name in texts.keys() & defaults.keys():
        given[name] = _same_type(name, _parse(texts[name], defaults[name]), defaults[name])
    if given.get("profile", profile.name) != profile.name:
        raise UsageError("choose the profile with --profile, not as a parameter")
    return given


def _check_names(raw: Mapping[str, str], defaults: Iterable[Mapping[str, object]]) -> None:
    known: dict[str, None] = {}
    for names in defaults:
        known |= dict.fromkeys(names)
    for name in raw:
        choose(name, known, "parameter", UsageError)


def _parse(text: str, default: object) -> object:
    import yaml

    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read the value {text!r}: quote it") from error
    if isinstance(default, float) and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-4, without a dot, for text
        except ValueError:
            return value
    return value


def _same_type(name: str, value: object, default: object) -> object:
    """The value, an integer made a float if the default is one. Raises UsageError for another type."""
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    wanted = _KINDS.get(type(default), type(default).__name__)
    hint = ""
    if isinstance(default, str):
        hint = f" (a text that looks like something else needs quotes: {name}='\"{value}\"')"
    raise UsageError(f"the parameter {name} must be {wanted}, such as {default!r}, not {value!r}{hint}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
