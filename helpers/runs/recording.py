"""Record the values and figures of a notebook, compared with the values that were expected.

``schema`` describes the files. A verdict is "as expected", "differs" or "unmeasured" (nothing to compare with; this
never counts as passed). The judgement ``agrees`` answers another question: whether the value agrees with a statement
of the article. What is shown of a value says both, each in words of its own. The runner names the run to a notebook
through environment variables (``base.settings``); without a run, values are compared and shown, and kept only in
memory.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from helpers.base import settings
from helpers.base.stats import Measured
from helpers.base.text import is_blank, well_formed
from helpers.runs import store
from helpers.runs.claims import _claims_for_recording
from helpers.runs.expected import _is_number, _matches
from helpers.runs.redaction import _redact
from helpers.runs.schema import AS_EXPECTED, DIFFERS, _plain_value, _RecordedValue
from helpers.runs.store import ResultError, _changed_results, _read_results
from helpers.runs.value_lines import _COLUMNS, _Record, _Records
from helpers.runs.wording import _agrees

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from helpers.base.stats import Recordable
    from helpers.runs.schema import Value, _Claim, _ExpectedValue

# Without a run, what each notebook recorded, by name.
_session: dict[str, dict[str, _RecordedValue]] = {}


def record(  # noqa: PLR0913 (every notebook uses these names)
    name: str,
    value: Recordable,
    unit: str = "",
    claim: str | None = None,
    *,
    tolerance: float | None = None,
    agrees: bool | None = None,
    model: str | None = None,
) -> _Record:
    """Compare a value with the expected one and keep it in the run's ``results.json``.

    ``value`` is a number, a text or a bool (numpy and torch scalars too); ``claim`` names a statement of the source
    article, such as "A1". ``tolerance``, in the value's unit, is the least that ``expected_from_runs`` allows a number:
    give it if a hundredth of the value is finer than the value's own meaning, as for a difference near zero.
    ``agrees`` says whether the value agrees with that statement as published; None: it only illustrates it. If the
    list of claims has a wording for the statement, such as "at least", that decides and ``agrees`` is not asked.
    ``model`` is the ``ModelRef.label`` of the model it was measured on; None: it was computed from published
    configurations.
    A name recorded again in the same notebook replaces the earlier value.
    Raises ResultError for an empty name, any other type, NaN and infinity, a tolerance that is negative or not finite,
    ``agrees`` without a claim or other than true or false, and for what is not a text where one is due.
    """
    (entry,) = record_all({name: Measured(value, unit, claim, tolerance, agrees, model)})
    return entry


def record_all(
    values: Mapping[str, Recordable | Measured],
    *,
    unit: str = "",
    claim: str | None = None,
    tolerance: float | None = None,
    model: str | None = None,
) -> _Records:
    """Record the values of a section by name, with one call; ``record`` says what is kept and what is refused.

    A value that needs more than a name is a ``Measured``. ``unit``, ``claim``, ``tolerance`` and ``model`` apply to
    every value that does not bring its own; ``tolerance`` only to numbers. If one value is refused, none is kept::

        runs.record_all(
            {
                "size_ratio": base.Measured(ratio, "x", agrees=abs(ratio / 2.5 - 1) < 0.05),
                "parameters": base.Measured(count, "parameters"),
            },
            claim="A5",
        )
    """
    if not isinstance(values, Mapping):
        raise ResultError('Give the values by name: {"a_name": 1.5, ...}.')
    common = Measured(0, unit, claim, tolerance, None, model)
    expected = store.read_expected(settings.expected_file())
    contents = {}
    for name, value in values.items():
        measured = _completed(value, common)
        contents[name] = _judged(name, measured, expected.get(f"{settings.notebook_name()}/{name}"))
    entries = _with_claims(contents)
    _keep(entries)
    return _Records(entries)


def record_figure(name: str, figure: Figure) -> Figure:
    """Save a figure as ``figures/<notebook>_<name>.png`` of the run and return it, so that the cell shows it."""
    folder, notebook = settings.run_folder(), settings.notebook_name()
    if folder is not None:
        path = folder / "figures" / f"{notebook}_{_file_part(name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link, or another name of a file elsewhere
        # Without the name of the software, which holds matplotlib's version, equal figures are equal files.
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        with _changed_results(folder, _without_tokens) as results:
            results.figures.setdefault(notebook, {})[name] = path.relative_to(folder).as_posix()
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        # Otherwise the inline backend shows a pyplot figure a second time.
        pyplot.close(figure)
    return figure


def _file_part(name: str) -> str:
    """A name as a part of a file name, another one for every name, also where case or accents do not count.

    Small letters, digits, dots and underscores stay, with "-" for "_". Other names end with a part of their hash.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower())[:80]
    if re.fullmatch(r"[a-z0-9._]{1,80}", name):
        return name.replace("_", "-")
    return f"{plain}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def recorded() -> DataFrame:
    """Return a table of what this notebook recorded: is it as in earlier runs, and does it agree with the article?"""
    import pandas as pd

    folder, notebook = settings.run_folder(), settings.notebook_name()
    by_notebook = _session if folder is None else _read_results(folder).values
    entries = _with_claims(by_notebook.get(notebook, {}))
    index = pd.Index([entry.shown_name for entry in entries], name="name")
    return pd.DataFrame([entry.row() for entry in entries], index=index, columns=_COLUMNS)


def _with_claims(contents: Mapping[str, _RecordedValue]) -> list[_Record]:
    """The values with the statements that they are about, judged by the wording of these."""
    claims: Mapping[str, _Claim] = {}
    if any(content.claim for content in contents.values()):
        claims = _claims_for_recording()
    entries = []
    for name, content in contents.items():
        claim = claims.get(content.claim or "")
        judged = content.model_copy(update={"agrees": _agrees(claim, name, content)})
        entries.append(_Record(name, judged, claim))
    return entries


def _forget(run_dir: Path, notebook: str) -> None:
    """Drop what a notebook recorded, before it runs again."""
    with _changed_results(run_dir) as results:
        results.values.pop(notebook, None)
        for figure in results.figures.pop(notebook, {}).values():
            (run_dir / figure).unlink(missing_ok=True)


def _completed(value: Recordable | Measured, common: Measured) -> Measured:
    """The value with what all values of the call have in common, if it does not bring its own."""
    measured = value if isinstance(value, Measured) else Measured(value)
    tolerance = measured.tolerance
    # A text or a yes has no tolerance, so a common one is not meant for it.
    if tolerance is None and not isinstance(_item(measured.value), str | bool):
        tolerance = common.tolerance
    return replace(
        measured,
        unit=measured.unit or common.unit,
        claim=measured.claim or common.claim,
        tolerance=tolerance,
        model=measured.model or common.model,
    )


def _judged(name: str, measured: Measured, expected: _ExpectedValue | None) -> _RecordedValue:
    """The value as it is kept, compared with the expected one. Raises ResultError for what cannot be recorded."""
    _check_texts(name, measured)
    value, tolerance, agrees = _plain(name, measured.value), _item(measured.tolerance), _item(measured.agrees)
    if not _fits(tolerance, value):
        raise ResultError(f"{name!r} cannot have the tolerance {tolerance!r}. Give a number a finite one from 0 up.")
    if agrees is not None and measured.claim is None:
        raise ResultError(f"{name!r}: `agrees` needs a `claim`. Name the claim that the value is judged by.")
    # Any other value is true or false to Python too: the text "no" is true, and so is NaN.
    if agrees is not None and not isinstance(agrees, bool):
        raise ResultError(f"{name!r}: `agrees` must be True, False or None, but is {agrees!r}.")
    entry = _RecordedValue(
        value=value, unit=measured.unit, claim=measured.claim, floor=tolerance, agrees=agrees, model=measured.model
    )
    if expected is None:
        return entry
    same = _matches(value, expected.value, expected.tolerance or 0)
    comparison = {
        "expected": expected.value,
        "tolerance": expected.tolerance,
        "source": expected.source,
        "verdict": AS_EXPECTED if same else DIFFERS,
    }
    return entry.model_copy(update=comparison)


def _check_texts(name: object, measured: Measured) -> None:
    """Raise ResultError for a name that is blank, and for what is not a text that a file can hold."""
    if not isinstance(name, str) or is_blank(name):
        raise ResultError(f"A recorded value needs a name, which is a text, but it is {name!r}.")
    for field, text in (("name", name), ("unit", measured.unit), ("claim", measured.claim), ("model", measured.model)):
        if text is not None and not (isinstance(text, str) and well_formed(text)):
            raise ResultError(f"{name!a}: its {field} must be a text of whole characters, but is {text!a}.")


def _fits(tolerance: object, value: Value) -> TypeGuard[float | None]:
    return tolerance is None or (_is_number(value) and _is_number(tolerance) and 0 <= tolerance < math.inf)


def _item(value: object) -> object:
    """A value of numpy or torch as Python's own; any other as it is."""
    # A text is a text, though numpy's texts have an item too; an array of several has none to give.
    if hasattr(value, "item"):
        with suppress(TypeError, ValueError, RuntimeError):
            return value.item()
    return value


def _plain(name: str, value: object) -> Value:
    item = _item(value)
    numpy = sys.modules.get("numpy")
    # What is masked is missing, but its item is a number.
    if not isinstance(item, bool | int | float | str) or (numpy and numpy.ma.is_masked(value)):
        kind = type(value).__name__
        raise ResultError(f"{name!r} is a {kind}. Record a number, a text or a bool, one at a time.")
    if isinstance(item, float) and not math.isfinite(item):
        raise ResultError(f"{name!r} is {item}. Record a finite number, or a text that says why there is none.")
    try:
        return _plain_value(item)
    except ValueError as error:
        raise ResultError(f"{name!r} cannot be kept in a file: {error}.") from error


def _keep(entries: Sequence[_Record]) -> None:
    contents = {entry.name: entry.content for entry in entries}
    folder, notebook = settings.run_folder(), settings.notebook_name()
    if folder is None:
        _session.setdefault(notebook, {}).update(contents)
        return
    with _changed_results(folder, _without_tokens) as results:
        results.values.setdefault(notebook, {}).update(contents)


def _without_tokens(content: object) -> object:
    # At once, because a runner that is killed sweeps no file; what else is secret, only the runner knows.
    return _redact(content, ())
