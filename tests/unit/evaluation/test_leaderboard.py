"""The leaderboard of 2023: the whole command over local data of the four tasks, and the harness' own task files."""

import json
import math
import re
from pathlib import Path
from statistics import fmean

import lm_eval
import numpy as np
import pytest
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from typer.testing import CliRunner

from helpers import evaluation
from helpers.base import WorkbookError
from helpers.cli import app
from helpers.evaluation import harness, tasks
from helpers.models import load, load_profile

OWN = Path(lm_eval.__file__).parent / "tasks"  # the harness' task files
MMLU = {"stem": ("anatomy", "astronomy"), "humanities": ("philosophy",)}
THINGS = ("cat", "dog", "tree", "ball", "book", "cup")


def arc_row(number: int) -> dict:
    texts = [f"a {THINGS[(number + k) % 6]}" for k in range(4)]
    choices = {"text": texts, "label": ["A", "B", "C", "D"]}
    return {"question": f"What did Tim find on day {number}?", "choices": choices, "answerKey": "ABCD"[number % 4]}


def hellaswag_row(number: int) -> dict:
    endings = [f"sees a {THINGS[(number + k) % 6]} and smiles." for k in range(4)]
    shown = {"activity_label": "Playing", "ctx_a": f"Lily runs {number} times.", "ctx_b": "she"}
    return {**shown, "endings": endings, "label": str(number % 4)}


def mmlu_row(number: int) -> dict:
    return {
        "question": f"What is {number} and one?",
        "choices": [str(number + k) for k in range(4)],
        "answer": number % 4,
    }


def truthful_row(number: int) -> dict:
    choices = [f"It is a {thing}." for thing in THINGS[number % 3 : number % 3 + 3]]
    targets = {"choices": choices, "labels": [1, 1, 0]}
    return {"question": f"What is thing {number}?", "mc1_targets": targets, "mc2_targets": targets}


def write_task(folder: Path, own: str, name: str, splits: dict[str, list[dict]], **more) -> None:
    """A task file that is the harness' own but for its data."""
    files = {}
    for split, rows in splits.items():
        files[split] = f"{name}_{split}.jsonl"
        (folder / files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (folder / f"{name}.yaml").write_text(json.dumps({"include": str(OWN / own), "task": name, **local, **more}))


def write_group(folder: Path, name: str, members: list[str]) -> None:
    (folder / f"{name}.yaml").write_text(json.dumps({"group": name, "task": members}))


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    arc = {
        "train": list(map(arc_row, range(100, 130))),
        "validation": [arc_row(99)],
        "test": list(map(arc_row, range(5))),
    }
    write_task(folder, "arc/arc_challenge.yaml", "arc_challenge", arc)
    swag = {"train": list(map(hellaswag_row, range(50, 64))), "validation": list(map(hellaswag_row, range(4)))}
    write_task(folder, "hellaswag/hellaswag.yaml", "hellaswag", swag)
    write_task(
        folder, "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc2", {"validation": list(map(truthful_row, range(3)))}
    )
    for place, (part, subjects) in enumerate(MMLU.items()):
        for shift, subject in enumerate(subjects):
            rows = list(map(mmlu_row, range(2 + place + 2 * shift)))
            own = f"mmlu/default/mmlu_{subject}.yaml"
            splits = {"dev": list(map(mmlu_row, range(20, 25))), "test": rows}
            write_task(folder, own, f"mmlu_{subject}", splits, tag=f"mmlu_{part}_tasks")
        write_group(folder, f"mmlu_{part}", [f"mmlu_{part}_tasks"])
    write_group(folder, "mmlu", [f"mmlu_{part}" for part in MMLU])
    return folder


def by_hand(found: harness._Evaluation) -> tuple[dict[str, tuple[float, float]], float, float]:
    """(mean and standard error of each task, their average, its standard error) in percent, from the single items."""

    def of_items(task: str, metric: str) -> tuple[float, float]:
        values = np.array(found.items[task].values[metric])
        return 100 * values.mean(), 100 * values.std(ddof=1) / math.sqrt(len(values))

    subjects = [of_items(f"mmlu_{name}", "acc") for names in MMLU.values() for name in names]
    mmlu = fmean(value for value, _ in subjects), math.hypot(*(error for _, error in subjects)) / len(subjects)
    scores = {
        "arc_challenge": of_items("arc_challenge", "acc_norm"),
        "hellaswag": of_items("hellaswag", "acc_norm"),
        "mmlu": mmlu,
        "truthfulqa_mc2": of_items("truthfulqa_mc2", "acc"),
    }
    average = fmean(value for value, _ in scores.values())
    return scores, average, math.hypot(*(error for _, error in scores.values())) / 4


@pytest.mark.slow
def test_the_command_measures_the_average_of_local_tasks(local_tasks, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["leaderboard", "--tasks", str(local_tasks), "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    loaded = load(load_profile("laptop").falcon, "fp32")
    found = evaluation.evaluate(loaded, ["leaderboard_2023"], folder=local_tasks, truncate=True)
    scores, average, error = by_hand(found)
    shots = {"arc_challenge": "25", "hellaswag": "10", "mmlu": "5", "truthfulqa_mc2": "0"}
    counts = {"arc_challenge": "5", "hellaswag": "4", "mmlu": "9", "truthfulqa_mc2": "3"}
    for task, (value, spread) in scores.items():
        metric = "acc_norm" if task in ("arc_challenge", "hellaswag") else "acc"
        assert rows[task].split() == [shots[task], metric, f"{value:.2f}", f"{spread:.2f}", counts[task]]
    assert rows["average"].split() == [f"{average:.2f}", f"{error:.2f}"]
    assert 0 < average < 100
    assert rows["Falcon-180B, published"].split() == ["68.74"]
    assert rows["Llama 2, published"].split() == ["67.35"]
    assert "falcon-mini (stand-in for tiiuae/falcon-180B), fp32" in result.stdout
    assert f"lm-evaluation-harness {lm_eval.__version__}" in result.stdout
    assert found.truncated > 0
    assert f"{found.truncated} requests lost their beginning" in result.stdout
    assert "not the leaderboard's average" not in result.stdout


def test_solved_examples_stand_before_the_items_and_are_drawn_alike(local_tasks, tiny_loaded, monkeypatch):
    asked = []
    own = lm_eval.evaluator.evaluate

    def watched(model, chosen, **options):
        results = own(model, chosen, **options)
        asked.append({name: items[0]["arguments"][0][0] for name, items in results["samples"].items()})
        return results

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", watched)
    found = [
        evaluation.leaderboard_average(lambda: tiny_loaded, limit=2, folder=local_tasks, batch_size=size)
        for size in (1, 4)
    ]
    assert asked[0] == asked[1]
    assert asked[0]["arc_challenge"].count("Question: ") == 26
    assert asked[0]["hellaswag"].count("Playing: ") == 11
    assert asked[0]["mmlu_anatomy"].count("\nAnswer:") == 6
    assert asked[0]["mmlu_anatomy"].startswith(
        "The following are multiple choice questions (with answers) about anatomy."
    )
    assert asked[0]["truthfulqa_mc2"].endswith("Q: What is thing 0?\nA:")
    assert found[0].average == pytest.approx(found[1].average)
    assert any("first 2 items" in note for note in found[0].notes)
    table = found[0].table()
    assert table.loc["average", "score"] == found[0].average
    assert table.loc["published average, Falcon-180B", "score"] == 68.74


def test_a_limit_without_an_error_is_refused(local_tasks):
    with pytest.raises(WorkbookError, match="at least 2"):
        evaluation.leaderboard_average(lambda: None, limit=1, folder=local_tasks)
    assert CliRunner().invoke(app, ["leaderboard", "--model", "gpt"]).exit_code == 2


@pytest.mark.slow
def test_without_the_data_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    result = CliRunner().invoke(app, ["leaderboard", "--profile", "8x80gb"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # not an error with its traceback
    for words in ("allenai/ai2_arc", "unset HF_HUB_OFFLINE", "copy the Hugging Face cache", "--tasks"):
        assert words in result.stderr


@pytest.mark.slow
def test_the_harness_own_tasks_give_the_leaderboard(tiny_loaded, monkeypatch):
    """Every part is the harness' own but the rows of the data sets, which a test cannot download."""
    import datasets

    makers = {
        "allenai/ai2_arc": arc_row, "Rowan/hellaswag": hellaswag_row,
        "cais/mmlu": mmlu_row, "truthfulqa/truthful_qa": truthful_row,
    }  # fmt: skip
    seen = []

    def rows_of(path, name=None, **_):
        seen.append((path, name))
        rows = [datasets.Dataset.from_list(list(map(makers[path], range(30)))) for _ in range(4)]
        return datasets.DatasetDict(dict(zip(("train", "validation", "test", "dev"), rows, strict=True)))

    monkeypatch.setattr(datasets, "load_dataset", rows_of)
    found = evaluation.leaderboard_average(lambda: tiny_loaded, limit=2)
    assert {path: sum(p == path for p, _ in seen) for path in makers} == {
        "allenai/ai2_arc": 1, "Rowan/hellaswag": 1, "cais/mmlu": 57, "truthfulqa/truthful_qa": 1,
    }  # fmt: skip
    assert ("allenai/ai2_arc", "ARC-Challenge") in seen
    assert ("truthfulqa/truthful_qa", "multiple_choice") in seen
    assert [(s.task, s.shots, s.metric, s.count) for s in found.scores] == [
        ("arc_challenge", 25, "acc_norm", 2),
        ("hellaswag", 10, "acc_norm", 2),
        ("mmlu", 5, "acc", 114),
        ("truthfulqa_mc2", 0, "acc", 2),
    ]


@pytest.mark.slow
def test_the_articles_thirteen_tasks_are_the_harness_own():
    members = load_yaml(evaluation.TASKS / "article_tasks.yaml")["task"]
    own = tasks._harness_tasks()
    sets = {name: (own[name].cfg["dataset_path"], own[name].cfg.get("dataset_name")) for name in members}
    assert sets == {
        "hellaswag": ("Rowan/hellaswag", None),
        "lambada_openai": ("EleutherAI/lambada_openai", "default"),
        "webqs": ("stanfordnlp/web_questions", None),
        "winogrande": ("allenai/winogrande", "winogrande_xl"),
        "piqa": ("baber/piqa", None),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
        "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
        "boolq": ("aps/super_glue", "boolq"),
        "cb": ("aps/super_glue", "cb"),
        "copa": ("aps/super_glue", "copa"),
        "sglue_rte": ("aps/super_glue", "rte"),
        "wic": ("aps/super_glue", "wic"),
        "wsc": ("aps/super_glue", "wsc.fixed"),
        "record": ("aps/super_glue", "record"),
    }
    assert own["mmlu"].kind is Kind.GROUP


@pytest.mark.slow
def test_an_unknown_task_is_refused_also_if_the_harness_own_are_looked_through(tiny_loaded):
    with pytest.raises(WorkbookError, match=r"of these: animal_choice.*none has the name 'no_such_task'"):
        evaluation.evaluate(tiny_loaded, ["animal_choice", "no_such_task"])
