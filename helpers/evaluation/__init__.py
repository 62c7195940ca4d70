"""How well a model predicts text: perplexity, multiple choice, tasks of EleutherAI's lm-evaluation-harness, pairs.

Every result keeps what it measured item by item, so that ``paired`` can compare two models, or two precisions of one,
on the same items.
"""

from helpers.evaluation.choices import BATCH_SIZE, MultipleChoice, Question, Scored, multiple_choice
from helpers.evaluation.harness import (
    TASKS,
    DataUnavailable,
    Evaluation,
    EvaluationRow,
    ItemScores,
    choice_rows,
    evaluate,
)
from helpers.evaluation.leaderboard import PUBLISHED, Leaderboard, LeaderboardScore, leaderboard_average
from helpers.evaluation.likelihood import Perplexity, perplexity, windows
from helpers.evaluation.pairs import Paired, paired

__all__ = [
    "BATCH_SIZE",
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
    "Question",
    "Scored",
    "choice_rows",
    "evaluate",
    "leaderboard_average",
    "multiple_choice",
    "paired",
    "perplexity",
    "windows",
]
