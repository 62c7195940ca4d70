"""Loading against plain transformers, and against damaged checkpoints, dead processes and a hub of our own."""

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM
from transformers.models.falcon import modeling_falcon

from helpers import machine, models
from helpers.base import PRECISIONS, WorkbookError
from helpers.base.files import ROOT
from helpers.models import (
    LoadError,
    LoadOptions,
    ModelRef,
    Profile,
    QuantizationError,
    Requirement,
    load,
    loading,
    prepare,
    quantization,
    report_table,
    resolve,
    tidy_output,
    unload,
    unpacking,
    verify_quantized,
)

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 2, 77, 3]])
NAME = "transformer.h.1.mlp.dense_h_to_4h.weight"
PARAMETERS = 2 * 45056 + 4096 * 64 + 2 * 4 * 64 + 2 * 64  # hidden 64, 2 layers, 4 query and 2 key-value heads of 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Falcon of 180B's flags in bf16, with falcon-mini's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-falcon"
    config = FalconConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, num_ln_in_parallel_attn=2, alibi=False, bias=False,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def at(folder, **changes) -> ModelRef:
    return replace(ModelRef(id=str(folder), family="falcon", format="falcon-chat", source="embedded"), **changes)


def rewrite(folder: Path, change) -> None:
    """Pass the checkpoint's tensors through ``change``."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def problems(model, device_map, precision="bf16") -> list[str]:
    """What is wrong with a model whose names and shapes transformers found right."""
    fine = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": (), "error_msgs": ()}
    return loading._problems(model, fine, {}, precision, device_map)


# What is loaded


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_unquantized_loads_equal_transformers(checkpoint, precision, dtype):
    loaded = load(at(checkpoint), precision)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert torch.equal(logits(loaded.model), logits(plain))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.format.name == "falcon-chat"
    assert loaded.tokenizer.eos_token == "<|endoftext|>"
    assert not loaded.model.training


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_report_says_what_is_there(checkpoint, precision):
    report = load(at(checkpoint, stand_in_for="Falcon-180B"), precision).report
    quantized = precision in ("int8", "nf4")
    rest = {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")
    linear = {"int8": {"int8": 90112}, "nf4": {"uint8": 90112}}.get(precision, {})
    other_bytes = 4 if precision == "fp32" else 2
    stored = {"int8": 90112 + 4 * 1024, "nf4": 90112 // 2 + 90112 // 64 * 4 + 8 * 64}.get(
        precision, 90112 * other_bytes
    )
    assert report.model == "tiny-falcon (stand-in for Falcon-180B)"
    assert (report.precision, report.parameters, report.devices) == (precision, PARAMETERS, {"cpu": PARAMETERS})
    assert (report.linear_layers, report.quantized_layers) == (8, 8 if quantized else 0)
    assert report.dtypes == {rest: PARAMETERS - 90112 * quantized} | linear
    assert report.stored_bytes == stored + (PARAMETERS - 90112) * other_bytes
    assert report.repaired is quantized
    assert 0 < report.seconds < 60


def test_the_table_has_every_figure_in_words(checkpoint):
    table = report_table(load(at(checkpoint, stand_in_for="Falcon-180B"), "nf4"))
    assert list(table.columns) == ["property", "value"]
    values = dict(table.itertuples(index=False))
    assert values["weights in memory"] == "0.6 MiB"
    assert values["parameters"] == f"{PARAMETERS:,}"
    assert values["linear layers"] == "8, of them quantized: 8"
    assert values["stands in for"] == "Falcon-180B"
    assert values["types"] == "bfloat16: 262,784 parameters, uint8: 90,112 parameters"


def test_double_quant_takes_fewer_bytes_for_scales(checkpoint):
    single, double = (load(at(checkpoint), "nf4", options=LoadOptions(double_quant=on)).model for on in (False, True))
    states = [model.transformer.h[0].mlp.dense_h_to_4h.weight.quant_state for model in (single, double)]
    assert [state.absmax.dtype for state in states] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("unpacked", [False, True])
def test_unpacked_weights_stay_as_they_are(checkpoint, unpacked):
    model = load(at(checkpoint), "nf4", unpacked=unpacked).model
    weight = model.transformer.h[0].mlp.dense_h_to_4h.weight
    before, repacks = weight.data.clone(), model.transformer.h[0].mlp.dense_h_to_4h.support_avx512bf16_for_cpu
    logits(model)
    assert torch.equal(weight.data.flatten(), before.flatten()) is not repacks
    assert not (unpacked and repacks)


def test_sharded_checkpoints_load_equal(checkpoint, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(at(tmp_path)).model), logits(plain))
    verify_quantized(load(at(tmp_path), "nf4").model, "nf4")


def test_a_tied_head_may_be_stored_or_not(copied):
    rewrite(
        copied,
        lambda weights: weights.update({"lm_head.weight": weights["transformer.word_embeddings.weight"].clone()}),
    )
    loaded = load(at(copied))
    assert loaded.model.lm_head.weight is loaded.model.transformer.word_embeddings.weight
    assert loaded.report.parameters == PARAMETERS


def test_a_checkpoint_quantized_before_loads_in_its_own_precision_only(checkpoint, tmp_path):
    load(at(checkpoint), "nf4").model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert load(at(tmp_path), "nf4").report.quantized_layers == 8
    for other in ("bf16", "int8"):
        with pytest.raises(LoadError, match=f"already quantized, and not to {other}"):
            load(at(tmp_path), other)


def test_the_repair_is_undone_after_each_load(checkpoint, copied):
    original = modeling_falcon.FalconLinear
    load(at(checkpoint), "nf4")
    assert modeling_falcon.FalconLinear is original
    rewrite(copied, lambda weights: weights.pop(NAME))
    with pytest.raises(LoadError):
        load(at(copied), "nf4")
    assert modeling_falcon.FalconLinear is original


def test_unload_frees_the_model(checkpoint):
    loaded = load(at(checkpoint))
    alive = weakref.ref(loaded.model)
    unload(loaded)
    unload(loaded)
    assert alive() is None
    assert loaded.report.parameters == PARAMETERS


def test_configuration_without_weights(copied):
    (copied / "model.safetensors").unlink()
    assert models.config(at(copied)).num_kv_heads == 2


# What is refused


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_a_missing_weight_is_refused_and_named(copied, precision):
    rewrite(copied, lambda weights: weights.pop(NAME))
    with pytest.raises(LoadError, match=f"1 weights missing from the checkpoint: {NAME}"):
        load(at(copied), precision)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_weight_too_many_is_refused_and_named(copied, precision):
    rewrite(copied, lambda weights: weights.update(extra=torch.zeros(3)))
    with pytest.raises(LoadError, match="1 weights in the checkpoint but not in the model: extra"):
        load(at(copied), precision)


@pytest.mark.parametrize("shape", [(256, 32), (64, 256)])
@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_a_weight_of_another_shape_is_refused_and_named(copied, precision, shape):
    """transformers itself overlooks it where bitsandbytes quantizes the weight."""
    rewrite(copied, lambda weights: weights.update({NAME: torch.zeros(shape)}))
    with pytest.raises(
        WorkbookError, match=rf"{NAME.removesuffix('.weight')}.* \({shape[0]}, {shape[1]}\), not \(256, 64\)"
    ):
        load(at(copied), precision)


def test_pickled_weights_are_refused(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"no file named model.safetensors"):
        load(at(copied))


POISON = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\nfrom transformers import FalconConfig\n"


def test_code_of_a_checkpoint_never_runs(copied):
    (copied / "poison.py").write_text(POISON, encoding="utf-8")
    own_code = {"AutoConfig": "poison.FalconConfig", "AutoModelForCausalLM": "poison.FalconForCausalLM"}
    edit_json(copied / "config.json", auto_map=own_code)
    edit_json(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "poison.Tokenizer"]})
    assert type(load(at(copied)).model) is FalconForCausalLM
    edit_json(copied / "config.json", model_type="poisoned")
    with pytest.raises(LoadError):
        load(at(copied))
    assert not list(copied.rglob("RAN"))


def test_another_family_is_refused(copied):
    edit_json(copied / "config.json", model_type="llama")
    with pytest.raises(LoadError, match="family falcon, but its files say llama"):
        load(at(copied))


def test_an_unknown_precision_is_refused(checkpoint):
    with pytest.raises(WorkbookError, match="fp32, bf16, fp16, int8, nf4"):
        load(at(checkpoint), "int4")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LoadError, match=r"nothing does not exist. Check the path"):
        resolve(at(tmp_path / "nothing"))


def test_weights_that_were_not_placed_are_refused(checkpoint):
    model = load(at(checkpoint), options=LoadOptions(device_map={"": "disk"})).model
    found = problems(model, "cpu")
    assert found == problems(model, "auto") == problems(model, {"": "cpu"})
    assert found[0].startswith("19 weights not on the devices asked for: transformer.h.0.")
    assert "(meta)" in found[0]


@pytest.mark.parametrize(
    ("device_map", "wrong"),
    [
        ("cpu", 0),
        ("auto", 0),
        ("cuda", 19),
        ({"": 1}, 19),
        ({"": "cpu", "transformer.h.1": "cuda:0"}, 8),
        ({"transformer": "cpu", "transformer.h": 0}, 16),
        ({"transformer.h.1": "cpu"}, 11),
        ({"": "cpu", "transformer.h.1.mlp.dense_h": 0}, 0),
    ],
)
def test_devices_are_compared_with_the_map_by_longest_prefix(checkpoint, device_map, wrong):
    """Of 19 parameters, all on the CPU: 8 in each layer, the embeddings, and two of the last norm."""
    found = problems(load(at(checkpoint)).model, device_map)
    assert [problem.split(" weights")[0] for problem in found] == [str(wrong)] * (wrong > 0)


@pytest.mark.parametrize(
    ("device", "asked", "placed"),
    [
        (("cuda", 1), {"": 1}, True),
        (("cuda", 0), {"": 1}, False),
        (("cuda", 0), {"": 0}, True),
        (("cpu",), {"": 0}, False),
        (("cuda", 1), {"": "cuda:1"}, True),
        (("cuda", 1), "cuda", True),
        (("cuda", 2), {"transformer": 1, "transformer.h.1": 2}, True),
        (("cuda", 1), {"transformer": 1, "transformer.h.10": 2}, True),
        (("meta",), {"": 1, "transformer.h.1": "disk"}, True),
        (("meta",), {"": 1, "transformer.h.1": 0}, False),
    ],
)
def test_gpus_are_named_by_their_numbers(device, asked, placed):
    assert loading._is_placed("transformer.h.1.mlp.dense_h_to_4h.weight", torch.device(*device), asked) is placed


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_weight_of_another_type_is_named(checkpoint, precision):
    model = load(at(checkpoint), precision).model
    assert problems(model, "cpu", precision) == []
    model.transformer.ln_f.float()
    named = "2 weights not in bfloat16: transformer.ln_f.bias (float32), transformer.ln_f.weight (float32)"
    assert problems(model, "cpu", precision) == [named]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_is_used_where_there_is_one(checkpoint, precision):
    planned = models.device_map_for(models.config(at(checkpoint)), precision, machine.detect())
    loaded = load(at(checkpoint), precision)
    assert set(loaded.report.devices) == {f"cuda:{index}" for index in planned.values()}
    assert sum(loaded.report.devices.values()) == PARAMETERS
    assert loaded.report.quantized_layers == (8 if precision in ("int8", "nf4") else 0)


def test_a_damaged_quantization_stops_the_load(checkpoint, monkeypatch):
    original = quantization._verify_against_checkpoint

    def damaged(model, folder):
        model.transformer.h[0].self_attention.dense.weight.quant_state.absmax.mul_(3)
        return original(model, folder)

    monkeypatch.setattr(loading, "_verify_against_checkpoint", damaged)
    with pytest.raises(QuantizationError, match=r"dense.weight is not"):
        load(at(checkpoint), "nf4")


def test_a_load_that_quantizes_nothing_stops(checkpoint, monkeypatch):
    monkeypatch.setattr("helpers.models.workarounds.falcon_linear.needs_repair", lambda: False)
    with pytest.raises(QuantizationError, match="8 of 8 linear layers are not stored as nf4"):
        load(at(checkpoint), "nf4")


# Without a network


@pytest.fixture
def no_network(monkeypatch):
    """Any connection or name look-up fails, and no environment variable keeps the libraries from trying."""

    def refuse(*arguments, **options):
        raise AssertionError(f"asked the network: {arguments}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_models_of_the_project_load_without_a_network(checkpoint, no_network):
    for precision in ("bf16", "nf4"):
        load(at(checkpoint), precision)
    models.config(at(checkpoint))


# A model inside an installed package


@pytest.fixture(scope="module")
def packages(tmp_path_factory, write_gguf):
    """A folder for sys.path with a package that fails when imported and holds a GGUF file."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tiny_llama").mkdir()
    (folder / "tiny_llama" / "__init__.py").write_text("raise ImportError('needs a compiler')\n", encoding="utf-8")
    write_gguf(folder / "tiny_llama" / "tiny.gguf")
    return folder


PACKAGED = ModelRef(
    id="tests/tiny-llama", family="llama", format="chatml", source="package", file="tiny_llama/tiny.gguf"
)


@pytest.fixture
def cache(packages, tmp_path, monkeypatch):
    """An empty cache, and the package in reach."""
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("WORKBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a GGUF file is unpacked."""
    done, original = [], unpacking._unpack_gguf
    monkeypatch.setattr(unpacking, "_unpack_gguf", lambda *paths: (done.append(paths), original(*paths)))
    return done


def test_a_packaged_model_is_unpacked_once_and_equals_the_gguf(cache, builds, packages, no_network):
    first = load(PACKAGED)
    again = load(PACKAGED, "fp32")
    assert len(builds) == 1
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(packages / "tiny_llama", gguf_file="tiny.gguf", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    weights = exact.state_dict()
    assert weights.keys() == first.model.state_dict().keys() == again.model.state_dict().keys()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, weights[name].to(torch.bfloat16))
        assert torch.equal(again.model.state_dict()[name], tensor.float())
    assert torch.equal(logits(first.model), logits(rounded))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [resolve(PACKAGED).name]


def test_the_packaged_tokenizer_splits_digits_first_and_knows_its_context(cache):
    tokenizer = load(PACKAGED).tokenizer
    assert tokenizer.tokenize("a\n\n1  23") == ["a", "ĊĊ", "1", "ĠĠ", "2", "3"]
    assert tokenizer.model_max_length == 128
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_packaged_model_quantizes(cache, precision):
    loaded = load(PACKAGED, precision)
    assert (loaded.report.quantized_layers, loaded.report.linear_layers, loaded.report.repaired) == (7, 7, False)


def test_an_interrupted_build_is_not_used(cache, builds, monkeypatch):
    def interrupted(gguf_file, folder):
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "_unpack_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve(PACKAGED)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    assert load(PACKAGED).report.parameters > 0
    assert len(builds) == 1
    assert not list(cache.glob("*.partial"))


def test_a_disk_that_is_full_is_explained_and_nothing_half_done_is_used(cache, tmp_path):
    cache.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(cache)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(LoadError, match=rf"disk of {cache}.* is full. Free some space, or set WORKBOOK_CACHE to"):
            resolve(PACKAGED)
        assert {path.suffix for path in cache.iterdir()} <= {".partial", ".lock"}
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    assert load(PACKAGED).report.parameters > 0


def test_another_file_makes_another_cache(cache, builds, write_gguf, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "tiny_llama").mkdir(parents=True)
    (other / "tiny_llama" / "__init__.py").touch()
    write_gguf(other / "tiny_llama" / "tiny.gguf", seed=1)
    first = resolve(PACKAGED)
    monkeypatch.syspath_prepend(other)
    assert resolve(PACKAGED) != first
    assert len(builds) == 2


@pytest.mark.parametrize("file", ["no_such_package/a.gguf", "tiny_llama/other.gguf", "", None])
def test_a_package_that_is_not_installed_is_reported(cache, file):
    with pytest.raises(LoadError, match="Run `make setup`"):
        resolve(replace(PACKAGED, file=file))


BUILD = """
import sys, time
from helpers.models import finding, unpacking
from tests.unit.models.test_loading import PACKAGED
original = unpacking._unpack_gguf
def slow(*paths):
    print("built", flush=True)
    original(*paths)
unpacking._unpack_gguf = slow
print("ready", flush=True)
sys.stdin.readline()
print(finding.resolve(PACKAGED))
"""


@pytest.mark.slow
def test_of_two_processes_one_builds(cache, packages, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{ROOT}")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen([sys.executable, "-c", BUILD], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(len(words) for words in lines) == [1, 2]
    assert {words[-1] for words in lines} == {str(resolve(PACKAGED))}


def test_prepare_makes_every_model_ready_and_says_so(cache, builds, checkpoint, capsys):
    budgetless = {
        "requires": Requirement(),
        "budgets": {},
        "resident": (),
        "precision": "bf16",
        "precisions": ("bf16",),
    }
    falcon = at(checkpoint)
    prepare(Profile("tiny", "", falcon=falcon, falcon_chat=falcon, llama_chat=PACKAGED, **budgetless))
    assert len(builds) == 1
    said = capsys.readouterr().out
    assert said.count("ready, ") == 2
    assert "tiny-llama: ready, 0." in said


# What a person sees

CELL = """
import time
from helpers import models
from helpers.base import progress
from transformers.utils import logging
models.tidy_output()
for _ in logging.tqdm(range(5), desc="slow"): time.sleep(0.5)
for _ in logging.tqdm(range(5), desc="fast"): pass
with progress.waiting("Unpacking"): pass
"""


@pytest.mark.slow
def test_an_executed_notebook_keeps_one_line_a_bar_and_no_widgets():
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    notebook = NotebookClient(new_notebook(cells=[new_code_cell(CELL)]), timeout=120).execute()
    texts = [output["data"] for output in notebook.cells[0].outputs]
    assert [list(data) for data in texts] == [["text/plain"]] * 2
    assert texts[0]["text/plain"].startswith("slow: 100%|█")
    assert texts[1]["text/plain"] == "Unpacking: done"
    assert "widgets" not in notebook.metadata


def test_output_to_a_file_holds_no_bars(checkpoint, capfd):
    tidy_output()
    for precision in ("bf16", "int8"):
        logits(load(at(checkpoint), precision).model)
    logging.getLogger().handlers.clear()
    assert capfd.readouterr() == ("", "")


# Falcons that are built in another way


@pytest.mark.parametrize("precision", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("said", [False, True])
def test_a_falcon_with_a_head_of_its_own_keeps_it(tmp_path, precision, said):
    """E9: whether or not the configuration admits it (``said``: tie_word_embeddings is true nevertheless)."""
    config = FalconConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, bias=False, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    untied = FalconForCausalLM(config).eval()
    untied.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=said)
    loaded = load(at(tmp_path, format="plain"), precision)
    assert loaded.model.lm_head.weight is not loaded.model.transformer.word_embeddings.weight
    assert loaded.report.parameters == untied.num_parameters()
    if precision == "fp32":
        torch.testing.assert_close(logits(loaded.model), logits(untied), rtol=0, atol=1e-5)


def test_the_advice_for_falcon_s_old_configuration_makes_it_load(checkpoint, copied):
    """E10: config.json as it was before transformers 4.33, then changed word by word as the error says."""
    edit_json(copied / "config.json", model_type="RefinedWeb", auto_map={"AutoConfig": "configuration_RW.RWConfig"})
    fields = json.loads((copied / "config.json").read_text())
    for new, old in (
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("num_kv_heads", "n_head_kv"),
    ):
        fields[old] = fields.pop(new)
    del fields["new_decoder_architecture"]
    (copied / "config.json").write_text(json.dumps(fields))
    with pytest.raises(LoadError, match="model type RefinedWeb") as caught:
        load(at(copied))
    for old, new in re.findall(r"(n_\w+) to (num_\w+)", str(caught.value)):
        fields[new] = fields.pop(old)
    fields |= json.loads(f"{{{re.search(r'change the file: (.*?);', str(caught.value))[1]}}}")
    del fields["auto_map"]
    (copied / "config.json").write_text(json.dumps(fields))
    assert torch.equal(logits(load(at(copied)).model), logits(load(at(checkpoint)).model))


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [("cpu", {"cpu"}), (torch.device("cpu"), {"cpu"}), ({"": torch.device("cpu")}, {"cpu"}), ("disk", {"disk"})],
)
def test_a_device_may_be_named_in_any_way(checkpoint, device_map, devices):
    """E8."""
    loaded = load(at(checkpoint), options=LoadOptions(device_map=device_map))
    assert set(loaded.report.devices) == devices
    assert torch.equal(logits(loaded.model), logits(load(at(checkpoint)).model))
