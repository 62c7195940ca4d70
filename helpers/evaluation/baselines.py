"""The controls of a comparison: sides that score without a look at the questions.

What a control reaches is not worth anything in a model either. They stand as rows beside the models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.evaluation.answers import is_correct
from helpers.evaluation.comparison import GREEDY, Comparison, compare
from helpers.generation.sampling import Reply

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from helpers.evaluation.comparison import Side
    from helpers.evaluation.data import Item
    from helpers.generation.sampling import Sampling

GREETING = "Hello."


def controls(
    test: Comparison, models: Mapping[str, Side], sampling: Sampling = GREEDY, *, precision: str = "bf16"
) -> Comparison:
    """Answer the items of a comparison without reading them: always alike, and as each model replies to a greeting.

    The first control gives to all items of a kind the one answer that is right most often. For the others each model
    is only greeted (``GREETING``), once, and its reply is scored on every item. Put them beside the models with
    ``test.beside(...)``. Raises as ``compare`` does.
    """
    greeted = compare([GREETING], models, sampling, precision=precision)
    replies = {"same_answer": tuple(_same_answers(test.items))}
    names = {"same_answer": "always the same answer"}
    for side, name in greeted.names.items():
        replies[f"{side}_greeted"] = greeted.replies[side] * len(test.items)
        names[f"{side}_greeted"] = f"{name}, only greeted"
    return Comparison(test.items, replies, names, dict.fromkeys(names, 0), names)


def _same_answers(items: Sequence[Item]) -> list[Reply]:
    """A reply to each item: of all answers to the items of its kind, the one that is right most often."""
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    texts = {kind: _best_constant(of_kind) for kind, of_kind in by_kind.items()}
    return [Reply(texts[item.kind], 0, 0.0, 0.0, "end") for item in items]


def _best_constant(items: Sequence[Item]) -> str:
    best, most = "", 0
    for text in dict.fromkeys(", ".join(item.answer) for item in items):
        right = [is_correct(item, text) for item in items].count(True)
        if right > most:
            best, most = text, right
    return best
