"""The profiles in env/profiles, how they are read, and which of them a machine can run."""

import dataclasses
import re

import pytest
import yaml

from helpers import models
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.machine import Gpu, Machine, anatomy, hardware, memory
from helpers.machine.placement import RESERVED, place
from helpers.models import FORMATS, profiles

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks" / "source").glob("*.py"))
GPU_PROFILES = ["1x24gb", "2x80gb", "8x40gb", "8x80gb"]


def machine(gpus=0, gpu_bytes=0, *, cpus=64, ram=512 * 10**9, disk=2 * 10**12):
    cards = tuple(Gpu(i, "GPU", int(gpu_bytes), int(gpu_bytes), (8, 0)) for i in range(gpus))
    return Machine(cards, ram, ram, disk, cpus, "CPU", "Linux", "3.11")


def published(ref):
    """The published configuration of a profile's model: chat models share their base's."""
    same = {"tiiuae/falcon-180B-chat": "tiiuae/falcon-180B", "tiiuae/falcon-7b-instruct": "tiiuae/falcon-7b"}
    return anatomy.published_config(same.get(ref.id, ref.id))


def changed(tmp_path, edit, name="laptop"):
    """A copy of a profile's file, edited."""
    fields = yaml.safe_load((profiles.FOLDER / f"{name}.yaml").read_text())
    edit(fields)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def test_what_is_downloaded_needs_room_where_the_cache_is():
    profile, here = models.load_profile("1x24gb"), machine(1, 24e9, disk=1)
    roomy = dataclasses.replace(here, cache_free_bytes=10**12)
    assert models.missing(profile, roomy) == []
    assert any(
        "1.0 GiB for the Hugging Face cache" in text
        for text in models.missing(profile, dataclasses.replace(roomy, cache_free_bytes=2**30))
    )
    laptop = models.missing(models.load_profile("laptop"), roomy)  # what it unpacks lies in the project
    assert laptop == ["needs 1.9 GiB of free disk, this machine has 0.0 GiB"]


def test_available_goes_from_small_to_large():
    assert models.available() == ("laptop", "1x24gb", "2x80gb", "8x40gb", "8x80gb")


@pytest.mark.parametrize("name", models.available())
def test_every_profile_is_complete(name):
    profile = models.load_profile(name)
    assert profile.name == name
    assert list(profile.budgets) == NOTEBOOKS
    assert profile.precision in profile.precisions
    assert {"fp32", "bf16", "int8", "nf4"} <= set(profile.precisions)
    assert profile.falcon.family == profile.falcon_chat.family == "falcon"
    assert profile.llama_chat.family == "llama"
    assert {ref.format for ref in profile.models.values()} <= set(FORMATS)
    assert all(ref.licence for ref in profile.models.values())


def test_every_profile_names_the_model_to_repair():
    """Falcon, and on the laptop the model that can read a list."""
    for name in models.available():
        profile = models.load_profile(name)
        assert "repair" in yaml.safe_load((profiles.FOLDER / f"{name}.yaml").read_text())
        assert profile.repaired is profile.models[profile.repair]
        assert profile.repaired.family == ("llama" if name == "laptop" else "falcon")


@pytest.mark.parametrize("role", ["falcon", "llama", "falcon_draft", "", None, 1, ["llama_chat"]])
def test_only_a_chat_model_can_be_repaired(tmp_path, role):
    with pytest.raises(profiles.ProfileError, match=r"repair: Input should be 'falcon_chat' or 'llama_chat'"):
        profiles._read(changed(tmp_path, lambda fields: fields.update(repair=role)))


def test_laptop_is_offline_and_names_its_stand_ins():
    laptop = models.load_profile("laptop")
    assert laptop.offline
    assert laptop.requires.gpus == 0
    assert [ref.stand_in_for for ref in laptop.models.values()] == [
        "tiiuae/falcon-180B", "tiiuae/falcon-180B-chat", "meta-llama/Llama-2-70b-chat-hf",
    ]  # fmt: skip
    for ref in (laptop.falcon, laptop.falcon_chat):
        assert (ROOT / ref.id).is_dir()


def test_laptop_budgets_are_four_times_the_expected_time():
    for budget in models.load_profile("laptop").budgets.values():
        assert budget.seconds == budget.cell_seconds == max(120, 4 * budget.expected_seconds)


def test_the_times_shown_are_those_of_the_profile_s_file():
    written = yaml.safe_load((ROOT / "env" / "profiles" / "laptop.yaml").read_text(encoding="utf-8"))["budgets"]
    shown = models.times(models.load_profile("laptop"))
    assert list(shown.index) == [*written, "all"]
    expected = [times["expected_seconds"] for times in written.values()]
    assert [seconds_of(text) for text in shown["expected"]] == [*expected, sum(expected)]
    ended = [times["seconds"] for times in written.values()]
    assert [seconds_of(text) for text in shown["ended after"][:-1]] == ended


def seconds_of(text):
    """ "3 min 5 s" -> 185"""
    units = {"s": 1, "min": 60, "h": 3600}
    words = text.split()
    return sum(float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_a_time_that_was_not_measured_is_a_dash(name):
    shown = models.times(models.load_profile(name))
    assert set(shown["expected"]) == {"–"}
    assert all(seconds_of(text) >= 600 for text in shown["ended after"][:-1])


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_downloads_are_two_bytes_a_parameter(name):
    profile = models.load_profile(name)
    for ref in profile.models.values():
        assert ref.download_bytes == 2 * anatomy.count_parameters(published(ref), tied=False)
        assert re.fullmatch(r"[0-9a-f]{40}|main", ref.revision)
    assert profile.requires.disk_bytes > sum(ref.download_bytes for ref in profile.models.values())


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_models_that_are_resident_together_fit_together(name):
    profile = models.load_profile(name)
    gpus = [profile.requires.gpu_bytes] * profile.requires.gpus
    for group in profile.resident:
        held = dict.fromkeys(range(len(gpus)), 0)
        work = 0
        for role in group:
            config = published(profile.models[role])
            placement = place(config, profile.precision, gpus)
            assert placement.fits
            work = max(work, memory._activation_bytes(config, profile.precision))
            held = {device: held[device] + size for device, size in placement.per_device_bytes.items()}
        limit = profile.requires.gpu_bytes * (1 - RESERVED) - work
        assert max(held.values()) <= limit


@pytest.mark.parametrize("name", ["1x24gb", "2x80gb"])
def test_the_precision_a_profile_cannot_hold_says_what_is_missing(name):
    profile = models.load_profile(name)
    gpus = [profile.requires.gpu_bytes] * profile.requires.gpus
    placement = place(published(profile.falcon), "fp32", gpus)
    assert not placement.fits
    assert re.match(r"needs \d+\.\d GiB more than \d devices? of \d+\.\d GiB can hold", str(placement.shortfall))


@pytest.mark.parametrize("name", ["lapptop", "", "../laptop", "laptop.yaml"])
def test_an_unknown_profile_lists_the_known_ones(name):
    with pytest.raises(WorkbookError, match=r"Choose one of: auto, 1x24gb, .*laptop"):
        models.load_profile(name)


@pytest.mark.parametrize(
    ("key", "edit"),
    [
        ("falcon_chat.format", lambda f: f["falcon_chat"].update(format="falcon-instruct")),  # A11, as the next two
        ("falcon_chat.format", lambda f: f["falcon_chat"].update(id="tiiuae/falcon-40b-instruct")),
        ("llama_chat.format", lambda f: f["llama_chat"].update(id="meta-llama/Llama-2-13b-chat-hf")),
        ("falcon.licnce", lambda f: f["falcon"].update(licnce="x")),
        ("precisoin", lambda f: f.update(precisoin="bf16")),
        ("precision", lambda f: f.update(precision="bf17")),
        ("precisions.1", lambda f: f.update(precisions=["bf16", "fp23"])),
        ("falcon.format", lambda f: f["falcon"].update(format="falcon")),
        ("budgets.01_loading.second", lambda f: f["budgets"]["01_loading"].update(second=1)),
        ("requires.gpu", lambda f: f["requires"].update(gpu=1)),
        ("requires.cpus", lambda f: f["requires"].update(cpus="many")),
        ("llama_chat", lambda f: f.pop("llama_chat")),
        ("resident", lambda f: f.update(resident=[["falcon", "llama"]])),
        ("resident", lambda f: f.update(resident=[["falcon", "falcon_chat"]])),
    ],
)
def test_a_mistake_in_a_file_names_file_and_key(tmp_path, key, edit):
    file = changed(tmp_path, edit)
    with pytest.raises(models.ProfileError, match=rf"mine\.yaml: .*\b{re.escape(key)}: "):
        profiles._read(file)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(models.ProfileError, match=r"mine\.yaml"):
        profiles._read(file)


def test_an_unchanged_copy_reads_the_same(tmp_path):
    mine = profiles._read(changed(tmp_path, lambda fields: None))
    assert dataclasses.replace(mine, name="laptop") == models.load_profile("laptop")


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (machine(cpus=2, ram=8 * 10**9, disk=10**10), "laptop"),
        (machine(cpus=1, ram=2 * 10**9, disk=10**8), "laptop"),
        (machine(1, 25.7e9), "1x24gb"),
        (machine(1, 85e9), "1x24gb"),
        (machine(2, 85e9), "2x80gb"),
        (machine(4, 85e9), "2x80gb"),
        (machine(8, 42.3e9), "8x40gb"),
        (machine(8, 85e9), "8x80gb"),
        (machine(8, 85e9, disk=500 * 10**9), "1x24gb"),
        (machine(8, 16e9), "laptop"),
    ],
)
def test_auto_picks_the_largest_that_runs(monkeypatch, here, expected):
    monkeypatch.setattr(hardware, "detect", lambda: here)
    monkeypatch.setattr(profiles, "downloaded_bytes", lambda profile: 0)
    assert models.load_profile("auto").name == expected


def test_auto_counts_what_is_downloaded_already(monkeypatch):
    monkeypatch.setattr(hardware, "detect", lambda: machine(8, 85e9, disk=100 * 10**9))
    monkeypatch.setattr(profiles, "downloaded_bytes", lambda profile: 0 if profile.offline else 856 * 10**9)
    assert models.load_profile("auto").name == "8x80gb"


def test_what_is_missing_in_phrases():
    real = models.load_profile("2x80gb")
    assert models.missing(real, machine(2, 85e9)) == []
    assert models.missing(real, machine()) == ["needs 2 GPUs of 80 GB, this machine has none"]
    assert models.missing(real, machine(3, 24 * 2**30, cpus=4)) == [
        "needs 2 GPUs of 80 GB, this machine has 3x GPU of 24.0 GiB",
        "needs 8 CPUs, this machine has 4",
    ]
    assert models.missing(real, machine(2, 85e9, ram=2**33)) == ["needs 59.6 GiB of memory, this machine has 8.0 GiB"]
    full = machine(2, 85e9, disk=2**30)
    assert models.missing(real, full) == ["needs 819.6 GiB of free disk, this machine has 1.0 GiB"]
    assert models.missing(real, full, downloaded_bytes=real.requires.disk_bytes - 2**29) == []
    assert models.missing(models.load_profile("1x24gb"), machine()) == ["needs 1 GPU of 24 GB, this machine has none"]


def test_downloaded_bytes_in_a_hub_cache(tmp_path):
    def cached(repo, commit, file, size):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        for each in (snapshot, folder / "blobs", folder / "refs"):
            each.mkdir(parents=True, exist_ok=True)
        blob = folder / "blobs" / f"{commit}{file}"
        with blob.open("wb") as sparse:
            sparse.truncate(size)
        (snapshot / file).symlink_to(blob)
        return folder

    profile = models.load_profile("1x24gb")
    llama, falcon = profile.llama_chat, profile.falcon
    assert models.downloaded_bytes(profile, tmp_path / "absent") == 0
    cached(llama.id, llama.revision, "model-00001-of-00002.safetensors", 200)
    cached("somebody/else", llama.revision, "model.safetensors", 50)
    folder = cached(falcon.id, "1" * 40, "model.safetensors", 1000)
    (folder / "refs" / "main").write_text("1" * 40)
    main = dataclasses.replace(profile, falcon=dataclasses.replace(falcon, revision="main"))
    assert models.downloaded_bytes(main, tmp_path) == 1200
    cached(falcon.id, "2" * 40, "model.safetensors", 3000)
    cached(llama.id, llama.revision, "pytorch_model-00001-of-00002.bin", 10**9)
    assert models.downloaded_bytes(main, tmp_path) == 1200, "another revision, another format"
    gone = cached(llama.id, llama.revision, "model-00002-of-00002.safetensors", 10**12)
    assert models.downloaded_bytes(main, tmp_path) == 1000 + llama.download_bytes
    (gone / "blobs" / f"{llama.revision}model-00002-of-00002.safetensors").unlink()
    assert models.downloaded_bytes(main, tmp_path) == 1200
    assert models.downloaded_bytes(models.load_profile("laptop"), tmp_path) == 0


def test_the_table_of_a_notebook():
    laptop = models.table(models.load_profile("laptop"))
    assert list(laptop.index) == ["falcon", "falcon_chat", "llama_chat"]
    assert list(laptop.columns) == ["model", "stands in for", "chat format", "where it lives", "precision"]
    assert laptop.loc["falcon", "stands in for"] == "tiiuae/falcon-180B"
    assert laptop.loc["llama_chat", "precision"] == "bf16 (dequantized from SmolLM2-135M-Instruct.Q4_1.gguf)"
    real = models.table(models.load_profile("8x80gb"))
    assert real["stands in for"].unique().tolist() == ["nothing: it is the real one"]
    assert real["where it lives"].unique().tolist() == ["on the Hugging Face Hub"]
