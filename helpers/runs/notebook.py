"""What a notebook declares, and what a run gives it: its parameters, models, time and identity.

A notebook is read as plain JSON. One cell, tagged ``parameters``, holds the names and default values of what may be
set from outside; ``workbook: models:`` in the metadata names the models that the notebook loads. From these, the
profile and the command line, ``_plan_run`` makes one ``_Plan`` per notebook, and refuses what cannot work before
anything runs.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base.errors import WorkbookError, choose
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.units import PRECISIONS
from helpers.models.loaded import read_loads
from helpers.models.profiles import available, load_profile
from helpers.models.references import Budget, ModelRef
from helpers.runs.schema import _LoadedModel

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from helpers.models.loaded import Load
    from helpers.models.references import Profile

_Document = Mapping[str, Any]  # a notebook's JSON
_Cell = Mapping[str, Any]
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


class UsageError(WorkbookError):
    """A request that cannot be run as it stands: an unknown notebook, parameter, type or profile."""


@dataclass(frozen=True)
class _DeclaredModel:
    """A model that a notebook declares. ``role`` is as declared: a role, or a profile and a role (laptop/falcon)."""

    role: str
    ref: ModelRef
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """One notebook of a run: where it is, what it is given, its time, and the models that it declares."""

    name: str
    path: Path
    given: dict[str, object]
    effective: dict[str, object]
    budget: Budget
    inputs: str
    models: tuple[_DeclaredModel, ...]


def _plan_run(
    profile: Profile, folder: Path, only: Sequence[str], raw: Mapping[str, str], earlier: Mapping[str, str]
) -> list[_Plan]:
    """Plan the notebooks of ``folder`` with their parameters: the profile's, overridden by ``raw`` (YAML texts).

    ``earlier`` are the texts that a resumed run was given; they apply to the notebooks that have such a parameter.

    Raises UsageError for an unknown notebook or parameter, a value of another type than the notebook's default, a
    notebook without a parameters cell, or one for which the profile sets no budget.
    """
    documents: dict[Path, _Document] = {}
    defaults: dict[Path, dict[str, object]] = {}
    for path in _select(folder, only):
        documents[path] = _read_notebook(path)
        defaults[path] = _declared_parameters(documents[path], path.name)
    _check_names(raw, defaults.values())
    # Only ``raw`` is checked: the resumed run may have been given parameters of notebooks that are not chosen now.
    texts = {**earlier, **raw}
    return [_plan(profile, path, document, defaults[path], texts) for path, document in documents.items()]


def _select(folder: Path, only: Sequence[str]) -> list[Path]:
    """Return the notebooks of a folder in order; with ``only``, those whose names start with one of these texts.

    Raises UsageError when a text fits no notebook, or the folder holds none.
    """
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        raise UsageError(f"There are no notebooks in {folder}. Generate them with 'workbook render'.")
    names = [path.stem for path in notebooks]
    for prefix in only:
        if not any(name.startswith(prefix) for name in names):
            choose(prefix, names, "notebook whose name starts with", UsageError)
    if not only:
        return notebooks
    return [path for path in notebooks if path.stem.startswith(tuple(only))]


def _read_notebook(path: Path) -> dict[str, Any]:
    """Return a notebook's JSON, unvalidated (nbformat takes seconds to import). Raises UsageError when damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON. Generate it again with 'workbook render'.") from error
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise UsageError(f"{path} is not a notebook. Generate it again with 'workbook render'.")
    return document


def _check_names(raw: Mapping[str, str], defaults: Iterable[Mapping[str, object]]) -> None:
    known: dict[str, None] = {}
    for names in defaults:
        known |= dict.fromkeys(names)
    for name in raw:
        choose(name, known, "parameter", UsageError)


def _plan(
    profile: Profile, path: Path, document: _Document, defaults: Mapping[str, object], texts: Mapping[str, str]
) -> _Plan:
    given = _given(profile, path.stem, defaults, texts)
    if path.stem not in profile.budgets:
        raise UsageError(f"Profile {profile.name} sets no time budget for {path.stem}. Add one to the profile's file.")
    # Neither budgets nor other notebooks' parameters change what this notebook computes: a change runs nothing again.
    models = asdict(profile)
    del models["budgets"], models["parameters"]
    return _Plan(
        name=path.stem,
        path=path,
        given=given,
        effective={**defaults, **given},
        budget=profile.budgets[path.stem],
        inputs=_hash_of([_cells_hash(document), given, models]),
        models=_declared_models(document, profile, path.name),
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
            known = ", ".join(defaults) or "none"
            raise UsageError(f"Profile {profile.name} sets {name!r} for {notebook}, whose parameters are: {known}.")
        given[name] = _same_type(name, value, defaults[name])
    for name in texts.keys() & defaults.keys():
        given[name] = _same_type(name, _parse(texts[name], defaults[name]), defaults[name])
    if given.get("profile", profile.name) != profile.name:
        raise UsageError("The profile is not a parameter. Choose it with --profile.")
    return given


def _parse_parameters(options: Iterable[str]) -> dict[str, str]:
    """``["seed=1"]`` -> ``{"seed": "1"}``. Raises UsageError for a text without name and equals sign."""
    texts = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"Write a parameter as name=value, not {name!r}.")
        texts[name.strip()] = value
    return texts


def _parse(text: str, default: object) -> object:
    import yaml

    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The value {text!r} cannot be read. Quote it.") from error
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
        hint = f" A text that looks like something else needs quotes: {name}='\"{value}\"'."
    raise UsageError(f"The parameter {name} must be {wanted}, such as {default!r}, not {value!r}.{hint}")


def _declared_parameters(notebook: _Document, title: str) -> dict[str, Any]:
    """Return the names and default values of the cell tagged ``parameters``.

    Raises UsageError when there is no such cell, or a default is not a literal (papermill would not compute it).
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in _tags(cell)]
    if len(cells) != 1:
        raise UsageError(
            f"{title} needs exactly one cell tagged 'parameters', and has {len(cells)}. Correct its source."
        )
    defaults = {}
    for statement in _statements(_source(cells[0]), title):
        name, value = _assignment(statement)
        if name is None or value is None:
            continue
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError as error:
            raise UsageError(f"{title}: the parameter {name} must be a plain value, not a computed one.") from error
    return defaults


def _statements(source: str, title: str) -> list[ast.stmt]:
    """The statements of a cell, in which IPython's own commands, such as %load_ext, may stand."""
    with suppress(SyntaxError):
        return ast.parse(source).body
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return ast.parse(TransformerManager().transform_cell(source)).body
    except SyntaxError as error:
        raise UsageError(
            f"{title}: line {error.lineno} of the cell tagged 'parameters' is not Python ({error.msg}). Correct it."
        ) from error


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and value of an assignment to one name; None for any other statement."""
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def _declared_models(notebook: _Document, profile: Profile, title: str) -> tuple[_DeclaredModel, ...]:
    """Return the models that a notebook declares, as they are in a profile.

    A role that the profile leaves open, such as falcon_draft, is left out. Raises UsageError if the declaration has
    another form, and for a role or precision that does not exist.
    """
    declaration = notebook.get("metadata", {}).get("workbook", {}).get("models", {})
    if not isinstance(declaration, dict):
        raise UsageError(f"{title}: `workbook: models:` must name roles, each with a list of precisions.")
    models = []
    for role, words in declaration.items():
        source, ref = _resolve(role, profile, title)
        precisions = _precisions(words, source, f"{title}, model {role}")
        if ref is not None:
            models.append(_DeclaredModel(role, ref, precisions))
    return tuple(models)


def _resolve(role: str, profile: Profile, title: str) -> tuple[Profile, ModelRef | None]:
    """The profile that a declared role belongs to, and the model that it has there."""
    name, _, own = role.rpartition("/")
    if name and name not in available():
        raise UsageError(f"{title} declares {role!r}, but there is no profile {name!r}. Correct the declaration.")
    source = load_profile(name) if name else profile
    roles = _roles(source)
    if own not in roles:
        raise UsageError(f"{title} declares the unknown role {role!r}. Use one of {', '.join(roles)}.")
    return source, roles[own]


def _roles(profile: Profile) -> dict[str, ModelRef | None]:
    return {**profile.models, "falcon_draft": profile.falcon_draft}


def _precisions(words: object, source: Profile, title: str) -> tuple[str, ...]:
    if not isinstance(words, Sequence) or isinstance(words, str) or not words:
        raise UsageError(f"{title} has no list of precisions. Write one, such as [profile] or [bf16, nf4].")
    precisions: list[str] = []
    for word in words:
        if word == "profile":
            precisions.append(source.precision)
        elif word == "precisions":
            precisions.extend(source.precisions)
        elif word in PRECISIONS:
            precisions.append(word)
        else:
            known = ", ".join(["profile", "precisions", *PRECISIONS])
            raise UsageError(f"{title} names the unknown precision {word!r}. Use one of {known}.")
    return tuple(precisions)


def _roles_to_fetch(models: Iterable[_DeclaredModel]) -> list[str]:
    """The roles of the run's own profile among declared models, each once.

    The models of another profile (laptop/falcon) are never fetched: such a notebook must start offline.
    """
    roles: dict[str, None] = {}
    for model in models:
        if "/" not in model.role:
            roles[model.role] = None
    return list(roles)


def _undeclared(loads: Iterable[Load], models: Iterable[_DeclaredModel]) -> str | None:
    """Say which of a notebook's loads it does not declare; None if it declares them all."""
    declared = {(model.ref.id, precision) for model in models for precision in model.precisions}
    for load in loads:
        if not load.made_here and (load.model, load.precision) not in declared:
            return (
                f"The notebook loaded {load.label} in {load.precision} and does not declare it. Add it to "
                "`workbook: models:` in the header of the notebook's source."
            )
    return None


def _loaded_models(run: Path, notebooks: Iterable[str], profile: Profile) -> list[_LoadedModel]:
    """What the notebooks of a run really loaded, for its manifest: each ``Load`` with its notebook and role."""
    entries = []
    for notebook in notebooks:
        for load in read_loads(run, notebook):
            entries.append(_LoadedModel(notebook=notebook, role=_role_of(load, profile), **asdict(load)))
    return entries


def _role_of(load: Load, profile: Profile) -> str | None:
    if load.made_here:
        return None
    for prefix, source in (("", profile), (f"{DEFAULT_PROFILE}/", load_profile(DEFAULT_PROFILE))):
        for role, ref in _roles(source).items():
            if ref is not None and ref.id == load.model:
                return prefix + role
    return None


def _cells_hash(notebook: _Document) -> str:
    """SHA-256 over the cells' types, tags and texts; outputs, ids and other metadata do not count."""
    described = []
    for cell in notebook["cells"]:
        # Without spaces at the end: jupytext drops them on its way through a source.
        described.append([cell["cell_type"], sorted(_tags(cell)), _source(cell).rstrip()])
    return _hash_of(described)


def _hash_of(value: object) -> str:
    """SHA-256 of a value as JSON, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tags(cell: _Cell) -> list[str]:
    # Some tools write null where there are none.
    tags = cell.get("metadata", {}).get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _source(cell: _Cell) -> str:
    """A cell's text, which the format allows to be a list of lines."""
    return "".join(cell["source"])


def _make_portable(notebook: NotebookNode) -> None:
    """Remove papermill's records and live widgets, which would need a kernel or a CDN to show."""
    _drop_records(notebook.metadata)
    for cell in notebook.cells:
        _drop_records(cell.metadata)
        # papermill adds an empty list of tags to every cell that has none.
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET_VIEW not in output.get("data", {})]


def _drop_records(metadata: NotebookNode) -> None:
    for key in ("papermill", "widgets", "execution"):
        metadata.pop(key, None)
