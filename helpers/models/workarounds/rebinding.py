"""Put another object under a library's name for a while: the tool of the patches in this folder."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def rebound(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside the block ``owner.name`` is ``value``; afterwards it is what it was, whatever happens."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
