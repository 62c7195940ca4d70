"""How good a model is: perplexity, multiple choice, the harness, comparisons, paired tests."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "answers": ["CONCISE_WORDS", "RULES", "classify", "is_concise", "is_correct"],
        "baselines": ["GREETING", "controls"],
        "comparison": ["Comparison", "compare", "opened", "sides"],
        "conclusions": ["findings"],
        "data": ["Item", "read_items", "read_texts"],
        "gains": ["Gain"],
        "harness": ["choice_rows", "evaluate"],
        "judging": ["judge", "win_rates"],
        "leaderboard": ["leaderboard_average"],
        "likelihood": ["perplexity"],
        "options": ["Question", "multiple_choice"],
        "precisions": ["ALMOST_NONE", "measure_precisions"],
        "rules": ["names"],
        "tasks": ["TASKS"],
    },
)
