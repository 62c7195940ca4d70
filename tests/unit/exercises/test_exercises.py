"""Every exercise's check refuses the stub and wrong answers, and accepts the folded solution."""

import re
from pathlib import Path

import jupytext
import pytest

from helpers import exercises
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.exercises import checking
from helpers.exercises.verdict import _Verdict

SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))
HEADER = "import torch\nfrom helpers import exercises, machine\n"

WRONG = {
    "00-1": "lambda layers, heads, size, b: layers * heads * size * b",
    "00-2": "6 * 178_557_088_768 * 3.5e12 / (4096 * 312e12) / 86_400",
    "00-3": "8 * 80e9 / 4_751_360",
    "01-1": "lambda config: 2 / 3",
    "01-2": "lambda model, ids, count: torch.cat([ids, ids[:, -1:].repeat(1, count)], dim=1)",
    "01-3": "lambda probabilities, p: probabilities * (probabilities > 1 - p)",
    "02-1": "lambda rows, columns: rows * columns / 2",
    "02-2": "lambda m: (0, sum(type(x) is torch.nn.Linear for x in m.modules()))",
    "02-3": "lambda p, s, c: (c[torch.cat([p & 15, p >> 4], 1).long()].view(-1, 64) * s[:, None]).flatten()",
    "03-1": "lambda message, history, system: f'System: {system}\\nUser: {message}\\nFalcon:'",
    "03-2": "lambda history, question, limit: history[-2:]",
    "03-3": "lambda text, stops: text.split(stops[0])[0]",
    "04-1": "lambda text, answer, others: all(word in text.lower() for word in answer)",
    "04-2": "lambda k, n: (k / n - 0.1, k / n + 0.1)",
    "04-3": "lambda a, b: sum(__import__('math').comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)",
    "05-1": "lambda inputs, outputs, rank: inputs * outputs",
    "05-2": "lambda ids, prompt: [-100] * len(ids)",
    "05-3": "lambda weight, a, b, alpha, rank: weight + b @ a",
}


def cells(path: Path, tag: str) -> list[str]:
    return [c["source"] for c in jupytext.read(path)["cells"] if tag in c["metadata"].get("tags", [])]


def verdict_of(code: str) -> _Verdict:
    """Run a cell whose last line is a check, and return what the check said."""
    body, last = code.rstrip().rsplit("\n", 1)
    namespace: dict = {}
    exec(HEADER + body, namespace)
    return eval(last, namespace)


def solution(markdown: str) -> str:
    return re.search(r"```python\n(.*?)```", markdown, re.DOTALL).group(1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_stub_is_refused_and_solution_accepted(path):
    stubs, solutions = cells(path, "exercise"), [solution(text) for text in cells(path, "solution")]
    assert len(stubs) == len(solutions) >= 2
    for stub, solved in zip(stubs, solutions, strict=True):
        assert not verdict_of(stub).right
        right = verdict_of(solved)
        assert right.right, right


@pytest.mark.parametrize("name", checking._CHECKS)
def test_a_wrong_answer_is_refused_with_a_hint(name):
    verdict = exercises.check(name, eval(WRONG[name], {"torch": __import__("torch")}))
    assert not verdict.right
    assert len(verdict.text) > 20
    assert "raised" not in verdict.text


def test_every_check_belongs_to_a_notebook():
    used = {n for p in SOURCES for code in cells(p, "exercise") for n in re.findall(r'check\("([^"]+)"', code)}
    assert used == set(checking._CHECKS)


def test_an_answer_that_raises_is_not_right_and_an_unknown_exercise_is_named():
    verdict = exercises.check("00-1", lambda *_: 1 / 0)
    assert not verdict.right
    assert "ZeroDivisionError" in verdict.text
    assert "&#x27;" in exercises.check("03-3", lambda *_: "")._repr_html_()
    with pytest.raises(WorkbookError, match="00-1"):
        exercises.check("99-9", 1)
