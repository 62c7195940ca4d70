"""Plans against sizes computed by hand, published figures, ``machine.place`` and what planning really takes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from helpers import evaluation, machine, models, planning
from helpers.base import GIB, WorkbookError
from helpers.base.files import ROOT
from helpers.cli import app
from helpers.machine import Bandwidth, memory
from helpers.planning import output, planner, request
from helpers.planning.plan import _Here

HERE = _Here("/cache", 10**12, machine.DiskSpeed(2e9, 2**28, "/cache", True))
LAPTOP = replace(HERE, memory_bandwidth=Bandwidth(20e9, 15e9, 9))
LAYER, EMBEDDINGS, NORM = 4_439_789_568, 65024 * 14848 * 2, 2 * 14848 * 2  # bytes of Falcon-180B's in bf16
CACHE = 163_840 // 80  # bytes a token and layer
PROFILES = models.available()
GPU_PROFILES = [name for name in PROFILES if name != "laptop"]


@pytest.fixture(scope="module")
def plans():
    """The plan of every profile, as measured nowhere."""
    return {
        name: planner._plan_profile(models.load_profile(name), LAPTOP if name == "laptop" else HERE)
        for name in PROFILES
    }


def work_of(context_tokens=None, **changes):
    return machine.Workload(context_tokens=context_tokens, **changes)


def plan_180b(gpus, precision="bf16", **work):
    ref = request._published_ref(planning.FALCON_180B)
    return planner._plan_model(ref, request._parse_gpus(gpus), HERE, work_of(**work), precision)


def shown(parts, width):
    console = Console(width=width, color_system=None, highlight=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8x80", [80e9] * 8),
        ("4x80,2x40", [80e9] * 4 + [40e9] * 2),
        (" 1x24GB , 1x141 ", [24e9, 141e9]),
        ("2x22.5", [22.5e9] * 2),
    ],
)
def test_gpus_as_people_write_them(text, sizes):
    assert list(request._parse_gpus(text)) == sizes


@pytest.mark.parametrize("text", ["", "8", "8*80", "0x80", "8x0", "8x80;2x40", "x80", "8x", "-1x80", "8x80,"])
def test_gpus_that_make_no_sense_are_refused_with_an_example(text):
    with pytest.raises(WorkbookError, match="such as 8x80, or 4x80,2x40"):
        request._parse_gpus(text)


def test_thousands_of_gpus_are_refused():
    with pytest.raises(WorkbookError, match=r"9999 GPUs. Give at most 1024"):
        request._parse_gpus("9999x80")


@pytest.mark.parametrize(
    ("model_id", "parameters"),
    [
        ("tiiuae/falcon-180B", 179_522_565_120),  # the head is stored apart
        ("tiiuae/falcon-180B-chat", 179_522_565_120),
        ("tiiuae/falcon-7b-instruct", 7_217_189_760),
        ("tiiuae/falcon-40b-instruct", 41_835_970_560),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
    ],
)
def test_every_published_model_and_its_sisters_can_be_planned(model_id, parameters):
    ref = request._published_ref(model_id)
    assert ref.download_bytes == 2 * parameters
    assert ref.stand_in_for is None
    assert ref.id == model_id
    assert machine.count_parameters(models.config(ref), tied=False) == parameters
    assert planner._plan_model(ref, [80e9] * 8, HERE).title.startswith(f"{model_id} in bf16")


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(WorkbookError, match=r"'tiiuae/falcon-11B'. Choose one of: .*tiiuae/falcon-40b"):
        request._published_ref("tiiuae/falcon-11B")


@pytest.mark.parametrize("work", [{"batch_size": 0}, {"context_tokens": 0}, {"context_tokens": -5}])
def test_work_on_nothing_is_refused(work):
    ref, profile = request._published_ref(planning.FALCON_180B), models.load_profile("8x80gb")
    for refused in (
        lambda: planner._plan_model(ref, [80e9], HERE, work_of(**work)),
        lambda: planner._plan_profile(profile, HERE, work_of(**work)),
        lambda: planning.suggest(ref, work_of(**work)),
    ):
        with pytest.raises(WorkbookError, match=r"at least (one sequence and one token|1, but is 0|0, but is -5)"):
            refused()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_every_device_of_every_profile_is_under_its_limit(plans, name):
    plan = plans[name]
    assert plan.fits
    assert plan.remedies == ()
    for group in plan.groups:
        assert len(group.devices) == max(models.load_profile(name).requires.gpus, 1)
        for device in group.devices:
            assert device.held == device.weights + device.kv_cache + device.activations + device.reserved
            assert 0 < device.held <= device.limit


def test_devices_of_the_box_by_hand(plans):
    first, *others = plans["8x80gb"].groups[0].devices
    assert first.limit == 80e9
    assert first.weights == 10 * LAYER + EMBEDDINGS
    assert [device.weights for device in others] == [10 * LAYER] * 6 + [10 * LAYER + NORM]
    assert {device.kv_cache for device in (first, *others)} == {10 * 2048 * CACHE}
    assert {device.reserved for device in (first, *others)} == {4e9}


def test_models_in_memory_together_share_the_devices(plans):
    _, both = plans["8x80gb"].groups
    assert both.models == ("falcon-180B-chat", "Llama-2-70b-chat-hf")
    assert sum(device.weights for device in both.devices) == 357_114_177_536 + 137_953_296_384
    assert sum(device.kv_cache for device in both.devices) == 2048 * (163_840 + 327_680)
    chat, llama = (machine.published_config(name) for name in (planning.FALCON_180B, "meta-llama/Llama-2-70b-chat-hf"))
    work = memory._activation_bytes(chat, "bf16") + memory._activation_bytes(llama, "bf16")
    assert {device.activations for device in both.devices} == {work}


def test_models_of_one_shape_that_take_turns_share_a_table(plans):
    groups = [group.models for group in plans["2x80gb"].groups]
    assert groups == [("falcon-180B or falcon-180B-chat",), ("Llama-2-70b-chat-hf",)]


def test_a_second_model_that_does_not_fit_is_not_planned_as_fitting():
    profile = models.load_profile("8x80gb")
    crowded = replace(profile, resident=(("falcon", "falcon_chat", "llama_chat"),))
    plan = planner._plan_profile(crowded, HERE)
    assert not plan.fits
    (remedy,) = plan.remedies
    three = "falcon-180B and falcon-180B-chat and Llama-2-70b-chat-hf"
    assert remedy.startswith(f"{three} in bf16 does not fit: it needs ")
    assert "left by falcon-180B can hold; needs" in remedy
    assert remedy.endswith("What would fit: int8 or nf4 on 8 GPUs of 80 GB; bf16 on 12 GPUs of 80 GB.")
    assert 11 * 0.95 * 80e9 < 2 * 357_114_177_536 + 137_953_296_384  # the weights alone need more than eleven


@pytest.mark.parametrize("count", [6, 7])
def test_the_remedy_holds_all_that_is_in_memory_together(count):
    profile = models.load_profile("8x80gb")
    fewer = replace(profile, requires=replace(profile.requires, gpus=count))
    plan = planner._plan_profile(fewer, HERE)
    assert plan.fits == (count == 7)
    if count == 6:  # either alone fits on six, so a remedy of each alone would be what is here already
        (remedy,) = plan.remedies
        assert "GiB left by falcon-180B-chat can hold. What would fit:" in remedy
        assert remedy.endswith("What would fit: int8 or nf4 on 6 GPUs of 80 GB; bf16 on 7 GPUs of 80 GB.")


def test_a_profile_and_a_model_are_told_the_same_remedy():
    profile = planner._plan_profile(models.load_profile("2x80gb"), HERE, precision="bf16")
    (model,) = plan_180b("2x80").remedies
    would = " What would fit: nf4 on 2 GPUs of 80 GB; bf16 on 5 GPUs of 80 GB."
    assert model.endswith(would)
    assert profile.remedies[0] == model.replace("falcon-180B in", "falcon-180B or falcon-180B-chat in")


def test_what_the_notebooks_do_beyond_the_plan_is_said(plans):
    """Notebook 04's own figures: its batch, and its longest question, in bytes where the tokenizer is not here."""
    source = (ROOT / "notebooks" / "source" / "04_falcon_vs_llama.py").read_text()
    assert f"\nbatch_size = {planning.QUESTIONS.batch_size}\n" in source
    assert 'options = {"precision": settings.precision, "batch_size": batch_size}' in source
    assert "compare(items, sides, short, **options)" in source
    reply = int(re.search(r"short = Sampling\(temperature=0, max_new_tokens=(\d+)", source)[1])
    items = evaluation.read_items(ROOT / "notebooks" / "data" / "animal_items.jsonl")
    here = AutoTokenizer.from_pretrained(models.resolve(models.load_profile("laptop").llama_chat))
    sizes = {"falcon-chat": str.encode, "falcon-instruct": str.encode, "llama-2": str.encode, "chatml": here.encode}
    for form, tokens in sizes.items():
        asked = [models.format_for(form).render([{"role": "user", "content": item.question}]) for item in items]
        longest = max(len(tokens(text)) for text in asked)
        assert longest + 1 + reply <= planning.QUESTIONS.context_tokens  # 1: a token to begin with
    for plan in plans.values():
        assert all(group.fits for group in plan.questions)
        text = " ".join(shown(planning.tables(plan), 100).split())
        free = min(device.limit - device.held for group in plan.questions for device in group.devices) / GIB
        asks = "04 asks 56 questions at once, each with its reply of at most 144 tokens"
        assert f"{asks}: the fullest device then has {free:.1f} GiB free." in text
        assert "Notebook 05 trains" in text
    both = plans["8x80gb"].questions[-1]
    assert sum(device.kv_cache for device in both.devices) == 56 * 144 * (163_840 + 327_680)
    assert plan_180b("8x80").questions == ()
    assert "Notebook" not in shown(planning.tables(plan_180b("8x80")), 100)


@pytest.mark.parametrize(
    ("option", "says"),
    [(["--double-quant"], "Leave --double-quant out"), (["--figure", "plan.png"], "Leave --figure out")],
)
def test_suggestions_refuse_what_they_would_not_look_at(option, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["plan", "--suggest", *option])
    assert result.exit_code == 2
    assert says in result.output
    assert not list(tmp_path.iterdir())


def test_a_plan_knows_whether_it_is_for_gpus(plans):
    assert {name: plan.on_gpus for name, plan in plans.items()} == {name: name != "laptop" for name in PROFILES}
    unmeasured = planner._plan_profile(models.load_profile("laptop"), HERE)
    assert "A card sold as" not in shown(planning.tables(unmeasured), 100)


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_needs_are_what_place_says(plans, name):
    profile = models.load_profile(name)
    gpus = [profile.requires.gpu_bytes] * profile.requires.gpus
    assert {need.precision for need in plans[name].needs} == set(profile.precisions)
    for need in plans[name].needs:
        (ref, *_) = [ref for ref in profile.models.values() if ref.name in need.model]
        placed = machine.place(models.config(ref), need.precision, gpus)
        assert (need.fits, need.shortfall) == (placed.fits, placed.shortfall)
        assert need.fits == (need.least_gpus <= len(gpus))
        assert need.total == sum(need.parts.values())


def test_four_cards_do_not_hold_bf16_by_how_much_and_what_would():
    plan = plan_180b("4x80")
    config = machine.published_config(planning.FALCON_180B)
    free = 4 * (0.95 * 80e9 - memory._activation_bytes(config, "bf16"))
    missing = (357_114_177_536 + 2048 * 163_840 - free) / GIB
    assert missing == pytest.approx(52.7, abs=0.1)
    assert not plan.fits
    (remedy,) = plan.remedies
    assert f"needs {missing:.1f} GiB more than 4 devices of 74.5 GiB can hold" in remedy
    assert remedy.endswith("What would fit: int8 or nf4 on 4 GPUs of 80 GB; bf16 on 5 GPUs of 80 GB.")
    assert plan_180b("5x80").fits
    assert sum(device.limit - device.held for device in plan.groups[0].devices) == pytest.approx(
        -missing * GIB, rel=1e-3
    )


def test_where_nothing_fits_the_remedy_is_more_cards():
    (remedy,) = plan_180b("1x24", "nf4").remedies
    assert remedy.endswith("What would fit: nf4 on 6 GPUs of 24 GB.")
    (remedy,) = plan_180b("2x3").remedies  # smaller than a layer
    assert remedy.endswith("What would fit: a larger machine.")


def test_double_quantization_and_the_librarys_cache_are_counted():
    (plain,), (other,) = (
        [need for need in plan_180b("2x80", "nf4", **work).needs if need.precision == "nf4"]
        for work in ({}, {"double_quant": True, "cache_heads": "library"})
    )
    assert plain.parts["weights"] / GIB == pytest.approx(94.84, abs=0.01)
    assert other.parts["weights"] / GIB == pytest.approx(87.13, abs=0.01)
    assert (plain.parts["kv_cache"], other.parts["kv_cache"]) == (2048 * 163_840, 2048 * 4_751_360)


def test_context_and_batch_make_the_cache(plans):
    assert plan_180b("8x80", context_tokens=1000, batch_size=3).needs[1].parts["kv_cache"] == 3000 * 163_840
    assert plans["laptop"].contexts == (512, 2048)  # falcon-mini takes no more
    profile = models.load_profile("8x80gb")
    other = planner._plan_profile(profile, HERE, work_of(100), "int8")
    assert other.contexts == (100,)
    assert {group.precision for group in other.groups} == {"int8"}


# --- speed, download, load --------------------------------------------------------------------------------------------


def test_the_speed_limit_by_hand():
    plan = plan_180b("8x80")
    read = 357_114_177_536 + 2048 * 163_840  # the tied matrix is read as the head
    a100, h100 = plan.speeds
    assert (a100.card, a100.bytes_read, h100.bytes_read) == ("A100 80GB", read, read)
    assert a100.tokens_per_second == pytest.approx(2039e9 / read) == pytest.approx(5.70, abs=0.01)
    assert h100.tokens_per_second == pytest.approx(3350e9 / read)


def test_an_untied_models_embeddings_are_looked_up_and_not_read():
    ref = request._published_ref("meta-llama/Llama-2-7b-chat-hf")
    (only,) = planner._plan_model(ref, [141e9], HERE).speeds
    assert only.card == "H200"
    assert only.bytes_read == 2 * (6_738_415_616 - 32000 * 4096) + 2048 * 2 * 32 * 32 * 128 * 2


def test_several_sequences_share_the_reading_of_the_weights():
    one, four = (plan_180b("8x80", batch_size=count).speeds[0] for count in (1, 4))
    cache = 2048 * 163_840
    assert four.bytes_read - one.bytes_read == 3 * cache
    assert four.tokens_per_second == pytest.approx(4 * 2039e9 / (357_114_177_536 + 4 * cache))


def test_layers_run_at_their_own_cards_bandwidth():
    plan = plan_180b("4x80,2x40", "int8")
    (group,) = plan.groups
    moved = [device.weights + device.kv_cache for device in group.devices]
    by_name = {limit.card: limit for limit in plan.speeds}
    assert set(by_name) == {"A100 80GB + A100 40GB", "H100 80GB + A100 40GB"}
    seconds = sum(moved[:4]) / 2039e9 + sum(moved[4:]) / 1555e9
    assert by_name["A100 80GB + A100 40GB"].tokens_per_second == pytest.approx(1 / seconds)


def test_no_speed_without_a_known_card_or_if_it_does_not_fit():
    assert plan_180b("9x64").fits
    assert plan_180b("9x64").speeds == ()
    assert plan_180b("4x80").speeds == ()


def test_the_laptops_limit_is_its_measured_bandwidth(plans):
    for limit in plans["laptop"].speeds:
        assert limit.tokens_per_second == pytest.approx(20e9 / limit.bytes_read)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("8x80gb", 2 * 2 * 179_522_565_120 + 2 * 68_976_648_192),
        ("1x24gb", 2 * 2 * 7_217_189_760 + 2 * 6_738_415_616),
        ("laptop", 0),
    ],
)
def test_the_download_is_the_sum_of_the_distinct_repositories(plans, name, size):
    assert plans[name].download_bytes == size
    profile = models.load_profile(name)
    twice = replace(profile, falcon_chat=profile.falcon)
    saved = profile.falcon_chat.download_bytes or 0
    assert planner._plan_profile(twice, plans[name].here).download_bytes == size - saved


def test_loading_takes_the_files_at_the_speed_of_the_disk(plans):
    seconds = {each.model: each.load_seconds for each in plans["8x80gb"].repositories}
    assert seconds["tiiuae/falcon-180B"] == pytest.approx(359.045e9 / 2e9, rel=1e-4)
    (mini, *_) = plans["laptop"].repositories
    stored = sum(file.stat().st_size for file in (ROOT / "env" / "models" / "falcon-mini").glob("*.safetensors"))
    assert mini.stored_bytes == stored > 1e6
    assert mini.load_seconds == pytest.approx(stored / 2e9)


def test_this_machine_is_measured(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    here = planner._measure(cpu=True)
    assert here.disk_folder == here.disk.folder == str(tmp_path)
    assert 1e6 < here.disk.bytes_per_second < 1e11
    assert 1e8 < here.memory_bandwidth.slowest <= here.memory_bandwidth.best < 1e13


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no file")
def test_a_disk_that_cannot_be_measured_is_said_to_be_so(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/hub")
    here = planner._measure()
    assert (here.disk, here.memory_bandwidth) == (None, None)
    plan = planner._plan_model(request._published_ref("tiiuae/falcon-7b"), [80e9], here)
    assert plan.repositories[0].load_seconds is None
    text = shown(planning.tables(plan), 100)
    assert f"not measured in /proc: {here.disk_problem}" in text


# --- suggestions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suggestions():
    return planning.suggest(request._published_ref(planning.FALCON_180B))


def test_suggestions_are_all_that_fits_and_the_least_memory_comes_first(suggestions):
    totals = [each.total_gigabytes for each in suggestions]
    assert totals == sorted(totals)
    config = machine.published_config(planning.FALCON_180B)
    listed = {(each.precision, each.double_quant, each.gpus, each.gigabytes) for each in suggestions}
    for precision, double in [("fp32", False), ("bf16", False), ("int8", False), ("nf4", False), ("nf4", True)]:
        for count in planning.COUNTS:
            for size in planning.SIZES:
                how = machine.Workload(double_quant=double)
                placed = machine.place(config, precision, [size * 1e9] * count, workload=how)
                assert placed.fits == ((precision, double, count, size) in listed)
    assert (suggestions[0].gpus, suggestions[0].gigabytes, suggestions[0].precision) == (1, 141, "nf4")


def test_suggested_tokens_fit_and_one_more_does_not(suggestions):
    config = machine.published_config(planning.FALCON_180B)
    for each in suggestions[::7]:
        gpus = [each.gigabytes * 1e9] * each.gpus
        for heads, tokens in (("kv", each.context_tokens), ("library", each.library_context_tokens)):
            fits, more = (machine.Workload(1, count, heads, each.double_quant) for count in (tokens, tokens + 1))
            assert machine.place(config, each.precision, gpus, workload=fits).fits
            assert not machine.place(config, each.precision, gpus, workload=more).fits


def test_suggestions_for_one_precision_and_a_long_context(suggestions):
    ref = request._published_ref(planning.FALCON_180B)
    half = planning.suggest(ref, precision="fp16")
    same = [each for each in suggestions if each.precision == "bf16"]
    assert [replace(each, precision="bf16") for each in half] == same
    long = planning.suggest(ref, work_of(8000), "nf4")
    assert {each.context_tokens >= 8000 for each in long} == {True}
    library = planning.suggest(ref, work_of(8000, cache_heads="library"), "nf4")
    assert {each.library_context_tokens >= 8000 for each in library} == {True}
    assert len(library) < len(long)
    with pytest.raises(WorkbookError, match="no precision 'int4'"):
        planning.suggest(ref, precision="int4")


# --- showing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 160])
@pytest.mark.parametrize("name", PROFILES)
def test_nothing_is_cut_in_a_terminal(plans, name, width):
    text = shown(planning.tables(plans[name]), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    cells = [line.split() for line in text.splitlines()]
    for group in plans[name].groups:
        for device in group.devices:
            words = device.name.split()
            held = f"{device.held / GIB:.2f}"
            assert any(line[: len(words)] == words and held in line for line in cells)
    assert text.count("1 GiB = 2^30 bytes") == 1
    for role_name, real in plans[name].stand_ins.items():
        assert f"{role_name} is a stand-in for {real}." in text


def test_suggestions_are_not_cut_in_a_terminal(suggestions):
    text = shown([planning.suggestion_table(suggestions, work_of())], 100)
    assert "…" not in text
    rows = [line for line in text.splitlines() if " GB  " in line]
    assert len(rows) == len(suggestions)  # none takes two lines


def test_the_articles_machines_stand_beside_what_is_needed():
    text = shown(planning.tables(plan_180b("8x80")), 100)
    row = next(line.split() for line in text.splitlines() if line.startswith("bf16 inference"))
    assert row == ["bf16", "inference", "8x", "A100", "80GB", "640", "358", "5", "11"]
    other = planner._plan_model(request._published_ref("tiiuae/falcon-40b"), [80e9] * 2, HERE)
    assert "article" not in shown(planning.tables(other), 100)


def test_json_is_the_whole_plan(plans, suggestions):
    written = json.loads(planning.to_json(plans["8x80gb"]))
    assert written["fits"] is True
    assert written["download_bytes"] == 856_043_556_864
    assert written["groups"][0]["devices"][0]["held"] == plans["8x80gb"].groups[0].devices[0].held
    assert len(written["needs"]) == 8
    assert written["here"]["disk"]["direct"] is True
    assert json.loads(planning.to_json(suggestions))[0]["gigabytes"] == 141


def test_the_figure_shows_every_device_and_part(plans):
    figure = output._draw(plans["8x80gb"])
    assert len(figure.axes) == 2
    for axis, group in zip(figure.axes, plans["8x80gb"].groups, strict=True):
        bars = [bar.get_height() for bar in axis.patches]
        assert sum(bars) == pytest.approx(sum(device.held for device in group.devices) / GIB)
        assert [label.get_text() for label in axis.get_xticklabels()] == [f"GPU {index}" for index in range(8)]
        limits = [segment for lines in axis.collections for segment in lines.get_segments()]
        assert len(limits) == 8
        assert {y for segment in limits for y in segment[:, 1]} == {80e9 / GIB}
        assert group.label in axis.get_title(loc="left").replace("\n", " ")
    assert figure.get_suptitle().startswith("Memory of each device: fits")
    assert "falcon-mini stands in for tiiuae/falcon-180B" in output._draw(plans["laptop"]).get_suptitle().replace(
        "\n", " "
    )


def test_the_figure_becomes_a_png_file(plans, tmp_path):
    planning.save_figure(plans["1x24gb"], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(WorkbookError, match=r"not named like one. Name it plan\.png"):
        planning.save_figure(plans["1x24gb"], tmp_path.joinpath("plan.pdf").relative_to(tmp_path))
    with pytest.raises(WorkbookError, match=r"cannot be written .*No such file"):
        planning.save_figure(plans["1x24gb"], tmp_path / "absent" / "plan.png")


# --- what it takes ----------------------------------------------------------------------------------------------------

# Runs the command with every connection refused, and prints what it took.
TAKES = """
import json, resource, subprocess, sys
code = '''
import socket, sys
def refuse(*_): raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from helpers.cli import app
app(sys.argv[1:])
'''
done = subprocess.run([sys.executable, "-c", code, "plan", *sys.argv[1:]], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, done.stdout, done.stderr]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--profile", "8x80gb"], ["--profile", "laptop"], ["--suggest"]], ids=["8x80gb", "laptop", "suggest"]
)
def test_a_plan_takes_less_than_ten_seconds_and_one_and_a_half_gib_without_gpu_or_network(arguments, tmp_path):
    """Seconds of the CPU: on a machine that does other work as well, more time passes."""
    figure = [] if "--suggest" in arguments else ["--figure", str(tmp_path / "plan.png")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
    answer = subprocess.check_output([sys.executable, "-c", TAKES, *arguments, *figure], env=environment, text=True)
    code, seconds, size, out, errors = json.loads(answer)
    assert (code, errors) == (0, "")
    assert ("is under its limit" in out) != ("--suggest" in arguments)
    assert seconds < 10
    assert size < 1.5 * GIB
