"""Say how the packages of the Python that runs this differ from lock files, as JSON: installed.py [FILE...]

Without files, from the lock that the set-up was asked for; if it made no .venv here, from that of the installed torch.

The set-up asks this of .venv, `workbook doctor` of its own Python. Files are compared by their lengths, which takes a
third of a second; whoever changes a library in place and keeps its length is not found out.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

LOCKS = Path(__file__).resolve().parent / "requirements"
CUDA_LOCKS = ("gpu", "gpu12")


def compare(files: Iterable[Path], packages: Path) -> list[dict[str, str]]:
    """Return how the folder ``packages`` differs from the pins of the lock files: the pin, a kind, and what was found.

    Kinds: missing, other (version or build), damaged (files are gone or have another length than was installed).
    """
    found: dict[str, list[Path]] = {}
    for folder in packages.glob("*.dist-info"):
        found.setdefault(normal(folder.name.removesuffix(".dist-info").rpartition("-")[0]), []).append(folder)
    sizes = recorded_sizes(packages)
    problems: list[dict[str, str]] = []
    for path in files:
        for pin, name, version in pins_for_this_python(path.read_text(encoding="utf-8")):
            kind, words = judge(name, version, found.get(normal(name), []), sizes)
            if not kind and name == "torch" and path.stem in CUDA_LOCKS and not built_for_cuda(packages):
                kind, words = "other", f"torch {version} is built for the CPU, not for CUDA"
            if kind:
                problems.append({"pin": pin, "kind": kind, "found": words})
    return problems


def normal(name: str) -> str:
    """Return a package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_for_this_python(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the pins of a lock that apply here: as written, without the marker, with name and version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    for line in text.splitlines():
        entry = line.split("#")[0].strip()
        if entry and not entry.startswith("-"):
            pin = Requirement(entry)
            if pin.marker is None or pin.marker.evaluate():
                yield entry.split(";")[0].strip(), pin.name, next(iter(pin.specifier)).version


def judge(name: str, version: str, folders: list[Path], sizes: dict[Path, dict[str, int | None]]) -> tuple[str, str]:
    """Return what is wrong with one installed package: a kind of ``compare`` and words, both empty if nothing is."""
    if not folders:
        return "missing", f"{name} {version} is not installed"
    versions = [folder.name.removesuffix(".dist-info").rpartition("-")[2] for folder in folders]
    if versions != [version]:
        return "other", f"{name} {' and '.join(sorted(versions))}, not {version}"
    if folders[0] not in sizes or not (folders[0] / "METADATA").exists():
        return "damaged", f"{name} {version} is damaged: its records are gone"
    for file, size in sizes[folders[0]].items():
        path = f"{folders[0].parent}/{file}"
        try:
            length = os.stat(path).st_size  # noqa: PTH116 (twenty thousand times)
        except OSError:
            return "damaged", f"{name} {version} is damaged: {file} is missing"
        if size is not None and length != size:
            return "damaged", f"{name} {version} is damaged: {file} has another length than was installed"
    return "", ""


def recorded_sizes(packages: Path) -> dict[Path, dict[str, int | None]]:
    """Return the programs of each package and their lengths as installed; None if several packages have that file."""
    sizes: dict[Path, dict[str, int | None]] = {}
    owners: dict[str, Path] = {}
    for record in packages.glob("*.dist-info/RECORD"):
        files = sizes.setdefault(record.parent, {})
        for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, size = line.rsplit(",", 2) if line.count(",") >= 2 else (line, "", "")
            if name.endswith((".py", ".so")) and size.isdigit():
                files[name] = int(size)
                if name in owners:
                    files[name] = sizes[owners[name]][name] = None
                owners[name] = record.parent
    return sizes


def built_for_cuda(packages: Path) -> bool:
    """Return whether the installed torch says that it is built for CUDA."""
    try:
        text = (packages / "torch" / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b.*=\s*['\"]", text, re.MULTILINE) is not None


def lock_of(packages: Path) -> Path:
    """Return the lock that this environment was set up with, as its stamp says; else that of the installed torch."""
    try:
        name = json.loads((Path(sys.prefix) / "setup.json").read_text(encoding="utf-8"))["lock"]
    except (OSError, ValueError, TypeError, KeyError):
        name = ""
    if name not in ("cpu", *CUDA_LOCKS):
        name = lock_by_torch(packages)
    return LOCKS / f"{name}.txt"


def lock_by_torch(packages: Path) -> str:
    """Return the name of the lock that the installed build of torch is from."""
    # macOS has one build of torch, and only the CPU's lock serves it.
    if any(packages.glob("torch-*+cpu.dist-info")) or sys.platform == "darwin":
        return "cpu"
    for name in reversed(CUDA_LOCKS):
        for _, package, version in pins_for_this_python((LOCKS / f"{name}.txt").read_text(encoding="utf-8")):
            if package == "torch" and any(packages.glob(f"torch-{version}.dist-info")):
                return name
    return "gpu"


def main(arguments: list[str]) -> None:
    """Print the differences from these lock files, on one line."""
    packages = Path(sysconfig.get_path("purelib"))
    files = [Path(argument) for argument in arguments] or [lock_of(packages)]
    pins = [pin for path in files for pin in pins_for_this_python(path.read_text(encoding="utf-8"))]
    print(json.dumps({"lock": files[0].name, "pins": len(pins), "differences": compare(files, packages)}))


if __name__ == "__main__":
    main(sys.argv[1:])
