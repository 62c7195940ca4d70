"""The models that a notebook declares, and whether a run loads these and no others.

A notebook declares its models in its metadata; in its source that is the header. For example::

    workbook:
      models:
        falcon: [precisions]          # the role of the run's profile, in each of the profile's precisions
        llama_chat: [profile]         # in the profile's precision
        laptop/falcon: [bf16, nf4]    # the role of profile laptop, whatever the run's profile, in these precisions

The runner fetches what is declared before the first notebook starts, and fails a notebook that loads anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.loads import Load, read_loads
from helpers.profiles import SMALLEST, available, load_profile
from helpers.runner.notebook import Document, UsageError
from helpers.schema import LoadedModel
from helpers.types import PRECISIONS, ModelRef, Profile


@dataclass(frozen=True)
class DeclaredModel:
    """A model that a notebook declares. ``role`` is as declared: a role, or a profile and a role (laptop/falcon)."""

    role: str
    ref: ModelRef
    precisions: tuple[str, ...]


def declared_models(notebook: Document, profile: Profile, title: str) -> tuple[DeclaredModel, ...]:
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
            models.append(DeclaredModel(role, ref, precisions))
    return tuple(models)


def roles_to_fetch(models: Iterable[DeclaredModel]) -> list[str]:
    """The roles of the run's own profile among declared models, each once.

    The models of another profile (laptop/falcon) are never fetched: such a notebook must start offline.
    """
    roles: dict[str, None] = {}
    for model in models:
        if "/" not in model.role:
            roles[model.role] = None
    return list(roles)


def undeclared(loads: Iterable[Load], models: Iterable[DeclaredModel]) -> str | None:
    """Say which of a notebook's loads it does not declare; None if it declares them all."""
    declared = {(model.ref.id, precision) for model in models for precision in model.precisions}
    for load in loads:
        if not load.made_here and (load.model, load.precision) not in declared:
            return (
                f"the notebook loaded {load.label} in {load.precision} and does not declare it: add it to "
                "`workbook: models:` in the header of the notebook's source"
            )
    return None


def loaded_models(run: Path, notebooks: Iterable[str], profile: Profile) -> list[LoadedModel]:
    """What the notebooks of a run really loaded, for its manifest: each ``Load`` with its notebook and role."""
    entries = []
    for notebook in notebooks:
        for load in read_loads(run, notebook):
            entries.append(LoadedModel(notebook=notebook, role=_role_of(load, profile), **asdict(load)))
    return entries


def _resolve(role: str, profile: Profile, title: str) -> tuple[Profile, ModelRef | None]:
    """The profile that a declared role belongs to, and the model that it has there."""
    name, _, own = role.rpartition("/")
    if name and name not in available():
        raise UsageError(f"{title} declares {role!r}, but there is no profile {name!r}.")
    source = load_profile(name) if name else profile
    roles = _roles(source)
    if own not in roles:
        raise UsageError(f"{title} declares the unknown role {role!r}. Use one of {', '.join(roles)}.")
    return source, roles[own]


def _precisions(words: object, source: Profile, title: str) -> tuple[str, ...]:
    if not isinstance(words, Sequence) or isinstance(words, str) or not words:
        raise UsageError(f"{title}: list its precisions, such as [profile] or [bf16, nf4].")
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
            raise UsageError(f"{title}: there is no precision {word!r}. Use one of {known}.")
    return tuple(precisions)


def _roles(profile: Profile) -> dict[str, ModelRef | None]:
    return {**profile.models, "falcon_draft": profile.falcon_draft}


def _role_of(load: Load, profile: Profile) -> str | None:
    if load.made_here:
        return None
    for prefix, source in (("", profile), (f"{SMALLEST}/", load_profile(SMALLEST))):
        for role, ref in _roles(source).items():
            if ref is not None and ref.id == load.model:
                return prefix + role
    return None
