"""How fast models and engines are, and how much memory they take."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "benchmark": ["Benchmark", "SpeedSettings", "joined", "measure"],
        "caches": ["compare_caches"],
    },
)
