"""The one reader of JSON Lines: what is valid is read, what is not is named by line and reason."""

import json
import time

import pytest

from helpers.base import WorkbookError
from helpers.base.jsonl import read_records

ONE, TWO = {"text": "é\u2028\u2029\x85\x0b"}, {"text": "b"}


def written(tmp_path, content: bytes | str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(end="\n", encoding="utf-8") -> bytes:
    return end.join(json.dumps(row, ensure_ascii=False) for row in (ONE, TWO)).encode(encoding)


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (lines(), [1, 2]),
        (lines("\r\n") + b"\r\n", [1, 2]),
        (lines("\r"), [1, 2]),
        (b"\xef\xbb\xbf" + lines(), [1, 2]),
        (lines(encoding="utf-16"), [1, 2]),
        (lines(encoding="utf-16-le"), [1, 2]),
        (lines(encoding="utf-32"), [1, 2]),
        (b"\n \t\n" + lines("\n\n") + b"\n\n", [3, 5]),
        (lines("\n\ufeff"), [1, 2]),  # two files with a mark each, joined
        (json.dumps([ONE, TWO]), [1, 1]),
        (json.dumps([ONE, TWO], indent=1), [2, 5]),
    ],
    ids=["A5-u2028", "A5-crlf", "A5-cr", "A5-bom", "A5-utf16", "A5-utf16-unmarked", "A5-utf32", "A5-blank-lines",
         "A5-bom-inside", "A5-array", "A5-array-indented"],
)  # fmt: skip
def test_valid_files_are_read_with_the_numbers_of_their_lines(content, numbers, tmp_path):
    assert read_records(written(tmp_path, content)) == list(zip(numbers, [ONE, TWO], strict=True))


def test_an_object_over_several_lines_is_one_row(tmp_path):
    assert read_records(written(tmp_path, json.dumps(TWO, indent=1))) == [(1, TWO)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n{"a": 1, "a": 2}', "line 2 (row 2): The key 'a' is there twice."),
        ('\n{"a": NaN}', "line 2 (row 1): NaN is not a JSON number."),
        ('{"a": 1e999}', "line 1 (row 1): 1e999 is too large for a number."),
        ('{"a": "\\ud83d"}', "line 1 (row 1): A text in it holds half of a surrogate pair"),
        ("{" * 3, "line 1 (row 1): It is not valid JSON: Expecting property name"),
        ('{"a": ' + "[" * 100_000, "line 1 (row 1): It is nested too deeply."),
        ("[1]\n[2]", "line 2 (row 2): It is a list, not a JSON object."),
        ('{"a": 1}\nnull', "line 2 (row 2): It is null, not a JSON object."),
        ('{"a": "x"}\n{"a": "é"}'.encode("latin-1"), "line 2 (row 2): byte 8, 0xe9, is not UTF-8."),
        ('[{"a": 1},\n{"a": 1, "a": 2},\n{"b": 1}]', "line 2 (row 2): The key 'a' is there twice."),
        ('[{"a": 1},\n{"a"', "line 2 (row 2): It is not valid JSON: Expecting ':' delimiter (line 2, column 5)."),
        ('[{"a": 1},\n]', "line 2 (row 2): The array ends with a comma."),
        ('[{"a": 1}\n{"a": 1}]', "line 2 (row 2): A comma or ] is missing"),
        ('[{"a": 1},\n{"a": 1}] x', "line 2 (row 3): The file goes on after its array ends."),
        ('{"a": 1}\n'.encode("utf-16")[:-1], "line 1 is not valid UTF-16"),
        ("[\n{}, 'é'".encode("latin-1"), "line 2 is not valid UTF-8"),
        ("\ufeff \n", "is empty"),
    ],
)  # fmt: skip
def test_invalid_rows_are_named_by_file_line_and_reason(content, reason, tmp_path):
    """A5 A12"""
    with pytest.raises(WorkbookError) as refusal:
        read_records(written(tmp_path, content))
    assert "rows.jsonl" in str(refusal.value)
    assert reason in str(refusal.value)


def test_the_first_bad_rows_are_listed_and_the_others_counted(tmp_path):
    """A6"""
    with pytest.raises(WorkbookError, match=r"12 of 13 rows cannot be used") as refusal:
        read_records(written(tmp_path, '{"a": 1}\n' + "x\n" * 12))
    assert [f"line {number}" in str(refusal.value) for number in (2, 6, 7)] == [True, True, False]
    assert "and 7 more" in str(refusal.value)


@pytest.mark.parametrize(("name", "words"), [("no", "no file"), (".", "is a folder"), ("/dev/null", "regular")])
def test_what_is_no_file_is_refused(name, words, tmp_path):
    """A5"""
    with pytest.raises(WorkbookError, match=words):
        read_records(tmp_path / name)


def test_an_object_with_many_keys_costs_linear_time(tmp_path):
    """A12: also one with a key twice."""
    text = json.dumps({str(number): number for number in range(200_000)})
    path = written(tmp_path, text[:-1] + ', "199999": 0}')
    started = time.perf_counter()
    with pytest.raises(WorkbookError, match="'199999' is there twice"):
        read_records(path)
    assert time.perf_counter() - started < 3
