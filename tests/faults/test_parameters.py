"""Parameters: what is refused before anything starts, and what reaches the notebook literally."""

import pytest

from .judge import workbook


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("steps=1:30", "steps"),
        ("nothing", "name=value"),
    ],
)
def test_a_parameter_is_refused(given, words, tmp_path):
    workbook("run", "--folder", tmp_path / "run", "-p", given).ends(2, words)
