"""Where the values of a run come from: code, packages, machine and models, which a resumed run may hold several of.

``_last_origin`` and ``_place`` find or add the origin of a notebook that is about to start; the rest says in words
which notebook's values are of which origin. A run of one origin has nothing to say.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.files import ROOT
from helpers.base.units import gib
from helpers.runs.schema import _Hardware, _Origin, _UnknownHardware

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from helpers.runs.schema import _GitState, _Manifest

# What decides the values besides the notebooks themselves, whose cells are hashed one by one.
_CODE = ("helpers/**/*.py", "notebooks/data/*")
_SHOWN = 6  # facts of an origin in one sentence; an upgrade may change a hundred packages
_KEPT_NONE = (
    "This run was resumed by an earlier workbook, which did not keep where each value came from: the commit, the "
    "machine and the versions are those of the last start"
)


@dataclass(frozen=True)
class _Source:
    """One origin of a run's values: its number from 1, the notebooks of this origin, and what tells it apart."""

    number: int
    origin: _Origin
    notebooks: tuple[str, ...]
    facts: Mapping[str, str]

    def __str__(self) -> str:
        shown = [f"{what} {text}" for what, text in list(self.facts.items())[:_SHOWN]]
        if len(self.facts) > _SHOWN:
            shown.append(f"and {len(self.facts) - _SHOWN} more")
        return f"{', '.join(self.notebooks)}: {', '.join(shown)}"


def _code_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the package's modules and the notebooks' data."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _last_origin(manifest: _Manifest, code: str | None = None, since: str | None = None) -> _Origin:
    """The origin that the last start of a run has."""
    started = manifest.resumed[-1] if manifest.resumed else manifest.started
    models = {ref.label: ref.sha256 for ref in manifest.models.values() if ref.sha256}
    return _Origin(
        since=since or started,
        git=manifest.git,
        code=code,
        python=manifest.python,
        packages=manifest.packages,
        hardware=manifest.hardware,
        models=models,
    )


def _same_origin(first: _Origin, second: _Origin) -> bool:
    """True if nothing tells two origins apart."""
    return _facts(first) == _facts(second)


def _place(origins: list[_Origin], now: _Origin) -> int:
    """The place of an origin in the list, to which it is added if no other is the same."""
    for place, origin in enumerate(origins):
        if _same_origin(origin, now):
            return place
    origins.append(now)
    return len(origins) - 1


def _origin(manifest: _Manifest, notebook: str) -> _Origin | None:
    """The origin of a notebook's values; None if it has none. An earlier workbook kept that of the last start alone."""
    if not manifest.origins:
        return _last_origin(manifest)
    facts = manifest.notebooks.get(notebook)
    return None if facts is None or facts.origin is None else manifest.origins[facts.origin]


def _value_origins(manifest: _Manifest) -> list[_Source]:
    """The origins of a run's values in the order of their notebooks; empty if all are of one."""
    notebooks: dict[int, list[str]] = {}
    for name, facts in manifest.notebooks.items():
        if facts.origin is not None:
            notebooks.setdefault(facts.origin, []).append(name)
    if len(notebooks) < 2:
        return []
    facts_of = {place: _facts(manifest.origins[place]) for place in notebooks}
    unlike = _unlike(facts_of.values())
    sources = []
    for number, (place, names) in enumerate(notebooks.items(), start=1):
        told = {what: facts_of[place].get(what, "none") for what in unlike}
        sources.append(_Source(number, manifest.origins[place], tuple(names), told))
    return sources


def _source_notes(manifest: _Manifest) -> list[str]:
    """What a reader has to know of where the values come from, a sentence each; empty for a run of one origin."""
    if not manifest.origins and manifest.resumed:
        return [_KEPT_NONE]
    sources = _value_origins(manifest)
    if not sources:
        return []
    told = "; ".join(map(str, sources))
    same = len({source.origin.code for source in sources}) == 1 and sources[0].origin.code is not None
    code = ". The code itself is the same" if same else ""
    return [
        f"The values are of {len(sources)} origins, because something changed before the run was resumed or while it "
        f"ran. {told}{code}"
    ]


def _same_code(first: _Origin, second: _Origin) -> bool:
    """True if two origins have the same code, as far as it is known: an earlier workbook kept the commit alone."""
    if first.code and second.code:
        return first.code == second.code
    return first.git.commit == second.git.commit


def _same_models(first: _Origin, second: _Origin) -> bool:
    """True if the models that both origins have are of the same files."""
    shared = first.models.keys() & second.models.keys()
    return all(first.models[label] == second.models[label] for label in shared)


def _commit(git: _GitState) -> str:
    """The commit of a checkout in words."""
    if not git.commit:
        return "not a git checkout"
    return f"{git.commit[:12]} with uncommitted changes" if git.dirty else git.commit[:12]


def _code_text(origin: _Origin) -> str:
    """The commit and the hash of the code of an origin in words."""
    return f"{_commit(origin.git)}, code {(origin.code or 'unknown')[:12]}"


def _machine_facts(hardware: _Hardware | _UnknownHardware) -> dict[str, str]:
    """What is known of a machine, by label; nothing that changes while it runs."""
    if isinstance(hardware, _UnknownHardware):
        return {"Machine": f"unknown ({hardware.error})"}
    return {
        "CPU": f"{hardware.cpu_name}, {_cores(hardware)}",
        "Memory": gib(hardware.ram_bytes),
        "GPUs": _gpus(hardware) or "none",
        "System": hardware.system,
    }


def _machine(hardware: _Hardware | _UnknownHardware) -> str:
    """Describe the machine of a run in half a sentence."""
    if isinstance(hardware, _UnknownHardware):
        return "an unknown machine"
    return _gpus(hardware) or f"{_cores(hardware, 'CPU core')} without a GPU"


def _cores(hardware: _Hardware, name: str = "core") -> str:
    """How many cores a machine has, in words."""
    return f"1 {name}" if hardware.cpu_count == 1 else f"{hardware.cpu_count} {name}s"


def _gpus(hardware: _Hardware) -> str:
    """List the GPUs of a machine, equal ones together; empty if there is none."""
    counts = Counter(f"{gpu.name} ({gib(gpu.total_bytes)})" for gpu in hardware.gpus)
    return ", ".join(f"{count} × {name}" for name, count in counts.items())


def _facts(origin: _Origin) -> dict[str, str]:
    """All that tells two origins apart, by label."""
    # In capitals, because a package may have any name in small letters.
    facts = {"Commit": _commit(origin.git), "Code": (origin.code or "unknown")[:12], "Python": origin.python}
    facts |= _machine_facts(origin.hardware)
    facts |= origin.packages
    for label, files in origin.models.items():
        facts |= {f"{label}, {name}": digest[:12] for name, digest in files.items()}
    return facts


def _unlike(facts: Iterable[Mapping[str, str]]) -> list[str]:
    """The labels under which not all have the same, in order."""
    known = list(facts)
    labels = dict.fromkeys(label for each in known for label in each)
    unlike = []
    for label in labels:
        told = {each.get(label) for each in known}
        if len(told) > 1:
            unlike.append(label)
    return unlike
