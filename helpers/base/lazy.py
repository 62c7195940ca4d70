"""The public face of a group: explicit names, each loaded on first use.

``from helpers import machine`` therefore costs nothing until ``machine.place`` is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def face(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for the ``__init__`` of a package.

    ``homes`` maps each module of the package to the public names that it defines. Only the standard library is used,
    because the worker of an engine may run under another Python.
    """
    home_of: dict[str, str] = {}
    for module, public in homes.items():
        for name in public:
            home_of[name] = module

    def load(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    def names() -> list[str]:
        return sorted(home_of)

    return load, names, sorted(home_of)
