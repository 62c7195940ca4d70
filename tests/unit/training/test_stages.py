"""The stored longer fine-tune of notebook 05: what a run recorded, shown only beside the model that it is of."""

import json
import sys
from dataclasses import replace

import pytest

from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.models import load_profile
from helpers.training import stored_stage

sys.path.insert(0, str(ROOT / "notebooks" / "data"))
import store_repair

LAPTOP = load_profile("laptop")


@pytest.fixture
def run(tmp_path):
    """The files of a run of notebook 05, as far as they are read."""
    name = store_repair.NOTEBOOK
    values = {"all_by_reply_true": 0.91, "settled_step": 50, "lora_parameters_by_hand": True}
    results = {key: {"value": value, "model": LAPTOP.llama_chat.label} for key, value in values.items()}
    manifest = {
        "command": ["workbook", "run", "--only", "05", "-p", "steps=150"],
        "started": "2026-11-28T03:00:00Z",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "hardware": {"cpu_count": 2, "cpu_name": "AMD EPYC"},
        "models": {role: {"id": ref.id, "label": ref.label} for role, ref in LAPTOP.models.items()},
        "notebooks": {name: {"parameters": {"steps": 150, "batch_size": 8, "learning_rate": 0.002}}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "results.json").write_text(json.dumps({"values": {name: results}}))
    return tmp_path


def stored(run, monkeypatch, **changes):
    """The file that ``store_repair.py`` writes from the run, with some entries changed."""
    monkeypatch.setattr(store_repair, "HERE", run)
    monkeypatch.setattr(sys, "argv", ["store_repair.py", str(run)])
    store_repair.main()
    path = run / "repair_stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_stage_says_what_made_it(run, monkeypatch):
    stage = stored_stage(stored(run, monkeypatch), LAPTOP.llama_chat)
    assert stage.title == "stored: 150 steps of 8, rate 0.002"
    assert stage.origin == (
        "workbook run --only 05 -p steps=150 (on 2026-11-28, commit 0123456789ab with uncommitted changes, "
        "2 CPUs (AMD EPYC))"
    )
    assert stage.values["all_by_reply_true"] == 0.91


@pytest.mark.parametrize(
    ("steps", "settled", "said"),
    [
        (60, 50, "made 95% of its fall in the first 50 of 150 steps; the 60 steps of this run reach that point."),
        (40, 50, "the 40 steps of this run stop before that point."),
        (60, "none: it never fell", "In 150 steps its held-out loss did not fall."),
    ],
)
def test_its_lesson_depends_on_the_steps_of_this_run(run, monkeypatch, steps, settled, said):
    path = stored(run, monkeypatch, values={"settled_step": settled})
    assert stored_stage(path, LAPTOP.llama_chat).lesson(steps).endswith(said)


def test_it_is_not_shown_beside_another_model(run, monkeypatch):
    path = stored(run, monkeypatch)
    assert stored_stage(path, LAPTOP.falcon_chat) is None
    assert stored_stage(path, replace(LAPTOP.llama_chat, id="org/other")) is None
    assert stored_stage(path.with_name("missing.json"), LAPTOP.llama_chat) is None


@pytest.mark.parametrize("text", ["{}", "[1]", '{"model": "x", "more": 1}', "{"])
def test_a_damaged_file_says_how_to_write_it_again(tmp_path, text):
    path = tmp_path / "repair_stage.json"
    path.write_text(text)
    with pytest.raises(WorkbookError, match=r"repair_stage\.json"):
        stored_stage(path, LAPTOP.llama_chat)


def test_the_committed_stage_is_of_the_model_that_the_laptop_repairs():
    path = ROOT / "notebooks" / "data" / "repair_stage.json"
    if not path.is_file():
        pytest.skip("No stage is stored yet.")
    stage = stored_stage(path, LAPTOP.repaired)
    assert stage.steps == 150
    assert "steps=150" in stage.command
