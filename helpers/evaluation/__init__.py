"""How well a model does: perplexity, multiple choice, tasks of EleutherAI's lm-evaluation-harness, precisions.

Every result keeps what it measured item by item, so that ``paired`` can compare two models, or two precisions of one
model, on the same items.
"""

from helpers.evaluation.choices import MultipleChoice, Question, multiple_choice
from helpers.evaluation.harness import (
    Evaluation,
    EvaluationRow,
    ItemScores,
    choice_rows,
    evaluate,
)
from helpers.evaluation.leaderboard import PUBLISHED, Leaderboard, LeaderboardScore, leaderboard_average
from helpers.evaluation.likelihood import Perplexity, perplexity, windows
from helpers.evaluation.pairs import Paired, paired
from helpers.evaluation.precisions import (
    ALMOST_NONE,
    PrecisionResult,
    PrecisionStudy,
    almost_none,
    measure_precisions,
)
from helpers.evaluation.tasks import TASKS, DataUnavailable

__all__ = [
    "ALMOST_NONE",
    "PUBLISHED",
    "TASKS",
    "DataUnavailable",
    "Evaluation",
    "EvaluationRow",
    "ItemScores",
    "Leaderboard",
    "LeaderboardScore",
    "MultipleChoice",
    "Paired",
    "Perplexity",
    "PrecisionResult",
    "PrecisionStudy",
    "Question",
    "almost_none",
    "choice_rows",
    "evaluate",
    "leaderboard_average",
    "measure_precisions",
    "multiple_choice",
    "paired",
    "perplexity",
    "windows",
]
