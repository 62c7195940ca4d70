"""Every exercise: its stub is not started, its folded solution is right, and no hint or verdict gives it away."""

import ast
import re

import jupytext
import pytest
import torch
from exercise_cells import DATA, MODULES, SOLUTIONS, SOURCES, STUBS, without_check
from torch import nn

from helpers import evaluation, exercises, models
from helpers.base import WorkbookError
from helpers.exercises import checking
from helpers.models import published_format_prompt

FUNCTIONS = [name for name, code in STUBS.items() if code.startswith("def ")]


def run(code, variables):
    """Run a cell whose last line is a check: what the check says, and the variables."""
    body, last = without_check(code)
    namespace = MODULES | variables
    exec(body, namespace)
    return eval(last, namespace), namespace


@pytest.fixture
def variables(request):
    """What the notebook of an exercise has in memory, as far as its solution uses it."""

    def of(name):
        if name == "01-4":
            return {"loaded": request.getfixturevalue("base_model")}
        if name == "02-4":
            full, mini = request.getfixturevalue("base_model"), request.getfixturevalue("laptop").falcon
            text = evaluation.read_texts(DATA / "perplexity_texts.jsonl")[0]
            return {"full": full, "mini": mini, "ids": full.tokenizer(text, return_tensors="pt")["input_ids"]}
        if name == "03-4":
            return {"chat_model": request.getfixturevalue("chat_model")}
        if name == "04-4":
            return {"sides": request.getfixturevalue("sides"), "settings": request.getfixturevalue("laptop")}
        return {}

    return of


def test_exercises_are_numbered_in_every_notebook_and_each_has_a_solution():
    notebooks = [name.partition("-")[0] for name in STUBS]
    assert sorted(set(notebooks)) == [path.stem[:2] for path in SOURCES]
    for notebook in set(notebooks):
        numbers = [name for name in STUBS if name.startswith(notebook)]
        assert numbers == [f"{notebook}-{number}" for number in range(1, notebooks.count(notebook) + 1)]
        assert len(numbers) >= 2
    assert list(STUBS) == list(SOLUTIONS)
    assert set(STUBS) == set(checking._EXERCISES)


@pytest.mark.parametrize("name", STUBS)
def test_an_untouched_stub_says_not_started_and_nothing_else(name):
    # Nothing in memory is touched either: an unattended run runs these cells.
    nothing = dict.fromkeys(("loaded", "full", "chat_model", "sides")) | {"settings": models.load_profile("laptop")}
    verdict, _ = run(STUBS[name], nothing)
    assert str(verdict) == f"Exercise {name}: not started."
    assert re.sub("<.*?>", "", verdict._repr_html_()).strip() == str(verdict)
    assert not verdict.started
    assert not verdict.right


# 05-4 trains for half a minute: a row of test_answers runs its solution.
@pytest.mark.parametrize("name", [name for name in SOLUTIONS if name != "05-4"])
def test_the_solution_is_right(name, variables):
    verdict, _ = run(SOLUTIONS[name], variables(name))
    assert verdict.right, verdict
    assert "hint" not in str(verdict)


def test_stub_and_solution_end_with_the_same_check():
    for name, stub in STUBS.items():
        assert without_check(stub)[1] == without_check(SOLUTIONS[name])[1]


def spoiled(value):
    """Another value of the same type, that is wrong."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 1.37 + 2
    if isinstance(value, str):
        return value[::-1] + "."
    if isinstance(value, torch.Tensor):
        return value.flip(-1) + 1
    return type(value)(spoiled(element) for element in value) or [0, 0]


def forms(value):
    """How a text could show a value, if that is long enough to be recognised."""
    texts = {str(value)}
    if isinstance(value, int | float):
        texts |= {f"{value:{form}}" for form in (".4g", ".4f", ".2f", ",.0f", ",.2f", ".6f")}
    if isinstance(value, tuple | list):
        texts |= {text for element in value for text in forms(element)}
    return {text for text in texts if len(text) >= 4}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_verdict_and_hints_show_no_right_value(name):
    _, namespace = run(SOLUTIONS[name], {})
    function, right, arguments_seen = namespace[re.match(r"def (\w+)", STUBS[name])[1]], set(), []

    def wrong(*arguments):
        arguments_seen.append(repr(arguments))
        value = function(*arguments)
        right.update(forms(value.tolist() if isinstance(value, torch.Tensor) else value))
        return spoiled(value)

    verdict = exercises.check(name, wrong)
    assert not verdict.right
    assert verdict.started
    assert "raised" not in verdict.text
    for text in (verdict.text, *checking._EXERCISES[name].hints):
        # A text that goes in, and comes out as it is, may be quoted as what went in.
        assert not [value for value in right if value in text and value not in "".join(arguments_seen)]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_no_hint_is_the_solution(name):
    lines = [line.partition("#")[0] for line in SOLUTIONS[name].splitlines() if "exercises.check" not in line]
    code = [
        re.sub(r"\s+|return|.* = ", "", line) for line in lines if not line.startswith(("def ", "import ", "from "))
    ]
    hints = checking._EXERCISES[name].hints
    assert len(hints) >= 2
    for text in hints:
        squeezed = re.sub(r"\s", "", text)
        assert not [line for line in code if len(line) > 8 and line in squeezed]
        # Each is one step: a sentence or three, not the way to the end.
        assert 20 < len(text) <= 120


@pytest.mark.parametrize(("name", "number"), [("00-2", 84.9), ("00-3", 59000.0), ("00-4", 240.0)])
def test_the_hints_of_a_number_do_not_hold_it(name, number):
    _, namespace = run(SOLUTIONS[name], {})
    answer = namespace[re.match(r"(\w+) =", STUBS[name])[1]]
    answer = answer[0] * answer[1] if isinstance(answer, tuple) else answer
    assert answer == pytest.approx(number, rel=0.05)
    shown = re.findall(r"[\d.,]+\d", " ".join(checking._EXERCISES[name].hints))
    assert not [text for text in shown if float(text.replace(",", "")) == pytest.approx(answer, rel=0.05)]


def test_hints_come_one_at_a_time_and_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(checking, "_asked", type(checking._asked)())
    hints = checking._EXERCISES["04-2"].hints
    verdict = exercises.check("04-2", lambda _passed, _n: (0.1, 0.9))
    assert not any(text in str(verdict) for text in hints)
    assert str(verdict).endswith('exercises.hint("04-2")')
    for count in range(1, len(hints) + 2):
        shown = str(exercises.hint("04-2"))
        assert [text in shown for text in hints] == [number < count for number in range(len(hints))]
        assert ("last one" in shown) == (count >= len(hints))
    assert "Hint 1 of 3" in exercises.hint("01-1")._repr_html_()
    assert "Hint 2 of" not in str(exercises.hint("00-1"))
    with pytest.raises(WorkbookError, match="04-2"):
        exercises.hint("04-9")


def test_a_function_that_does_nothing_is_not_started_however_it_is_written():
    def documented(*_):
        """What it will do."""

    def passing(*_):
        pass

    def returning(*_):
        return None

    for stub in (documented, passing, returning, lambda *_: None, ...):
        assert not exercises.check("00-1", stub).started
    for begun in (lambda *_: 5, lambda *_: 0, lambda *_: False, lambda *_: print(), lambda *given: given, 3, None):
        assert exercises.check("00-1", begun).started


def test_the_published_function_is_the_stub_of_its_repair_under_any_name():
    assert not exercises.check("03-1", published_format_prompt).started
    assert exercises.check("03-1", lambda *given: published_format_prompt(*given) + " ").started


def test_exactly_nn_linear_is_refused_for_the_subclass_that_falcon_has():
    """The bug that the notebook teaches; isinstance sees the subclass."""

    def count(model):
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        linear = [m for m in model.modules() if type(m) in (nn.Linear, Linear4bit, Linear8bitLt)]
        return sum(type(m) is not nn.Linear for m in linear), len(linear)

    verdict = exercises.check("02-2", count)
    assert not verdict.right
    assert "FalconLinear" in verdict.text


def test_an_answer_that_raises_is_not_right_and_an_unknown_exercise_is_named():
    verdict = exercises.check("00-1", lambda *_: 1 / 0)
    assert not verdict.right
    assert "ZeroDivisionError" in verdict.text
    assert "there is nothing yet" in exercises.check("00-1", lambda *_: print()).text
    assert "&#x27;" in exercises.check("03-3", lambda *_: "")._repr_html_()
    assert "<b>x" not in exercises.check("03-1", lambda *_: "<b>x")._repr_html_()
    with pytest.raises(WorkbookError, match="00-1"):
        exercises.check("99-9", 1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_an_answer_is_measured_on_is_in_memory_at_the_end(path):
    """Each name of a check's line is assigned in the notebook before, and not unloaded since."""
    code = [cell["source"] for cell in jupytext.read(path)["cells"] if cell["cell_type"] == "code"]
    begin = next(number for number, source in enumerate(code) if "exercises.check(" in source)
    before = ast.parse("\n".join(code[:begin]))
    stored = {node.id for node in ast.walk(before) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    unloaded = set(re.findall(r"models\.unload\((\w+)\)", "\n".join(code[:begin])))
    for source in code[begin:]:
        body, last = without_check(source)
        own = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
        own |= {node.name for node in ast.walk(ast.parse(body)) if isinstance(node, ast.FunctionDef)}
        used = {node.id for node in ast.walk(ast.parse(last)) if isinstance(node, ast.Name)} - own - {"exercises"}
        assert used <= stored - unloaded
