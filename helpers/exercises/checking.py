"""The checks of all exercises by name, and their hints."""

from __future__ import annotations

from collections import Counter

from helpers.base.errors import WorkbookError, choose
from helpers.exercises import chat_prompting, comparison, fine_tuning, loading, quantization, start_here
from helpers.exercises.reading import _UnreadableError
from helpers.exercises.verdict import _NOT_STARTED, _NOT_YET, _RIGHT, _Exercise, _Found, _Hints, _Verdict

_EXERCISES: dict[str, _Exercise] = {
    **start_here.EXERCISES,
    **loading.EXERCISES,
    **quantization.EXERCISES,
    **chat_prompting.EXERCISES,
    **comparison.EXERCISES,
    **fine_tuning.EXERCISES,
}
_asked: Counter[str] = Counter()  # how many hints of each exercise this session has shown


def check(name: str, answer: object, **measured_on: object) -> _Verdict:
    """Check an answer, a value or a function, to the exercise ``name`` such as "00-1".

    ``measured_on`` are the models in memory by which some answers are measured, such as ``model=loaded``. A function
    that raises is not right yet, and the verdict says what it raised. Raises WorkbookError for an unknown name.
    """
    choose(name, _EXERCISES, "exercise")
    exercise = _EXERCISES[name]
    if exercise.is_untouched(answer):
        return _Verdict(name, _NOT_STARTED)
    try:
        outcome = exercise.check(answer, **measured_on)
    except (_UnreadableError, WorkbookError) as error:
        outcome = str(error)
    except Exception as error:
        outcome = f"It raised {type(error).__name__}: {error}"
    if isinstance(outcome, str):
        return _Verdict(name, _NOT_YET, outcome)
    if isinstance(outcome, _Found):
        return _Verdict(name, _RIGHT, outcome.text)
    return _Verdict(name, _RIGHT, "Well done.")


def hint(name: str) -> _Hints:
    """The hints of an exercise so far, with one more at each call. Raises WorkbookError for an unknown name."""
    choose(name, _EXERCISES, "exercise")
    hints = _EXERCISES[name].hints
    _asked[name] = min(_asked[name] + 1, len(hints))
    return _Hints(name, hints[: _asked[name]], len(hints))
