"""What a notebook declares, and what a run gives it: its parameters, models, time and identity.

``workbook: models:`` in a notebook's metadata names the models that it loads, ``workbook: parameters:`` the limits of
its parameters. From these, the profile and the command line, ``_plan_run`` makes one ``_Plan`` per notebook of the
workbook, and ``_plan_own`` one per notebook of a reader's own; both refuse what cannot work before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, choose
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.text import shell_word
from helpers.base.units import PRECISIONS
from helpers.models.loaded import read_loads
from helpers.models.profiles import available, load_profile
from helpers.models.references import Budget, ModelRef
from helpers.runs.document import UsageError, _cells_hash, _check_kernel, _hash_of, _metadata, _read_notebook
from helpers.runs.parameters import _declared_parameters
from helpers.runs.schema import _LoadedModel

if TYPE_CHECKING:
    from helpers.models.loaded import Load
    from helpers.models.references import Profile
    from helpers.runs.document import _Document
    from helpers.runs.parameters import _Parameter

# What a reader's own notebook may take that declares no budget.
OWN_BUDGET = Budget(seconds=3600, cell_seconds=3600)


@dataclass(frozen=True)
class _DeclaredModel:
    """A model that a notebook declares. ``role`` is as declared: a role, or a profile and a role (laptop/falcon)."""

    role: str
    ref: ModelRef
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """One notebook of a run: where it is, what it is given, its time, and the models that it declares.

    ``own``: it is a reader's, and not one of the workbook. ``models`` is None for an own notebook that declares none:
    it may load any. ``remark`` says what a reader should know before it runs.
    """

    name: str
    path: Path
    given: dict[str, object]
    effective: dict[str, object]
    budget: Budget
    inputs: str
    models: tuple[_DeclaredModel, ...] | None
    own: bool = False
    remark: str = ""


def _plan_run(
    profile: Profile, folder: Path, only: Sequence[str], raw: Mapping[str, str], earlier: Mapping[str, str]
) -> list[_Plan]:
    """Plan the notebooks of ``folder`` with their parameters: the profile's, overridden by ``raw`` (texts).

    ``earlier`` are the texts that a resumed run was given; they apply to the notebooks that have such a parameter.

    Raises UsageError for an unknown notebook or parameter, a value of another type than the notebook's default or
    beyond its limits, a notebook without a parameters cell, or one for which the profile sets no budget.
    """
    documents: dict[Path, _Document] = {}
    declared: dict[Path, dict[str, _Parameter]] = {}
    for path in _select(folder, only, profile):
        documents[path] = _read_notebook(path)
        _check_kernel(documents[path], path)
        declared[path] = _declared_parameters(documents[path], path.name)
    _check_names(raw, declared.values())
    # Only ``raw`` is checked: the resumed run may have been given parameters of notebooks that are not chosen now.
    texts = {**earlier, **raw}
    return [_plan(profile, path, document, declared[path], texts) for path, document in documents.items()]


def _plan_own(
    profile: Profile, paths: Sequence[Path], raw: Mapping[str, str], earlier: Mapping[str, str]
) -> list[_Plan]:
    """Plan a reader's own notebooks, which may lie anywhere and need no parameters cell, budget or declared models.

    Raises UsageError as ``_plan_run`` does, and for a file that is not a notebook in Python, or whose name is taken.
    """
    documents: dict[Path, _Document] = {}
    declared: dict[Path, dict[str, _Parameter]] = {}
    for path in _different(paths):
        documents[path] = _read_notebook(path, "Open it in Jupyter and save it again.")
        _check_kernel(documents[path], path)
        declared[path] = _declared_parameters(documents[path], path.name, own=True)
    _check_names(raw, declared.values())
    texts = {**earlier, **raw}
    return [_plan_one_own(profile, path, document, declared[path], texts) for path, document in documents.items()]


def _different(paths: Sequence[Path]) -> list[Path]:
    """The absolute paths. Raises UsageError for what is not a file, and for two notebooks of one name."""
    seen: dict[str, Path] = {}
    for path in map(Path.absolute, paths):
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"{str(path)!r} {what}. Name a notebook's .ipynb file.")
        if not path.stem.isprintable():
            raise UsageError(f"The name {path.name!r} holds characters that cannot be shown. Rename the notebook.")
        # Of another case is the same name on some systems, and it names files of the run.
        name = path.stem.casefold()
        if name in seen:
            raise UsageError(f"{path} and {seen[name]} have the same name. Rename one, or run them apart.")
        seen[name] = path
    return list(seen.values())


def _select(folder: Path, only: Sequence[str], profile: Profile) -> list[Path]:
    """Return the notebooks of a folder that have a budget; with ``only``, those whose names start with one of these.

    Raises UsageError when a text is blank or fits no notebook, or no notebook of the folder has a budget.
    """
    found = _notebooks_in(folder)
    if not found:
        raise UsageError(f"There are no notebooks in {folder}. Generate them with 'workbook render'.")
    names = [name for name in found if name in profile.budgets]
    for prefix in only:
        _check_prefix(prefix, names, found, profile)
    if not names:
        others = ", ".join(map(repr, found))
        raise UsageError(f"Profile {profile.name} has no budget for any of {others}. Run one with --notebook.")
    starts = tuple(only) or ""  # every name starts with nothing
    return [found[name] for name in names if name.startswith(starts)]


def _notebooks_in(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.ipynb")) if path.is_file()}


def _check_prefix(prefix: str, names: Sequence[str], found: Mapping[str, Path], profile: Profile) -> None:
    if not prefix.strip():
        raise UsageError("--only needs the start of a notebook's name, such as 02. Leave it out to run all notebooks.")
    if any(name.startswith(prefix) for name in names):
        return
    for name, path in found.items():
        if name.startswith(prefix):
            raise UsageError(
                f"Profile {profile.name} sets no time budget for {name}. Add one to the profile's file, or run the "
                f"notebook as your own: workbook run --notebook {shell_word(path)}"
            )
    choose(prefix, names, "notebook whose name starts with", UsageError)


def _left_out(folder: Path, profile: Profile) -> list[str]:
    """Say which notebooks of a folder a run leaves out, for want of a budget, and which are not there."""
    remarks = []
    others = [path.name for path in sorted(folder.glob("*.ipynb")) if path.stem not in profile.budgets]
    if others:
        remarks.append(
            f"Not run: {', '.join(map(repr, others))}. Profile {profile.name} has no budget for them; "
            "run one with --notebook."
        )
    found = _notebooks_in(folder)
    gone = [name for name in profile.budgets if name not in found]
    if gone:
        remarks.append(f"Not run: {', '.join(gone)}. {folder} has no such notebook; workbook render restores ours.")
    return remarks


def _check_names(raw: Mapping[str, str], declared: Iterable[Mapping[str, object]]) -> None:
    known: dict[str, None] = {}
    for names in declared:
        known |= dict.fromkeys(names)
    for name in raw:
        if not known:
            raise UsageError(f"There is no parameter {name!r}: no notebook has a cell tagged 'parameters'.")
        choose(name, known, "parameter", UsageError)


def _plan(
    profile: Profile, path: Path, document: _Document, declared: Mapping[str, _Parameter], texts: Mapping[str, str]
) -> _Plan:
    given = _given(profile, path.stem, declared, texts)
    return _Plan(
        name=path.stem,
        path=path,
        given=given,
        effective={**_defaults(declared), **given},
        budget=profile.budgets[path.stem],
        inputs=_inputs(document, given, profile),
        models=_declared_models(document, profile, path.name),
    )


def _plan_one_own(
    profile: Profile, path: Path, document: _Document, declared: Mapping[str, _Parameter], texts: Mapping[str, str]
) -> _Plan:
    given = _from_texts(declared, texts)
    if "profile" in declared:
        given = _with_profile(profile, given)
    budget = _declared_budget(document, path.name)
    return _Plan(
        name=path.stem,
        path=path,
        given=given,
        effective={**_defaults(declared), **given},
        budget=budget or OWN_BUDGET,
        inputs=_inputs(document, given, profile),
        models=_declared_models(document, profile, path.name) if "models" in _metadata(document) else None,
        own=True,
        remark=_remark(path, declared, budget),
    )


def _remark(path: Path, declared: Mapping[str, object], budget: Budget | None) -> str:
    """What a reader should know of their own notebook before it runs: which file, and which defaults apply."""
    words = f"{path.stem} is {path}"
    if not declared:
        words += "; it has no cell tagged 'parameters', so nothing is set in it"
    if budget is None:
        words += f"; it declares no budget, so it may take {OWN_BUDGET.seconds:g} s"
    return f"{words}."


def _declared_budget(document: _Document, title: str) -> Budget | None:
    """The time that an own notebook declares, ``workbook: {budget: {seconds: 60}}``; None if it declares none."""
    declared = _metadata(document).get("budget")
    if declared is None:
        return None
    try:
        return Budget(**{"cell_seconds": declared["seconds"], **declared})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{title}: `workbook: budget:` needs seconds, and may have cell_seconds, each above 0 and at most "
            f"{Budget.MOST_SECONDS}."
        ) from error


def _defaults(declared: Mapping[str, _Parameter]) -> dict[str, object]:
    return {name: parameter.default for name, parameter in declared.items()}


def _inputs(document: _Document, given: Mapping[str, object], profile: Profile) -> str:
    # Neither budgets nor other notebooks' parameters change what a notebook computes: a change runs nothing again.
    models = asdict(profile)
    del models["budgets"], models["parameters"]
    return _hash_of([_cells_hash(document), given, models])


def _given(
    profile: Profile, notebook: str, declared: Mapping[str, _Parameter], texts: Mapping[str, str]
) -> dict[str, object]:
    """What a notebook is given: the profile's name, what the profile sets for it, then what the command line says."""
    given: dict[str, object] = {}
    for name, value in profile.parameters.get(notebook, {}).items():
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(f"Profile {profile.name} sets {name!r} for {notebook}, whose parameters are: {known}.")
        given[name] = declared[name].take(value, f"Profile {profile.name} sets {name} for {notebook}")
    given |= _from_texts(declared, texts)
    return _with_profile(profile, given) if "profile" in declared else given


def _from_texts(declared: Mapping[str, _Parameter], texts: Mapping[str, str]) -> dict[str, object]:
    return {name: declared[name].read(texts[name]) for name in texts if name in declared}


def _with_profile(profile: Profile, given: Mapping[str, object]) -> dict[str, object]:
    if given.get("profile", profile.name) != profile.name:
        raise UsageError("The profile is not a parameter. Choose it with --profile.")
    return {"profile": profile.name, **given}


def _declared_models(notebook: _Document, profile: Profile, title: str) -> tuple[_DeclaredModel, ...]:
    """Return the models that a notebook declares, as they are in a profile.

    A role that the profile leaves open, such as falcon_draft, is left out, and "repair" becomes the role that the
    profile names. Raises UsageError if the declaration has another form, and for a role or precision that does not
    exist.
    """
    declaration = _metadata(notebook).get("models", {})
    if not isinstance(declaration, dict):
        raise UsageError(f"{title}: `workbook: models:` must name roles, each with a list of precisions.")
    models = []
    for name, words in declaration.items():
        # The profile says which of its models is the one that is repaired.
        role = profile.repair if name == "repair" else name
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
        raise UsageError(f"{title} declares the unknown role {role!r}. Use one of {', '.join([*roles, 'repair'])}.")
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
    """What the notebooks of a run really loaded, for its manifest: each ``Load`` with its notebook and role.

    A notebook whose notes are damaged, as by its being killed, has none here.
    """
    entries = []
    for notebook in notebooks:
        loads: list[Load] = []
        with suppress(WorkbookError):
            loads = read_loads(run, notebook)
        for load in loads:
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
