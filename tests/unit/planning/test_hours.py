"""Hours against arithmetic by hand, budgets against hours, and what notebooks may declare."""

import math
from dataclasses import replace

import nbformat
import pytest
from typer.testing import CliRunner

from helpers import models
from helpers.base.files import ROOT
from helpers.cli import app
from helpers.machine import count_parameters, published_config
from helpers.planning import hours, planner
from helpers.planning.hours import Work
from helpers.planning.plan import CARDS
from helpers.runs import UsageError, execution, rendering
from helpers.runs.work import declared_work

GPU_PROFILES = [name for name in models.available() if models.load_profile(name).requires.gpus]
BOX = models.load_profile("8x80gb")
FALCON, CHAT, LLAMA = BOX.falcon, BOX.falcon_chat, BOX.llama_chat
FALCON_FILES, LLAMA_FILES = 359_045_130_240, 137_953_296_384
A100 = next(card for card in CARDS if card.name == "A100 80GB")
BF16 = 2 * 178_557_088_768


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The notebooks, made from their sources."""
    folder = tmp_path_factory.mktemp("notebooks")
    for source in sorted((ROOT / "notebooks" / "source").glob("*.py")):
        nbformat.write(rendering._source_notebook(source), folder / f"{source.stem}.ipynb")
    return folder


def estimated(name, notebooks):
    profile = models.load_profile(name)
    return planner._hours(profile, declared_work(profile, notebooks))


def of(*works, profile=BOX, other=0.0):
    (answer,) = hours._estimate(profile, {"a": works}, {"a": other})
    return answer


def seconds(answer, card="A100 80GB", disk=1e9):
    return next(time.seconds for time in answer.times if (time.card, time.disk) == (card, disk))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_load_takes_its_bytes_over_the_disks_speed():
    answer = of(Work(FALCON, "bf16", "load", 1), other=15)
    assert (answer.loads, answer.read_bytes, answer.written_bytes) == (1, FALCON_FILES, 0)
    assert seconds(answer) == pytest.approx(15 + 30 + 359.045, abs=0.001)
    assert seconds(answer, disk=3e9) == pytest.approx(15 + 30 + 119.682, abs=0.001)
    assert {time.card for time in answer.times} == {"A100 80GB", "H100 80GB"}


def test_a_token_takes_the_weights_over_half_the_bandwidth_and_a_millisecond_a_layer():
    answer = of(Work(FALCON, "bf16", "reply", 1, tokens=101, prompt=1))
    token = BF16 / (0.5 * 2039e9) + 80 * 0.001
    assert seconds(answer) == pytest.approx(101 * token, rel=0.001)
    assert 2 < 1 / token < 10  # the band that the issue of the eight-GPU box gives for device_map


def test_reading_many_tokens_takes_two_operations_per_parameter_and_token():
    answer = of(Work(FALCON, "bf16", "read", 40, tokens=1000, together=4))
    one = 2 * 178_557_088_768 * 4000 / (0.4 * 312e12) + 0.08
    assert seconds(answer) == pytest.approx(10 * one, rel=1e-6)


def test_a_training_step_is_three_passes():
    train = of(Work(CHAT, "nf4", "train", 10, tokens=500, together=8))
    read = of(Work(CHAT, "nf4", "read", 80, tokens=500, together=8))
    assert seconds(train) == pytest.approx(3 * seconds(read))


def test_int8_takes_five_times_as_long_as_bf16_and_fp32_computes_slower():
    def passes(precision, tokens):
        return seconds(of(Work(LLAMA, precision, "read", 1, tokens=tokens))) - 80 * 0.001

    assert passes("int8", 1) == pytest.approx(5 * passes("bf16", 1))
    assert passes("fp32", 4000) == pytest.approx(16 * passes("bf16", 4000))


def test_a_batch_in_nf4_moves_the_weights_in_16_bits_too():
    def token(together):
        work = Work(FALCON, "nf4", "reply", together, tokens=1001, prompt=1, together=together)
        return seconds(of(work)) / 1001 - 0.08

    nf4 = 101_836_000_000  # 94.84 GiB, counted on bitsandbytes' own modules
    assert token(1) * 0.5 * 2039e9 == pytest.approx(nf4, rel=0.001)
    assert token(16) * 0.5 * 2039e9 == pytest.approx(nf4 + 2 * BF16, rel=0.001)


def test_what_does_not_fit_takes_no_time():
    answer = of(Work(FALCON, "fp32", "load", 1), Work(FALCON, "fp32", "reply", 9, tokens=50))
    assert (answer.loads, seconds(answer)) == (0, 0)
    assert of(Work(LLAMA, "fp32", "load", 1)).loads == 1


def test_a_copy_is_written_by_the_first_load_and_read_by_all_later_ones():
    first, second = hours._estimate(
        BOX, {"02": [Work(CHAT, "nf4", "load", 1)], "05": [Work(CHAT, "nf4", "load", 2)]}, {}
    )
    assert (first.read_bytes, second.unsaved_bytes) == (FALCON_FILES, 2 * FALCON_FILES)
    assert (second.read_bytes, second.written_bytes) == (2 * first.written_bytes, 0)
    assert (first.later_bytes, second.later_bytes) == (first.written_bytes, second.read_bytes)
    assert 0.28 < first.written_bytes / FALCON_FILES < 0.29
    kept_by_nobody = replace(CHAT, keep=())
    assert of(Work(kept_by_nobody, "nf4", "load", 3)).read_bytes == 3 * FALCON_FILES


def test_every_card_has_a_peak_and_every_gpu_profile_a_card():
    assert all(5e12 < card.flops < 2e15 for card in CARDS)
    for name in GPU_PROFILES:
        assert of(Work(FALCON, "nf4", "load", 0), profile=models.load_profile(name)).times, name


def test_parameters_are_those_of_the_models():
    assert count_parameters(published_config("tiiuae/falcon-180B")) * 2 == BF16


# --- the notebooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_budgets_are_three_times_the_slowest_estimate(name, notebooks):
    budgets = models.load_profile(name).budgets
    for answer in estimated(name, notebooks):
        slowest = max(time.seconds for time in answer.times)
        wanted = max(600, 60 * math.ceil(3 * slowest / 60))
        budget = budgets[answer.notebook]
        assert (budget.seconds, budget.cell_seconds) == (wanted, wanted), (
            f"env/profiles/{name}.yaml: {answer.notebook} is estimated at {slowest:.0f} s: its budget is {wanted}"
        )


def test_the_eight_gpu_box_reads_four_terabytes_in_some_hours(notebooks):
    """Loads by hand: 02 has falcon in bf16, int8 and nf4, and Llama in all four; the others load each model once."""
    answers = {answer.notebook[:2]: answer for answer in estimated("8x80gb", notebooks)}
    by_hand = {"00": (0, 0), "01": (1, 0), "02": (3, 4), "03": (2, 0), "04": (1, 1), "05": (1, 0)}
    assert {name: answer.loads for name, answer in answers.items()} == {k: sum(v) for k, v in by_hand.items()}
    for name, (falcons, llamas) in by_hand.items():
        assert answers[name].unsaved_bytes == falcons * FALCON_FILES + llamas * LLAMA_FILES
    total = sum(seconds(answer, disk=3e9) for answer in answers.values())
    budget = sum(budget.seconds for budget in BOX.budgets.values())
    assert 1 < total / 3600 < 4
    assert sum(seconds(answer) for answer in answers.values()) * 3 <= budget < 12 * 3600


def test_the_180b_loads_of_02_and_05_read_a_third_less_from_saved_copies(notebooks):
    """Four loads, in bf16, int8 and twice nf4: 1,436 GB without copies, 922 GB of them with both nf4 copies."""
    works = declared_work(BOX, notebooks)
    chosen = {}
    for name in ("02_quantization", "05_fine_tuning"):
        chosen[name] = [work for work in works[name] if work.kind == "load" and work.ref.family == "falcon"]
    second, fifth = hours._estimate(BOX, chosen, {})
    assert second.loads + fifth.loads == 4
    assert second.unsaved_bytes + fifth.unsaved_bytes == 4 * FALCON_FILES
    assert (second.later_bytes + fifth.later_bytes) / 1e9 == pytest.approx(922, abs=1)


def test_the_plan_shows_hours_by_notebook_and_in_total(notebooks, monkeypatch):
    monkeypatch.setattr(execution, "NOTEBOOKS", notebooks)
    screen = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", "--profile", "8x80gb"]).stdout
    part = screen[screen.index("Hours of the notebooks") :]
    for text in (
        "A100 80GB,",
        "H100 80GB,",
        "1 GB/s",
        "3 GB/s",
        "budget",
        "02_quantization",
        "never measured",
        "TB read",
    ):
        assert text in part, text
    total = next(line for line in part.splitlines() if line.startswith("all "))
    numbers = [float(cell) for cell in total.split()[1:]]
    assert numbers[2:6] == sorted(numbers[2:6], reverse=True)[:1] + numbers[3:6]  # the slow disk on A100 is the slowest
    assert 3 * numbers[2] <= numbers[-1]
    assert "Hours of the notebooks" not in CliRunner().invoke(app, ["plan"]).stdout


# --- what may be declared ---------------------------------------------------------------------------------------------


def declared(tmp_path, work, parameters="steps = 7"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    metadata = {"workbook": {"models": {"falcon": ["profile"], "llama_chat": ["precisions"]}, "work": work}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "01_loading.ipynb")
    return declared_work(BOX, tmp_path)["01_loading"]


def test_numbers_come_from_parameters_and_products(tmp_path):
    work = {"falcon": [{"train": "steps", "tokens": [2, "steps"], "together": 4}]}
    assert declared(tmp_path, work) == [Work(FALCON, "bf16", "train", 7, tokens=14, together=4)]


def test_an_entry_is_done_in_each_declared_precision_or_in_its_own(tmp_path):
    precisions = [work.precision for work in declared(tmp_path, {"llama_chat": [{"load": 1}]})]
    assert precisions == ["fp32", "bf16", "int8", "nf4"]
    own = declared(tmp_path, {"falcon": [{"load": 1, "precisions": ["profile", "bf16", "nf4"]}]})
    assert [work.precision for work in own] == ["bf16", "nf4"]


def test_a_model_that_is_alone_in_memory_is_loaded_for_each_use(tmp_path, notebooks):
    work = {"falcon": [{"load": 1, "in_turn": 8}], "llama_chat": [{"load": 1, "in_turn": 6, "precisions": ["nf4"]}]}
    assert [work.count for work in declared(tmp_path, work)] == [8, 1]  # falcon has the box to itself
    apart = models.load_profile("2x80gb")
    assert sum(work.count for work in declared_work(apart, notebooks)["04_falcon_vs_llama"] if work.kind == "load") > 10


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ([], "must name roles"),
        ({"falcon": {"load": 1}}, "each with a list"),
        ({"falcon_chat": [{"load": 1}]}, "no such model"),
        ({"falcon": [{"tokens": 3}]}, "Give one of load, reply, read, train"),
        ({"falcon": [{"load": 1, "read": 1}]}, "Give one of"),
        ({"falcon": [{"load": 1, "size": 1}]}, "Give one of"),
        ({"falcon": ["load"]}, r"Write \{load: 1\}"),
        ({"falcon": [{"load": "times"}]}, "neither a whole number nor a parameter"),
        ({"falcon": [{"load": -1}]}, "neither a whole number"),
        ({"falcon": [{"load": 1.5}]}, "neither a whole number"),
        ({"falcon": [{"load": True}]}, "neither a whole number"),
        ({"falcon": [{"load": []}]}, "neither a whole number"),
        ({"falcon": [{"load": 1, "precisions": ["int3"]}]}, "unknown precision"),
    ],
)
def test_a_wrong_declaration_is_named(work, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        declared(tmp_path, work)
