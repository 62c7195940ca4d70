"""Parameters: what is refused before anything starts, and what reaches the notebook literally (B8, F2, F12, F20)."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from helpers import runs
from helpers.base.files import ROOT
from helpers.models import Budget, load_profile
from helpers.runs.notebook import _left_out, _plan_run, _select
from helpers.runs.parameters import _parse_parameters

from .judge import Fault, refused, same, workbook

HUGE = "1" + "0" * 5000


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The workbook's notebooks with what the headers of their sources declare now, rendered or not."""
    folder = tmp_path_factory.mktemp("notebooks")
    for source in sorted((ROOT / "notebooks" / "source").glob("*.py")):
        header = source.read_text(encoding="utf-8").split("# ---\n")[1]
        metadata = yaml.safe_load("".join(line[2:] for line in header.splitlines(keepends=True)))["jupyter"]
        path = ROOT / "notebooks" / f"{source.stem}.ipynb"
        document = json.loads(path.read_text(encoding="utf-8")) | {"metadata": metadata}
        (folder / path.name).write_text(json.dumps(document), encoding="utf-8")
    return folder


def asked(notebooks, run, only, *parameters, profile="laptop"):
    """Ask for a run of one notebook, which must end before the run's folder is made."""
    request = runs.Request(profile, only=[only], parameters=parameters, notebooks=notebooks, folder=run)
    return lambda: runs.run(request)


@pytest.mark.parametrize(
    ("only", "given", "words"),
    [
        pytest.param(only, given, words, id=f"B8-{given[:40]}")
        for only, given, words in [
            ("05", "learning_rate=.nan", ["learning_rate", "above 0", "at most 1"]),
            ("05", "learning_rate=nan", ["learning_rate", "above 0"]),
            ("05", "learning_rate=inf", ["learning_rate", "above 0"]),
            ("05", "learning_rate=-.inf", ["learning_rate"]),
            ("05", "learning_rate=1e400", ["learning_rate"]),
            ("05", "learning_rate=1e-400", ["learning_rate"]),
            ("05", "learning_rate=0", ["learning_rate", "above 0"]),
            ("05", "learning_rate=-2e-4", ["learning_rate", "above 0"]),
            ("05", "learning_rate=2e", ["learning_rate"]),
            ("05", "learning_rate=0,002", ["learning_rate"]),
            ("05", "learning_rate=true", ["learning_rate"]),
            ("05", "learning_rate=0x1p-3", ["learning_rate"]),
            ("05", "steps=0", ["steps", "from 1 to"]),
            ("05", "steps=-1", ["steps", "from 1 to"]),
            ("05", "steps=1.0", ["steps", "a whole number"]),
            ("05", "steps=1e3", ["steps"]),
            ("05", "steps=true", ["steps"]),
            ("05", "steps=null", ["steps"]),
            ("05", "steps=~", ["steps"]),
            ("05", "steps=", ["steps"]),
            ("05", "steps=[1]", ["steps"]),
            ("05", "steps=2026-11-27", ["steps"]),
            ("05", "steps=٣", ["steps"]),
            ("05", "rank=0", ["rank", "from 1 to"]),
            ("05", "batch_size=0", ["batch_size"]),
            ("05", "gradient_checkpointing=yes", ["gradient_checkpointing", "true or false"]),
            ("05", "gradient_checkpointing=on", ["gradient_checkpointing"]),
            ("05", "gradient_checkpointing=1", ["gradient_checkpointing"]),
            ("05", "gradient_checkpointing=off", ["gradient_checkpointing"]),
            ("00", "seed=-1", ["seed", "from 0 to 4294967295"]),
            ("00", f"seed={2**63}", ["seed", "from 0 to 4294967295"]),
            ("00", f"seed={HUGE}", ["seed", "from 0 to 4294967295", "5003 characters"]),
            ("01", "max_new_tokens=0", ["max_new_tokens", "from 2 to"]),
            ("01", "max_new_tokens=1", ["max_new_tokens", "from 2 to"]),
            ("04", "max_new_tokens=1", ["max_new_tokens", "from 2 to"]),
            ("03", "max_new_tokens=0", ["max_new_tokens", "from 1 to"]),
            ("01", "prompt=", ["prompt", "not blank"]),
            ("01", "prompt= \t", ["prompt", "not blank"]),
            ("01", "prompt=\u200b\u00a0", ["prompt", "not blank"]),
            ("03", "question=\udcff", ["question", "valid Unicode", "udcff"]),
            ("03", f"question={'a' * 100_001}", ["question", "at most 100000 characters"]),
        ]
    ]
    + [
        pytest.param(only, given, words, id=f"F2-{given}")
        for only, given, words in [
            ("05", "steps=010", ["steps"]),
            ("05", "steps=1:30", ["steps"]),
            ("05", "steps=1_000", ["steps"]),
            ("05", "steps=0x10", ["steps"]),
            ("05", "steps=0o7", ["steps"]),
            ("05", "steps=1 #2", ["steps"]),
            ("05", "learning_rate=00.1", ["learning_rate"]),
            ("05", "nothing", ["name=value"]),
            ("05", "=1", ["name=value"]),
            ("05", "step=1", ["step", "steps"]),
        ]
    ],
)
def test_a_value_is_refused_before_anything_starts(notebooks, tmp_path, only, given, words):
    refused(asked(notebooks, tmp_path / "run", only, given), *words)
    same((tmp_path / "run").exists(), False)


def test_b8_a_parameter_given_twice_is_refused(notebooks, tmp_path):
    refused(asked(notebooks, tmp_path / "run", "00", "seed=1", "seed=2"), "seed", "twice")


@pytest.mark.parametrize(
    ("only", "given", "value"),
    [
        pytest.param(only, f"{name}={text}", value, id=f"F2-{name}={text[:30]!r}")
        for only, name, text, value in [
            *[
                ("03", "question", text, text)
                for text in [
                    "Rate C #1 please",
                    "&salt and pepper",
                    "No",
                    "~",
                    "null",
                    "12",
                    "010",
                    "What? Why: because",
                    "- a list?",
                    "{a: 1}",
                    "'quoted'",
                    '"quoted"',
                    "two\nlines",
                    " spaces around ",
                    "*star",
                    "%percent",
                    "a=b",
                    "ä 🙂 \u2028",
                    "\\n",
                    "!tag",
                ]
            ],
            ("05", "steps", "7", 7),
            ("05", "steps", "+7", 7),
            ("05", "learning_rate", "1", 1.0),
            ("05", "learning_rate", "2e-4", 2e-4),
            ("05", "learning_rate", ".5", 0.5),
            ("05", "gradient_checkpointing", "False", False),
            ("00", "seed", str(2**32 - 1), 2**32 - 1),
            ("00", "seed", "-0", 0),
        ]
    ],
)
def test_a_value_reaches_the_notebook_as_it_was_given(notebooks, only, given, value):
    (plan,) = _plan_run(load_profile("laptop"), notebooks, [only], _parse_parameters([given]), {})
    found = plan.given[given.partition("=")[0]]
    same((found, type(found)), (value, type(value)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"B8-{name}: {value!r}")
        for name, value in [
            ("steps", 0),
            ("steps", True),
            ("steps", "10"),
            ("steps", None),
            ("learning_rate", float("nan")),
            ("learning_rate", float("inf")),
            ("learning_rate", 2),
            ("seed", 2**63),
            ("gradient_checkpointing", "no"),
        ]
    ],
)
def test_a_value_of_the_profile_is_checked_too(notebooks, tmp_path, name, value):
    profile = replace(load_profile("laptop"), parameters={"05_fine_tuning": {name: value}})
    message = refused(asked(notebooks, tmp_path / "run", "05", profile=profile), name, "Profile laptop sets")
    same("Traceback" in message, False)


@pytest.mark.parametrize("text", [pytest.param(text, id=f"B8-{text}") for text in ("steps=0", "steps=1:30")])
def test_a_value_of_the_resumed_run_is_checked_too(notebooks, text):
    earlier = _parse_parameters([text])
    refused(lambda: _plan_run(load_profile("laptop"), notebooks, ["05"], {}, earlier), "steps", "from 1 to")


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(value, id=f"B8-{value}") for value in (0, -1, float("inf"), float("nan"), 1e30, True)],
)
@pytest.mark.parametrize("name", ["seconds", "cell_seconds", "expected_seconds"])
def test_a_budget_is_a_time(name, seconds):
    refused(lambda: Budget(**({"seconds": 60, "cell_seconds": 60} | {name: seconds})), name, error=ValueError)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        pytest.param("", ["--only needs the start of a notebook's name"], id="F20-empty"),
        pytest.param(",", ["--only needs"], id="F20-comma"),
        pytest.param("00,", ["--only needs"], id="F20-trailing-comma"),
        pytest.param(" ", ["--only needs"], id="F20-space"),
        pytest.param("7", ["'7'"], id="F20-unknown"),
    ],
)
@pytest.mark.whole
def test_only_nothing_is_refused(only, words, tmp_path):
    workbook("run", "--folder", tmp_path / "run", "--only", only).ends(2, *words)
    same((tmp_path / "run").exists(), False)


def test_f12_what_has_no_budget_is_named_and_does_not_stop_the_others(notebooks, tmp_path):
    folder = tmp_path / "notebooks"
    shutil.copytree(notebooks, folder)
    names = ("Untitled", "01_loading-Copy1", "._01_loading", "06_mine", "05_fine_tuning.old", "Kopie von 01 ä")
    for name in names:
        (folder / f"{name}.ipynb").write_text("{half a file", encoding="utf-8")
    (folder / "x.ipynb").mkdir()
    profile = load_profile("laptop")
    same([path.stem for path in _select(folder, [], profile)], list(profile.budgets))
    same([path.stem for path in _select(folder, ["01"], profile)], ["01_loading"])
    (said,) = _left_out(folder, profile)
    for name in (*names, "x"):
        if f"{name}.ipynb" not in said:
            raise Fault("wrong", f"{name} is not named: {said}")
    for name in ("Untitled", "01_loading-Copy1", "06_mine", "Kopie"):
        refused(asked(folder, tmp_path / "run", name), "no time budget", "--notebook")


def test_f12_a_notebook_with_a_budget_that_is_gone_is_named(notebooks, tmp_path):
    folder, profile = tmp_path / "notebooks", load_profile("laptop")
    shutil.copytree(notebooks, folder)
    (folder / "03_chat_prompting.ipynb").unlink()
    planned = {plan.name for plan in _plan_run(profile, folder, [], {}, {})}
    same(planned, profile.budgets.keys() - {"03_chat_prompting"})
    (said,) = _left_out(folder, profile)
    same(all(words in said for words in ("03_chat_prompting", "workbook render")), True)
    refused(lambda: _plan_run(profile, folder, ["03"], {}, {}), "'03'")


def test_b8_limits_that_exclude_the_default_are_refused(notebooks, tmp_path):
    folder = tmp_path / "notebooks"
    shutil.copytree(notebooks, folder)
    path = folder / "05_fine_tuning.ipynb"
    document = json.loads(path.read_text())
    for limits, words in [
        ({"steps": {"least": 200}}, ["the default of steps"]),
        ({"stepz": {"least": 1}}, ["'stepz'"]),
        ({"steps": {"least": "1"}}, ["steps", "least"]),
        ({"steps": {"minimum": 1}}, ["steps", "minimum"]),
        ({"steps": 1}, ["steps", "not a mapping"]),
        ([1], ["parameters"]),
    ]:
        document["metadata"]["workbook"]["parameters"] = limits
        path.write_text(json.dumps(document))
        refused(lambda: _plan_run(load_profile("laptop"), folder, ["05"], {}, {}), "05_fine_tuning", *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        pytest.param(old, new, words, id=f"B8-{new}")
        for old, new, words in [
            *[("cpus: 2", f"cpus: {text}", ["010" if text == "-010" else text])
              for text in ("010", "-010", "1:30", "0x10", "0b11", "yes", "No", "ON", "0_1")],
            *[("cpus: 2", f"cpus: {text}", ["cpus"]) for text in ('"2"', "true", "2.5", "-2", "~", "[2]", ".inf")],
            *[("seconds: 120,", f"seconds: {text},", ["seconds"]) for text in ("true", '"60"')],
            ("seconds: 120,", "seconds: 2026-11-27,", ["2026-11-27 at line"]),
            ("seconds: 120,", "seconds: 2:00,", ["2:00"]),
            ("decoding: plain", "parameters: {00_start_here: {seed: 010}}", ["010", "line"]),
            ("decoding: plain", "parameters: {00_start_here: {seed: 1:30}}", ["1:30"]),
            ("decoding: plain", "parameters: {03_chat_prompting: {question: no}}", ["no at line"]),
            ("decoding: plain", "parameters: {00_start_her: {seed: 1}}", ["00_start_her"]),
            ("precisions: [fp32, bf16, int8, nf4]", "precisions: []", ["precisions"]),
        ]
    ],
)  # fmt: skip
def test_no_word_of_a_profile_becomes_another_value(tmp_path, monkeypatch, old, new, words):
    """YAML 1.1 reads 010 as 8, 1:30 as 90 and yes as true; pydantic takes true for 1 and a text for a number."""
    text = (ROOT / "env" / "profiles" / "laptop.yaml").read_text(encoding="utf-8")
    same(old in text, True)
    (tmp_path / "odd.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr("helpers.models.profiles.FOLDER", tmp_path)
    refused(lambda: load_profile("odd"), "odd.yaml", *words)


def test_f2_a_quoted_word_of_a_profile_is_a_text(tmp_path, monkeypatch):
    text = (ROOT / "env" / "profiles" / "laptop.yaml").read_text(encoding="utf-8")
    given = 'parameters: {03_chat_prompting: {question: "010"}}\ndecoding: plain'
    (tmp_path / "odd.yaml").write_text(text.replace("decoding: plain", given, 1), encoding="utf-8")
    monkeypatch.setattr("helpers.models.profiles.FOLDER", tmp_path)
    same(load_profile("odd").parameters, {"03_chat_prompting": {"question": "010"}})
