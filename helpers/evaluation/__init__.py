"""How good a model is: perplexity, multiple choice, the harness, comparisons, paired tests."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "options": ["Question", "multiple_choice"],
        "comparison": [
            "CONCISE_WORDS",
            "Comparison",
            "RULES",
            "compare",
            "is_concise",
            "is_correct",
            "names",
            "opened",
            "sides",
        ],
        "data": ["Item", "read_items", "read_texts"],
        "gains": ["Gain", "gains_table"],
        "harness": ["choice_rows", "evaluate"],
        "leaderboard": ["leaderboard_average"],
        "likelihood": ["perplexity"],
        "precisions": ["ALMOST_NONE", "measure_precisions"],
        "tasks": ["TASKS"],
    },
)
