"""Which other programs run the same model: how each is started, asked and stopped."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "catalogue": ["EngineError"],
    },
)
