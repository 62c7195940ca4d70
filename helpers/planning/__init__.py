"""Whether a profile will run, before anything is downloaded: plan, suggestions, doctor, rehearsal."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "findings": ["Finding", "PRODUCT_ERRORS"],
        "output": ["save_figure", "suggestion_table", "tables", "to_json"],
        "plan": ["COUNTS", "QUESTIONS", "SIZES"],
        "request": ["FALCON_180B"],
        "suggestions": ["suggest"],
    },
)
