"""How good a model is: perplexity, multiple choice, the harness, comparisons, paired tests."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "answers": ["CONCISE_WORDS", "RULES", "classify", "is_concise", "is_correct"],
        "baselines": ["GREETING", "controls"],
        "options": ["Question", "multiple_choice"],
        "comparison": ["Comparison", "compare", "opened", "sides"],
        "conclusions": ["findings"],
        "data": ["Item", "names", "read_items", "read_texts"],
        "gains": ["Gain"],
        "harness": ["choice_rows", "evaluate"],
        "leaderboard": ["leaderboard_average"],
        "likelihood": ["perplexity"],
        "precisions": ["ALMOST_NONE", "measure_precisions"],
        "tasks": ["TASKS"],
    },
)
