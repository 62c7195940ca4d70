"""Recording: what is kept, what is refused, and how verdicts and expected values come about."""

import json
import multiprocessing
import os
import re

import numpy as np
import pytest

from helpers import base
from helpers.base import files
from helpers.runs import expected_from_runs, judge, recording, store
from helpers.runs.expected import _is_timing
from helpers.runs.schema import _ExpectedValue


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder as the runner names it to a notebook, with three expected values."""
    expected = tmp_path / "laptop.json"
    expected.write_text(
        json.dumps(
            {
                "01_x/loss": {"value": 2.0, "tolerance": 0.1, "source": "run a"},
                "01_x/layers": {"value": 80, "tolerance": 0, "source": "citation"},
                "01_x/reply": {"value": "a saddle", "tolerance": 0, "source": "run a"},
            }
        )
    )
    folder = tmp_path / "run"
    values = {"RUN_DIR": folder, "NOTEBOOK": "01_x", "PROFILE": "laptop", "EXPECTED": expected, "UNATTENDED": "1"}
    for name, value in values.items():
        monkeypatch.setenv(f"WORKBOOK_{name}", str(value))
    monkeypatch.setattr(recording, "_session", {})
    return folder


def stored(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("loss", 2.05, "as expected"),
        ("loss", 1.9, "as expected"),
        ("loss", 2.11, "differs"),
        ("layers", 80, "as expected"),
        ("layers", 81, "differs"),
        ("layers", "80", "differs"),
        ("layers", True, "differs"),
        ("reply", "a saddle", "as expected"),
        ("reply", "a horse", "differs"),
        ("other", 1, "unmeasured"),
    ],
)
def test_verdicts(run, name, value, verdict):
    assert recording.record(name, value).verdict == verdict
    assert stored(run)["values"]["01_x"][name]["verdict"] == verdict


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array(3), 3),
        (np.array([2.5]), 2.5),
        ("text", "text"),
        (178_557_088_768, 178_557_088_768),
    ],
)
def test_scalars_are_stored_as_plain_json(run, value, plain):
    recording.record("x", value, "GiB", claim="A1")
    entry = stored(run)["values"]["01_x"]["x"]
    assert entry["value"] == plain
    assert type(entry["value"]) is type(plain)
    assert (entry["unit"], entry["claim"], entry["expected"]) == ("GiB", "A1", None)


def test_torch_scalar_is_accepted(run):
    torch = pytest.importorskip("torch")
    assert recording.record("x", torch.tensor(1.5)).value == 1.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), [1, 2], np.ones(2), None, {"a": 1}])
def test_other_values_are_refused_by_name(run, value):
    with pytest.raises(store.ResultError, match="perplexity"):
        recording.record("perplexity", value)
    assert not (run / "results.json").exists()


@pytest.mark.parametrize(("agrees", "kept"), [(True, True), (np.bool_(False), False), (None, None)])
def test_a_judgement_and_its_model_are_kept(run, agrees, kept):
    recording.record("ratio", 2.6, claim="A22", agrees=agrees, model="falcon-mini (stand-in for x)")
    entry = stored(run)["values"]["01_x"]["ratio"]
    assert entry["agrees"] is kept
    assert entry["model"] == "falcon-mini (stand-in for x)"
    assert list(recording.recorded().index) == ["ratio"]


def test_a_judgement_without_a_claim_is_refused(run):
    with pytest.raises(store.ResultError, match=r"ratio.*claim"):
        recording.record("ratio", 2.6, agrees=True)


def test_empty_name_is_refused(run):
    with pytest.raises(store.ResultError):
        recording.record("  ", 1)


def test_a_section_is_recorded_with_one_call(run):
    shown = recording.record_all(
        {
            "loss": base.Measured(np.float32(2.5), "nats", agrees=np.bool_(True)),
            "layers": 80,
            "reply": "a saddle",
            "share": base.Measured(0.5, "of all", "A2", tolerance=0.2, model="falcon-180B"),
            "same": base.Measured(True),
        },
        claim="A22", model="falcon-mini", tolerance=0.01, unit="x",
    )  # fmt: skip
    entries = stored(run)["values"]["01_x"]
    kept = {
        name: (e["value"], e["unit"], e["claim"], e["floor"], e["agrees"], e["model"]) for name, e in entries.items()
    }
    assert kept == {
        "loss": (2.5, "nats", "A22", 0.01, True, "falcon-mini"),
        "layers": (80, "x", "A22", 0.01, None, "falcon-mini"),
        "reply": ("a saddle", "x", "A22", None, None, "falcon-mini"),
        "share": (0.5, "of all", "A2", 0.2, None, "falcon-180B"),
        "same": (True, "x", "A22", None, None, "falcon-mini"),
    }
    assert [(entry.name, entry.verdict) for entry in shown] == [
        ("loss", "differs"), ("layers", "as expected"), ("reply", "as expected"), ("share", "unmeasured"),
        ("same", "unmeasured"),
    ]  # fmt: skip
    assert str(shown[1]) in repr(shown).splitlines()
    assert shown._repr_html_() == "".join(entry._repr_html_() for entry in shown)


def test_one_call_keeps_what_single_calls_keep(run):
    recording.record("a", 1.5, "GiB", "A1", tolerance=0.5, agrees=True, model="m")
    recording.record("b", "text", model="m")
    single = stored(run)["values"]["01_x"]
    recording._forget(run, "01_x")
    measured = base.Measured(1.5, "GiB", "A1", tolerance=0.5, agrees=True)
    recording.record_all({"a": measured, "b": "text"}, model="m")
    assert stored(run)["values"]["01_x"] == single


@pytest.mark.parametrize(
    "wrong",
    [
        {"bad": [1, 2]},
        {"bad": float("nan")},
        {"bad": base.Measured(1, agrees=True)},
        {"bad": base.Measured(1, tolerance=-1)},
        {"bad": base.Measured("text", tolerance=1)},
    ],
)
def test_of_a_section_with_a_wrong_value_nothing_is_kept(run, wrong):
    with pytest.raises(store.ResultError, match="bad"):
        recording.record_all({"good": 1, **wrong})
    assert not (run / "results.json").exists()


def test_an_empty_section_records_nothing(run):
    assert recording.record_all({}) == ()
    assert list(recording.recorded().index) == []


def test_a_repeated_name_replaces_and_order_is_kept(run):
    recording.record("a", 1)
    recording.record("b", 2)
    recording.record("a", 3)
    assert [(name, entry["value"]) for name, entry in stored(run)["values"]["01_x"].items()] == [("a", 3), ("b", 2)]


def test_notebooks_do_not_share_names(run, monkeypatch):
    recording.record("a", 1)
    monkeypatch.setenv("WORKBOOK_NOTEBOOK", "02_y")
    recording.record("a", 2)
    assert {name: entries["a"]["value"] for name, entries in stored(run)["values"].items()} == {"01_x": 1, "02_y": 2}
    recording._forget(run, "02_y")
    assert list(stored(run)["values"]) == ["01_x"]


def _record_many(start):
    for number in range(start, start + 20):
        recording.record(f"v{number}", number)


def test_processes_that_record_at_once_lose_nothing(run):
    workers = [multiprocessing.get_context("fork").Process(target=_record_many, args=(n,)) for n in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(entry["value"] for entry in stored(run)["values"]["01_x"].values()) == list(range(40))


def test_recap_table(run):
    recording.record("loss", 2.5)
    recording.record("layers", 80, claim="A8")
    recording.record("speed", 12.3456789, "tokens/s")
    table = recording.recorded()
    assert list(table.index) == ["loss", "layers", "speed"]
    assert list(table["earlier runs"]) == ["differs from earlier runs", "as expected", "no earlier run"]
    assert list(table["value"]) == ["2.5", "80", "12.3457 tokens/s"]
    assert list(table["expected"]) == ["2 ± 0.1", "80", "–"]
    assert list(table["claim"]) == ["", "A8", ""]


def test_without_a_run_values_stay_in_memory(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WORKBOOK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(recording, "_session", {})
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/somebody/notebooks/77_mine.ipynb")
    monkeypatch.chdir(tmp_path)
    entry = recording.record("a", 1.5, "GiB")
    assert entry.verdict == "unmeasured"
    assert list(recording.recorded().index) == ["a"]
    assert list(tmp_path.iterdir()) == []
    assert not base.unattended()


def test_unattended_in_a_run(run):
    assert base.unattended()


def test_record_shows_itself_escaped(run):
    html = recording.record("loss", 2.5, claim="<A1>")._repr_html_()
    assert "differs" in html
    assert "2 ± 0.1" in html
    assert "&lt;A1&gt;" in html
    assert "<A1>" not in html
    assert str(recording.record("n", 1_000_000)) == "n: 1,000,000 | no earlier run"


def test_figure_is_saved_listed_and_returned(run):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    assert recording.record_figure("loss / step", figure) is figure
    path = stored(run)["figures"]["01_x"]["loss / step"]
    assert re.fullmatch(r"figures/01_x_loss-step~[0-9a-f]{10}\.png", path)
    assert (run / path).read_bytes().startswith(b"\x89PNG")
    recording._forget(run, "01_x")
    assert not (run / path).exists()


@pytest.mark.parametrize(
    "names",
    [
        ("loss a", "loss-a", "loss_a", "loss/a", "loss:a", "Loss a", "LOSS_A", "loss\na"),
        ("ä", "ö", "a\u0308", "-", "", " ", "日本", "中国"),
        ("x" * 300, "x" * 299 + "y"),
        ("\ud800", "\ud801"),
    ],
)
def test_every_figure_has_a_file_of_its_own(run, names):
    """B6: the second figure took the first one's file."""
    from matplotlib.figure import Figure

    for number, name in enumerate(names):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([number, 1])
        recording.record_figure(name, figure)
    paths = list((run / "figures").iterdir())
    # "Loss a" and "loss a" are one file where the file system ignores case
    assert len({path.name.casefold() for path in paths}) == len(names)
    assert all(path.name.isascii() and len(path.name) < 128 for path in paths)


def test_an_ordinary_name_keeps_a_plain_file_name(run):
    from matplotlib.figure import Figure

    recording.record_figure("cache_growth", Figure(figsize=(1, 1)))
    assert stored(run)["figures"]["01_x"]["cache_growth"] == "figures/01_x_cache-growth.png"


def test_damaged_results_are_named(run):
    run.mkdir()
    (run / "results.json").write_text("{")
    with pytest.raises(store.ResultError, match=r"results\.json"):
        recording.record("a", 1)


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def finished_run(folder, values, profile="laptop", status="passed"):
    """A run folder with one notebook, as files without a version number describe it."""
    folder.mkdir()
    entries = {name: {"value": value, "unit": unit, "claim": None} for name, (value, unit) in values.items()}
    manifest = {
        "profile": profile, "description": "", "command": [], "started": "2026-01-31T12:00:00Z", "finished": None,
        "parameters": {}, "seeds": {}, "notebooks": {}, "models": {}, "git": {"commit": None, "dirty": None},
        "python": "3.11.7", "packages": {}, "hardware": {"error": "not looked at"},
    }  # fmt: skip
    notebook = {"status": status, "budget_seconds": 60, "inputs": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "notebooks": {"01_x": notebook}}))
    (folder / "results.json").write_text(json.dumps({"values": {"01_x": entries}, "figures": {}}))
    return folder


def test_expected_values_from_runs(tmp_path):
    observed = [
        {"loss": (2.0, ""), "layers": (80, ""), "speed": (9.0, "tokens/s"), "time": (1.0, "s"), "reply": ("a", "")},
        {"loss": (2.2, ""), "layers": (80, ""), "speed": (5.0, "tokens/s"), "time": (2.0, "s"), "reply": ("b", "")},
        {"loss": (2.3, ""), "layers": (80, ""), "speed": (7.0, "tokens/s"), "time": (2.0, "s"), "reply": ("a", "")},
    ]
    runs = [finished_run(tmp_path / f"r{index}", values) for index, values in enumerate(observed)]
    found = expected_from_runs(runs)
    assert set(found) == {"01_x/loss", "01_x/layers"}
    assert found["01_x/layers"] == _ExpectedValue(value=80, tolerance=0, source="run r0, r1, r2")
    assert found["01_x/loss"].value == 2.2
    assert found["01_x/loss"].tolerance == pytest.approx(0.6)


def test_one_run_gives_floats_one_percent(tmp_path):
    found = expected_from_runs([finished_run(tmp_path / "r", {"loss": (-5.0, ""), "same": (True, "")})])
    assert found["01_x/loss"].tolerance == pytest.approx(0.05)
    assert found["01_x/same"] == _ExpectedValue(value=True, tolerance=0, source="run r")


@pytest.mark.parametrize(
    ("values", "tolerance"), [((0.0002, 0.0003), 0.002), ((0.1, 0.2), 0.2), ((5.0, 5.0), 0.05), ((3, 3), 0.002)]
)
def test_a_recorded_tolerance_is_a_floor(run, monkeypatch, values, tolerance):
    folders = [run.parent / f"r{index}" for index in range(len(values))]
    for folder, value in zip(folders, values, strict=True):
        finished_run(folder, {})
        monkeypatch.setenv("WORKBOOK_RUN_DIR", str(folder))
        recording.record("change", value, tolerance=0.002)
        assert stored(folder)["values"]["01_x"]["change"]["floor"] == 0.002
        assert list(recording.recorded().index) == ["change"]
    assert expected_from_runs(folders)["01_x/change"].tolerance == pytest.approx(tolerance)


@pytest.mark.parametrize(("value", "tolerance"), [(1.0, -0.1), (1.0, float("nan")), ("text", 0.1), (True, 0.1)])
def test_a_tolerance_that_is_no_distance_is_refused(run, value, tolerance):
    with pytest.raises(store.ResultError, match="change"):
        recording.record("change", value, tolerance=tolerance)


@pytest.mark.parametrize(
    ("unit", "timing"),
    [("s", True), ("ms", True), ("tokens/s", True), ("GB/s", True), ("ratio of tokens/s", True),
     ("", False), ("bytes/token", False), ("nats/token", False), ("GPUs", False), ("days", False)],
)  # fmt: skip
def test_units_of_times_and_speeds(unit, timing):
    assert _is_timing(unit) is timing


def test_failed_notebooks_and_mixed_profiles_give_no_expected_values(tmp_path):
    failed = finished_run(tmp_path / "failed", {"loss": (2.0, "")}, status="failed")
    with pytest.raises(store.ResultError, match="no reproducible value"):
        expected_from_runs([failed])
    with pytest.raises(store.ResultError, match="one profile"):
        expected_from_runs([failed, finished_run(tmp_path / "other", {}, profile="8x80gb")])


def test_a_run_is_judged_by_what_its_own_notebooks_should_give(tmp_path):
    run = finished_run(tmp_path / "r", {"loss": (2.05, "nats"), "layers": (81, ""), "reply": ("a", ""), "new": (1, "")})
    expected = {
        "01_x/loss": _ExpectedValue(value=2.0, tolerance=0.1, source="run a"),
        "01_x/layers": _ExpectedValue(value=80, tolerance=0, source="citation: b"),
        "01_x/reply": _ExpectedValue(value="a", tolerance=0, source="run a"),
        "01_x/gone": _ExpectedValue(value=True, tolerance=0, source="run a"),
        "02_y/other": _ExpectedValue(value=1, tolerance=0, source="run a"),  # a notebook that this run left out
    }
    judged = judge(run, expected)
    assert (judged.within, judged.unmeasured) == (2, 1)
    assert judged.differing == ("differs: 01_x/layers is 81, expected 80 (citation: b)",)
    assert judged.missing == ("missing: 01_x/gone, expected yes",)
    assert str(judged).startswith("2 as expected, 1 differ, 1 missing, 1 unmeasured")


def test_a_rehearsal_is_neither_judged_nor_a_source_of_expected_values(tmp_path):
    run = finished_run(tmp_path / "r", {"loss": (2.0, "")})
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"rehearsal": {}}))
    for use in (lambda: judge(run, {}), lambda: expected_from_runs([run])):
        with pytest.raises(store.ResultError, match="is a rehearsal"):
            use()
