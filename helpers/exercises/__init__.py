"""Whether the answer to an exercise is right: one file per notebook."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "checking": ["check", "hint"],
    },
)
