"""The checks of all exercises by name: an answer is right, or not yet, with a hint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.base.errors import choose
from helpers.exercises import chat_prompting, comparison, fine_tuning, loading, quantization, start_here
from helpers.exercises.verdict import _Verdict

if TYPE_CHECKING:
    from helpers.exercises.verdict import Check

_CHECKS: dict[str, Check] = {
    **start_here.CHECKS,
    **loading.CHECKS,
    **quantization.CHECKS,
    **chat_prompting.CHECKS,
    **comparison.CHECKS,
    **fine_tuning.CHECKS,
}


def check(name: str, answer: object) -> _Verdict:
    """Check an answer, a value or a function, to the exercise ``name`` such as "00-1".

    A function that raises is not right yet, and the hint says what it raised. Raises WorkbookError for an unknown name.
    """
    choose(name, _CHECKS, "exercise")
    try:
        hint = _CHECKS[name](answer)
    except Exception as error:
        hint = _hint_for(error)
    if hint is None:
        return _Verdict(name, True, "Well done.")
    return _Verdict(name, False, hint)


def _hint_for(error: Exception) -> str:
    # A stub still returns None, with which the check's own arithmetic fails: that is no error of the reader's code.
    if isinstance(error, TypeError) and "NoneType" in str(error):
        return "It returned nothing yet."
    return f"It raised {type(error).__name__}: {error}"
