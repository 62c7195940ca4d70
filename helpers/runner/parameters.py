"""Which notebooks run and with which parameters, checked strictly before anything starts."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.types import Budget, Profile, WorkbookError, choose


class UsageError(WorkbookError):
    """A request that cannot be run as it stands: an unknown notebook, parameter, type or profile."""


@dataclass(frozen=True)
class Plan:
    """One notebook of a run: where it is, what it is given, and its time."""

    name: str
    path: Path
    given: dict[str, Any]
    effective: dict[str, Any]
    budget: Budget
    inputs: str


def plan_run(
    profile: Profile, folder: Path, only: Sequence[str], raw: Mapping[str, str], earlier: Mapping[str, str]
) -> list[Plan]:
    """The notebooks of ``folder`` to run, with their parameters: the profile's, overridden by ``raw`` (YAML texts).

    ``earlier`` are the texts that a resumed run was given; they apply to the notebooks that have such a parameter.

    Raises UsageError for an unknown notebook or parameter, a value of another type than the notebook's default, a
    notebook without a parameters cell, or one for which the profile sets no budget.
    """
    documents = {path: read_notebook(path) for path in select(folder, only)}
    declared = {path: declared_parameters(document, path.name) for path, document in documents.items()}
    _check_names(raw, {name: None for names in declared.values() for name in names})
    return [_plan(profile, path, documents[path], declared[path], {**earlier, **raw}) for path in documents]


def select(folder: Path, only: Sequence[str]) -> list[Path]:
    """The notebooks of a folder in order; with ``only``, those whose names start with one of these texts.

    Raises UsageError when a text fits no notebook, or the folder holds none.
    """
    notebooks = sorted(folder.glob("*.ipynb"))
    names = [path.stem for path in notebooks]
    if not notebooks:
        raise UsageError(f"no notebooks in {folder}: generate them with 'workbook render'")
    for prefix in only:
        if not any(path.stem.startswith(prefix) for path in notebooks):
            choose(prefix, names, "notebook whose name starts with", UsageError)
    return [path for path in notebooks if not only or path.stem.startswith(tuple(only))]


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook's JSON, unvalidated (nbformat takes seconds to import). Raises UsageError when damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: generate it again with 'workbook render'") from error
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise UsageError(f"{path} is not a notebook: generate it again with 'workbook render'")
    return document


def cells_hash(notebook: Mapping[str, Any]) -> str:
    """SHA-256 over the cells' types, tags and texts; outputs, ids and other metadata do not count."""
    cells = [[cell["cell_type"], sorted(_tags(cell)), _source(cell).rstrip()] for cell in notebook["cells"]]
    return _hash(cells)


def declared_parameters(notebook: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The names and default values of the cell tagged ``parameters``.

    Raises UsageError when there is no such cell, or a default is not a literal (papermill would not compute it).
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in _tags(cell)]
    if len(cells) != 1:
        raise UsageError(f"{title} needs exactly one cell tagged 'parameters', and has {len(cells)}")
    found = {}
    for statement in ast.parse(_source(cells[0])).body:
        target, value = _assignment(statement)
        if target is None:
            continue
        try:
            found[target] = ast.literal_eval(value)
        except ValueError as error:
            raise UsageError(f"{title}: the parameter {target} must be a plain value, not a computed one") from error
    return found


def parse_parameters(options: Iterable[str]) -> dict[str, str]:
    """``["seed=1"]`` -> ``{"seed": "1"}``. Raises UsageError for a text without name and equals sign."""
    pairs = [option.partition("=") for option in options]
    for name, equals, _ in pairs:
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"write a parameter as name=value, not {name!r}")
    return {name.strip(): value for name, _, value in pairs}


def _plan(profile: Profile, path: Path, document: Any, declared: Mapping[str, Any], raw: Mapping[str, str]) -> Plan:
    name = path.stem
    given = {"profile": profile.name} if "profile" in declared else {}
    for parameter, value in profile.parameters.get(name, {}).items():
        if parameter not in declared:
            raise UsageError(f"profile {profile.name} sets {parameter!r} for {name}, which has only: {_list(declared)}")
        given[parameter] = _same_type(parameter, value, declared[parameter])
    for parameter in raw.keys() & declared.keys():
        given[parameter] = _same_type(parameter, _parse(raw[parameter], declared[parameter]), declared[parameter])
    if given.get("profile", profile.name) != profile.name:
        raise UsageError("choose the profile with --profile, not as a parameter")
    if name not in profile.budgets:
        raise UsageError(f"profile {profile.name} sets no time budget for {name}: add one to its file")
    models = {key: value for key, value in asdict(profile).items() if key not in ("budgets", "parameters")}
    inputs = _hash([cells_hash(document), given, models])
    return Plan(name, path, given, {**declared, **given}, profile.budgets[name], inputs)


def _check_names(raw: Mapping[str, str], known: Mapping[str, Any]) -> None:
    for name in raw:
        choose(name, known, "parameter", UsageError)


def _parse(text: str, default: Any) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read the value {text!r}: quote it") from error
    if isinstance(default, float) and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-4, without a dot, for text
        except ValueError:
            return value
    return value


def _same_type(name: str, value: Any, default: Any) -> Any:
    """The value, an integer made a float where the default is one. Raises UsageError for another type."""
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    kinds = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    wanted = kinds.get(type(default), type(default).__name__)
    hint = f" (a text that looks like something else needs quotes: {name}='\"{value}\"')" if wanted == "a text" else ""
    raise UsageError(f"the parameter {name} must be {wanted}, such as {default!r}, not {value!r}{hint}")


def _assignment(statement: ast.stmt) -> tuple[str | None, Any]:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return statement.target.id, statement.value
    return None, None


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def _source(cell: Mapping[str, Any]) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
