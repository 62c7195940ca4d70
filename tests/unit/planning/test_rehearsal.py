"""The rehearsal: plans at the true size, tiny checkpoints in the hub's layout, a fault that only GPUs would show."""

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from safetensors import safe_open

from helpers import models, runs
from helpers.machine import anatomy, hardware, placement
from helpers.models import devices
from helpers.planning import rehearsal
from helpers.runs import UsageError

SIZES = {"vocab_size", "bos_token_id", "eos_token_id", "num_hidden_layers", "hidden_size", "num_attention_heads"}
SIZES |= {"num_kv_heads", "ffn_hidden_size", "intermediate_size", "head_dim", "num_key_value_heads"}
PROFILES = [name for name in models.available() if not models.load_profile(name).offline]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return rehearsal.prepare(models.load_profile("8x80gb"), tmp_path_factory.mktemp("rehearsal") / "here")


@pytest.fixture
def inside(prepared, monkeypatch):
    """This process as a notebook of the rehearsal sees it."""
    from huggingface_hub import constants

    for name, value in prepared.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(prepared.folder / "hub"))  # read when it was imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return models.load_profile("8x80gb")


@pytest.mark.parametrize("name", anatomy.published_models())
def test_a_shrunk_configuration_keeps_every_flag(name):
    real, tiny = anatomy.published_config(name), rehearsal._shrink(anatomy.published_config(name), 100, 1, 81)
    kept, shrunk = real.to_dict(), tiny.to_dict()
    assert {key: value for key, value in shrunk.items() if key not in SIZES} == {
        key: value for key, value in kept.items() if key not in SIZES
    }
    assert anatomy.count_parameters(tiny) < anatomy.count_parameters(real) / 1000
    queries, grouped = anatomy.anatomy(real), anatomy.anatomy(tiny)
    assert grouped.kv_heads == (queries.kv_heads if queries.kv_heads in (1, 8) else rehearsal.HEADS)


def test_the_plans_are_those_of_the_real_models(prepared):
    found = {plan.model: plan for plan in prepared.plans}
    assert found["tiiuae/falcon-180B"].parameters == 178_557_088_768
    assert found["meta-llama/Llama-2-70b-chat-hf"].parameters == 68_976_648_192
    chat, llama = found["tiiuae/falcon-180B-chat"], found["meta-llama/Llama-2-70b-chat-hf"]
    together = [sum(pair) for pair in zip(chat.device_bytes, llama.device_bytes, strict=True)]
    assert len(together) == 8
    assert max(together) < 0.95 * chat.limit_bytes
    assert {plan.limit_bytes for plan in prepared.plans} == {80_000_000_000}
    assert {plan.modules for plan in prepared.plans} == {80 + 4}  # layers, embeddings, rotary, final norm, head


def test_what_does_not_fit_beside_its_neighbour_is_refused():
    profile = models.load_profile("8x80gb")
    smaller = replace(profile, requires=replace(profile.requires, gpus=6))
    rehearsal._plan(replace(smaller, resident=(("falcon_chat",), ("llama_chat",))), rehearsal._machine_of(smaller))
    with pytest.raises(rehearsal.RehearsalError, match=r"Llama-2-70b-chat-hf in bf16 would not fit.*needs .* GiB more"):
        rehearsal._plan(smaller, rehearsal._machine_of(smaller))


def test_a_placement_that_leaves_a_weight_out_is_refused(monkeypatch):
    place_together = placement.place_together

    def forgetful(*arguments):
        placements = place_together(*arguments)
        for placed in placements:
            placed.device_map.pop("transformer.h.7", None)
        return placements

    monkeypatch.setattr(rehearsal, "place_together", forgetful)
    profile = models.load_profile("8x80gb")
    with pytest.raises(rehearsal.RehearsalError, match=r"leaves out 8 weights, such as transformer\.h\.7\."):
        rehearsal._plan(profile, rehearsal._machine_of(profile))


def test_a_gpu_that_is_really_here_is_not_seen(prepared):
    code = "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''; import torch; print(torch.cuda.device_count())"
    environment = os.environ | prepared.environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


def test_the_machine_is_the_profiles(inside, prepared):
    machine = hardware.detect()
    assert machine == prepared.machine
    assert machine.rehearsed
    assert [gpu.total_bytes for gpu in machine.gpus] == [80_000_000_000] * 8
    assert models.missing(inside, machine) == []


def test_a_rehearsed_model_is_never_mistaken_for_the_real_one(inside):
    assert inside.falcon.stand_in_for is None  # so that the real one's branches are taken
    assert inside.falcon.label == "falcon-180B (rehearsal: tiny, random weights)"
    assert all("rehearsal" in text for text in models.table(inside)["stands in for"])
    assert not models.load_profile("laptop").falcon.rehearsed


@pytest.mark.parametrize(("role", "layer"), [("falcon", "transformer.h.0."), ("llama_chat", "model.layers.0.")])
def test_a_checkpoint_has_the_files_and_names_of_the_real_one(inside, role, layer):
    import torch
    from transformers import AutoModelForCausalLM

    ref = inside.models[role]
    folder = models.resolve(ref)
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{n:05}-of-{ref.shards:05}.safetensors" for n in range(1, ref.shards + 1)
    ]
    assert all(hashlib.sha256(shard.read_bytes()).hexdigest() == shard.resolve().name for shard in shards)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            assert {name for name, file in places.items() if file == shard.name} == set(tensors.keys())
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(anatomy.published_config(ref.id.removesuffix("-chat")))
    assert {name for name in places if name.startswith(layer)} == {
        name for name in real.state_dict() if name.startswith(layer)
    }
    assert "lm_head.weight" in places


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_it_loads_by_the_placement_for_the_gpus(inside, precision, monkeypatch):
    asked = []
    place = models.device_map_for
    monkeypatch.setattr(devices, "device_map_for", lambda *a, **k: asked.append(place(*a, **k)) or asked[0])
    loaded = models.load(inside.falcon_chat, precision)
    assert set(asked[0].values()) == set(range(8))
    assert loaded.report.devices.keys() == {"cpu"}
    assert (loaded.report.quantized_layers == 44) == (precision == "nf4")


def test_memory_questions_are_answered_at_the_true_size(inside, prepared):
    config = models.config(inside.falcon)
    assert anatomy.count_parameters(config) == 178_557_088_768
    assert placement.shortfall(config, "fp32", prepared.machine).bytes > 60 * 2**30  # 665 GiB on eight GPUs of 74.5
    assert placement.shortfall(config, "bf16", prepared.machine) is None


def quiet():
    return Console(file=io.StringIO())


def write_notebook(path, code, declared=()):
    """A notebook of two cells, the profile as its parameter and the code, that declares the roles of its models."""
    import nbformat

    cells = [nbformat.v4.new_code_cell("profile = 'laptop'"), nbformat.v4.new_code_cell(code)]
    cells[0].metadata.tags = ["parameters"]
    metadata = {"workbook": {"models": {role: ["profile"] for role in declared}}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


def test_a_run_of_it_says_what_stood_in_for_what(tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    code = "from helpers import machine, runs\nruns.record('gpus', len(machine.detect().gpus))"
    write_notebook(notebooks / "00_start_here.ipynb", code)
    request = runs.Request("8x80gb", rehearse=True, folder=tmp_path / "run", notebooks=notebooks)
    done = runs.run(request, console=quiet())
    assert done.ok
    recorded = json.loads((done.folder / "results.json").read_text())["values"]["00_start_here"]["gpus"]
    assert (recorded["value"], recorded["verdict"]) == (8, "unmeasured")
    manifest = runs.read_manifest(done.folder)
    assert len(manifest.rehearsal.machine.gpus) == 8
    assert {each.what for each in manifest.rehearsal.substitutions} >= {
        "devices",
        "weights",
        "expected values",
    }
    resumed = runs.Request(resume=done.folder, notebooks=notebooks)
    assert runs.run(resumed, console=quiet()).ok  # and goes on as a rehearsal, on a machine without a GPU


def test_what_cannot_be_rehearsed_is_refused(tmp_path):
    with pytest.raises(UsageError, match="Run it without --rehearse"):
        runs.run(runs.Request("laptop", rehearse=True, folder=tmp_path / "run"), console=quiet())


# A fault in the code of the package that runs only if there are GPUs.
FAULTY = """
from helpers import models
from helpers.models import devices

place_together = devices.place_together

def faulty(residents, where, workload):
    if where.gpus:
        raise RuntimeError("only with GPUs")
    return place_together(residents, where, workload)

devices.place_together = faulty
settings = models.load_profile(profile)
models.load(settings.falcon, settings.precision)
"""


@pytest.mark.slow
def test_a_fault_that_only_gpus_would_show_turns_the_rehearsal_red(tmp_path):
    write_notebook(tmp_path / "01_loading.ipynb", FAULTY, ["falcon"])
    rehearsed = runs.Request("8x80gb", rehearse=True, folder=tmp_path / "rehearsed", notebooks=tmp_path)
    assert "RuntimeError: only with GPUs" in runs.run(rehearsed, console=quiet()).failed["01_loading"]
    assert runs.run(runs.Request("laptop", folder=tmp_path / "laptop", notebooks=tmp_path), console=quiet()).ok
