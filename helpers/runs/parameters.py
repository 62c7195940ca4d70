"""The parameters of a notebook: their defaults, their limits, and the check of every value before anything runs.

The cell tagged ``parameters`` holds names and defaults. What a value may be beyond the type of its default is declared
beside the notebook's models, in its metadata: ``workbook: parameters:`` with, for each name,

=========  =========================================================
``least``  the least number
``above``  a number below all values, which is not a value itself
``most``   the greatest number
``blank``  false: a text needs something that can be read
=========  =========================================================

A text for a parameter (from the command line) is read by the type of the default. A text stays as it is, letter for
letter; no YAML is involved, for which ``010`` is 8, ``1:30`` is 90 and ``No`` is false.
"""

from __future__ import annotations

import ast
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from helpers.base.text import is_blank, well_formed
from helpers.runs.document import UsageError, _metadata, _source, _tags

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from helpers.runs.document import _Document

# What a numpy, a torch and a C integer can hold.
_LEAST_WHOLE, _MOST_WHOLE = -(2**63), 2**63 - 1
MOST_LETTERS = 100_000
_SHOWN_LETTERS = 60
_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# Words that stand for a value in YAML, Python or JSON: a parameter without a type could mean either.
_AMBIGUOUS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "none", "null", "nan", "inf", "infinity"})
_NOUNS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list in JSON's form",
    dict: "a mapping in JSON's form",
}


class _Limits(BaseModel):
    """What a parameter's value may be, beyond its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    blank: bool = True

    def permit(self, value: object) -> bool:
        """True if a value of the right type is within the limits."""
        if isinstance(value, str):
            return self.blank or not is_blank(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def words(self) -> str:
        """The limits as the end of a phrase, such as " from 1 to 10"; empty without limits."""
        if not self.blank:
            return " that is not blank"
        words = f" from {self.least}" if self.least is not None else ""
        if self.above is not None:
            words = f" above {self.above}"
        if self.most is not None:
            words += f" to {self.most}" if self.least is not None else " and" * bool(words) + f" at most {self.most}"
        return words


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a notebook."""

    name: str
    default: object
    limits: _Limits

    def read(self, text: str) -> object:
        """The value that a text of the command line means. Raises UsageError if it is not valid."""
        try:
            return self._fitting(_parsed(text, self.default))
        except (ValueError, RecursionError) as error:
            raise UsageError(self._refusal(text)) from error

    def take(self, value: object, origin: str) -> object:
        """A value that a file gives. Raises UsageError if it is not valid; ``origin`` is the clause that says where."""
        try:
            return self._fitting(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{origin}: {self._refusal(value)}") from error

    def _fitting(self, value: object) -> object:
        if isinstance(self.default, float) and type(value) is int:
            value = float(value)
        if isinstance(self.default, tuple) and isinstance(value, list):
            value = tuple(value)
        if self.default is not None and type(value) is not type(self.default):
            raise ValueError("another type")
        _check(value)
        _check_items(value, self.default)
        if not self.limits.permit(value):
            raise ValueError("beyond its limits")
        return value

    def _refusal(self, value: object) -> str:
        shown = repr(value)
        if len(shown) > _SHOWN_LETTERS:
            shown = f"{shown[:_SHOWN_LETTERS]}... ({len(shown)} characters)"
        return f"The parameter {self.name} must be {self._wanted()}, not {shown}."

    def _wanted(self) -> str:
        if self.default is None:
            return 'a value in JSON\'s form, such as 5, true, null or "a text" in double quotes'
        kind = list if isinstance(self.default, tuple) else type(self.default)
        words = _NOUNS.get(kind, kind.__name__) + self.limits.words()
        if kind is int and self.limits == _Limits():
            words += f" from {_LEAST_WHOLE} to {_MOST_WHOLE}"
        if kind is str:
            words += f" of at most {MOST_LETTERS} characters, in valid Unicode"
        return words if self.limits.words() else f"{words}, such as {self.default!r}"


def _parse_parameters(options: Iterable[str]) -> dict[str, str]:
    """``["seed=1"]`` -> ``{"seed": "1"}``.

    Raises UsageError for a text without name and equals sign, and for a name given twice.
    """
    texts: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"Write a parameter as name=value, not {name!r}.")
        if name in texts:
            raise UsageError(f"The parameter {name} is given twice. Give each parameter one value.")
        texts[name] = value
    return texts


def _declared_parameters(notebook: _Document, title: str, *, own: bool = False) -> dict[str, _Parameter]:
    """Return the parameters of the cell tagged ``parameters``, by name, with their declared limits.

    A reader's ``own`` notebook needs no such cell, and a default there that is computed is no parameter.

    Raises UsageError when there is no such cell, a default is not a literal (papermill would not compute it), or a
    limit names no parameter, is not valid or excludes the default.
    """
    defaults = _defaults(_parameters_cell(notebook, title, own=own), title, own=own)
    limits = _declared_limits(notebook, defaults, title)
    parameters = {name: _Parameter(name, default, limits[name]) for name, default in defaults.items()}
    for parameter in parameters.values():
        if not own or parameter.limits != _Limits():
            parameter.take(parameter.default, f"{title}, the default of {parameter.name}")
    return parameters


def _parameters_cell(notebook: _Document, title: str, *, own: bool) -> str:
    """The text of the cell tagged ``parameters``; empty if an own notebook has none."""
    cells = [_source(cell) for cell in notebook["cells"] if "parameters" in _tags(cell)]
    if len(cells) == 1 or (own and not cells):
        return "".join(cells)
    raise UsageError(f"{title} needs exactly one cell tagged 'parameters', and has {len(cells)}. Correct its source.")


def _defaults(source: str, title: str, *, own: bool) -> dict[str, object]:
    try:
        statements = _statements(source)
    except (SyntaxError, ValueError) as error:
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        raise UsageError(f"{title}: the cell tagged 'parameters' is not valid Python{line}. Correct it.") from error
    defaults = {}
    for statement in statements:
        name, value = _assignment(statement)
        if name is None or value is None:
            continue
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError as error:
            if not own:
                raise UsageError(f"{title}: the parameter {name} must be a plain value, not a computed one.") from error
    return defaults


def _statements(source: str) -> list[ast.stmt]:
    """The statements of a cell, in which IPython's own commands, such as %load_ext, may stand."""
    with suppress(SyntaxError):
        return ast.parse(source).body
    from IPython.core.inputtransformer2 import TransformerManager

    return ast.parse(TransformerManager().transform_cell(source)).body


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and value of an assignment to one name; None for any other statement."""
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def _declared_limits(notebook: _Document, defaults: Mapping[str, object], title: str) -> dict[str, _Limits]:
    declared = _metadata(notebook).get("parameters", {})
    if not isinstance(declared, dict):
        raise UsageError(f"{title}: `workbook: parameters:` must name parameters, each with its limits.")
    limits = dict.fromkeys(defaults, _Limits())
    for name, words in declared.items():
        if name not in defaults:
            raise UsageError(f"{title} declares limits of {name!r}, which is not a parameter. Correct the declaration.")
        try:
            limits[name] = _Limits.model_validate(words)
        except ValidationError as error:
            wrong = ".".join(map(str, error.errors()[0]["loc"]))
            raise UsageError(
                f"{title}: the limits of the parameter {name} are not valid ({wrong or 'not a mapping'}). "
                "Use least, above and most with finite numbers, or blank."
            ) from error
    return limits


def _parsed(text: str, default: object) -> object:
    """A text as a value of the default's type. Raises ValueError if it is none."""
    if isinstance(default, str):
        return text
    if default is None:
        return _untyped(text)
    text = text.strip(" ")
    if isinstance(default, bool):
        return _truth(text)
    if isinstance(default, int):
        return _whole(text)
    if isinstance(default, float):
        return _number(text)
    return _from_json(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text.lower() == "true"


def _whole(text: str) -> int:
    # A longer text cannot be within 64 bits, and Python takes its time over thousands of digits.
    if not _WHOLE.fullmatch(text) or len(text) > len(str(_LEAST_WHOLE)):
        raise ValueError("not a whole number")
    return int(text)


def _number(text: str) -> float:
    match = _NUMBER.fullmatch(text)
    digits = match and (match[1] or "") + (match[2] or "").strip(".")
    if not digits or len(text) > MOST_LETTERS:
        raise ValueError("not a number")
    number = float(text)
    if number == 0 and digits.strip("0."):
        raise ValueError("nearer to 0 than a number can be")
    return number


def _untyped(text: str) -> object:
    """The value of a parameter whose default is None: JSON, or a text that can mean nothing else."""
    try:
        return _from_json(text)
    except ValueError:
        if text[:1].isalpha() and text.strip().lower() not in _AMBIGUOUS:
            return text
        raise


def _from_json(text: str) -> object:
    def refuse(*_: object) -> object:
        raise ValueError("not a finite number")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key twice")
        return content

    try:
        value: object = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("too deep") from error
    return value


def _check(value: object) -> None:
    """Raise ValueError for a value that no notebook can use: not finite, beyond 64 bits, half a character, too long."""
    if isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key)
            _check(item)
    elif not _is_usable(value):
        raise ValueError("not usable")


def _is_usable(value: object) -> bool:
    if isinstance(value, str):
        return well_formed(value) and len(value) <= MOST_LETTERS
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or _LEAST_WHOLE <= value <= _MOST_WHOLE


def _check_items(value: object, default: object) -> None:
    """Raise ValueError if the items of a list are not of the type that all items of the default have."""
    if not isinstance(value, list | tuple) or not isinstance(default, list | tuple):
        return
    kinds = {type(item) for item in default}
    if kinds == {float}:
        kinds = {float, int}
    if kinds and any(type(item) not in kinds for item in value):
        raise ValueError("items of another type")
