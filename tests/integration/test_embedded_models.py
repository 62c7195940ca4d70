"""The laptop profile's real models: whole, provably quantized, offline, and equal to what was published."""

import copy
import os
import subprocess
import sys
import time

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.base import PRECISIONS
from helpers.base.files import ROOT
from helpers.models import (
    QuantizationError,
    bnb_config,
    load,
    load_profile,
    quantizable_layers,
    report_table,
    resolve,
    verify_quantized,
)
from helpers.models.quantization import _verify_against_checkpoint
from helpers.models.unpacking import packaged_file
from helpers.models.workarounds.falcon_linear import falcon_repair

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = load_profile("laptop").models
FALCONS = ("falcon", "falcon_chat")
# Counted by hand. falcon-mini: 8 layers, hidden 256, 4 query and 2 key-value heads of 64, vocabulary 4096.
# SmolLM2-135M: 30 layers, hidden 576, 9 query and 3 key-value heads of 64, MLP 1536, vocabulary 49152.
FALCON_LINEAR = 8 * (256 * 512 + 256 * 256 + 2 * 256 * 1024)
FALCON_ROWS = 8 * (512 + 256 + 1024 + 256)
FALCON_REST = 4096 * 256 + 8 * 4 * 256 + 2 * 256
SMOL_LINEAR = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
SMOL_ROWS = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)
SMOL_REST = 49152 * 576 + 61 * 576


def by_hand(linear: int, rows: int, rest: int, layers: int) -> dict[str, int]:
    """Bytes by precision: nf4 has a 4-byte scale for 64 weights and a table of 16 a layer, int8 a scale a row."""
    return {
        "fp32": 4 * (linear + rest),
        "bf16": 2 * (linear + rest),
        "fp16": 2 * (linear + rest),
        "int8": linear + 4 * rows + 2 * rest,
        "nf4": linear // 2 + linear // 64 * 4 + layers * 16 * 4 + 2 * rest,
    }


FALCON_BYTES = by_hand(FALCON_LINEAR, FALCON_ROWS, FALCON_REST, 32)
SMOL_BYTES = by_hand(SMOL_LINEAR, SMOL_ROWS, SMOL_REST, 210)


def logits(model, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits.float()


def ids_of(loaded, text="Once upon a time there was a little girl who") -> torch.Tensor:
    return loaded.tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("role", FALCONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_falcon_mini_loads_whole_in_every_precision(role, precision):
    loaded = load(MODELS[role], precision)
    report, quantized = loaded.report, precision in ("int8", "nf4")
    assert (report.parameters, report.stored_bytes) == (FALCON_LINEAR + FALCON_REST, FALCON_BYTES[precision])
    assert (report.linear_layers, report.quantized_layers, report.repaired) == (32, 32 * quantized, quantized)
    assert "stand-in for tiiuae/falcon-180B" in report_table(loaded).to_string()
    if quantized:
        verify_quantized(loaded.model, precision)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_falcon_mini_as_transformers_loads_it_is_not_quantized(precision):
    plain = AutoModelForCausalLM.from_pretrained(
        resolve(MODELS["falcon"]), quantization_config=bnb_config(precision), dtype=torch.bfloat16
    )
    with pytest.raises(
        QuantizationError, match=r"32 of 32 .*\n  transformer.h.0.self_attention.query_key_value: Falcon"
    ):
        verify_quantized(plain, precision)


@pytest.mark.parametrize("role", FALCONS)
def test_the_repair_leaves_falcon_minis_logits_identical(role):
    loaded = load(MODELS[role], "fp32")
    with falcon_repair():
        repaired = AutoModelForCausalLM.from_pretrained(resolve(MODELS[role]), dtype=torch.float32)
    assert torch.equal(logits(loaded.model, ids_of(loaded)), logits(repaired, ids_of(loaded)))


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.05), ("int8", 0.15), ("nf4", 0.5)])
def test_quantized_falcon_mini_stays_near_the_original(precision, most):
    exact, loaded = load(MODELS["falcon"], "fp32"), load(MODELS["falcon"], precision)
    expected, found = (logits(model.model, ids_of(exact)) for model in (exact, loaded))
    assert 0 < ((found - expected).norm() / expected.norm()).item() < most


def test_every_weight_of_falcon_mini_is_the_checkpoints():
    for precision in ("nf4", "int8"):
        model = load(MODELS["falcon"], precision).model
        shares = [
            _verify_against_checkpoint(model, resolve(MODELS["falcon"]), name) for name in quantizable_layers(model)
        ]
        assert len(shares) == 32
        assert max(shares) <= 1


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 in bf16: shared, not to be changed."""
    return load(MODELS["llama_chat"], "bf16")


@pytest.mark.slow
def test_smollm2_equals_its_published_file(smollm2):
    """The copy in the cache holds the GGUF file's weights, and gives the logits that transformers reads from it."""
    cached = smollm2
    file = packaged_file(MODELS["llama_chat"])
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    weights = direct.state_dict()
    assert cached.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in cached.model.state_dict().items())
    assert torch.equal(logits(cached.model, ids_of(cached)), logits(direct, ids_of(cached)))


def dequantized(layer) -> torch.Tensor:
    """A layer's weight through bitsandbytes' own functions."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).to(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.3), ("nf4", 0.1)])
def test_smollm2_quantizes_whole_and_computes_with_the_quantized_weights(precision, most, smollm2):
    """Beside a dense model with the dequantized weights; int8 also rounds what goes into each layer."""
    loaded, dense, ids = load(MODELS["llama_chat"], precision), copy.deepcopy(smollm2.model), ids_of(smollm2)
    report, original = loaded.report, logits(dense, ids)
    assert (report.parameters, report.stored_bytes) == (SMOL_LINEAR + SMOL_REST, SMOL_BYTES[precision])
    assert (report.linear_layers, report.quantized_layers, report.repaired) == (210, 210, False)
    for name in quantizable_layers(dense):
        dense.get_submodule(name).weight.data = dequantized(loaded.model.get_submodule(name))
    expected, found = (logits(model, ids) for model in (dense, loaded.model))
    assert ((found - expected).norm() / expected.norm()).item() < most
    assert not torch.equal(found, original)


@pytest.mark.slow
def test_smollm2_answers_and_stops_at_its_end_token(smollm2):
    loaded = smollm2
    assert (loaded.report.parameters, loaded.report.stored_bytes) == (SMOL_LINEAR + SMOL_REST, SMOL_BYTES["bf16"])
    text = loaded.format.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = loaded.tokenizer(text, return_tensors="pt")
    reply = loaded.model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(reply)
    assert loaded.tokenizer.decode(reply[-1]) == "<|im_end|>" == loaded.tokenizer.eos_token


def test_smollm2_renders_chatml_as_its_own_template(smollm2):
    loaded = smollm2
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    own = loaded.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert loaded.format.render(talk) == own
    assert len(loaded.tokenizer("<|im_start|>user")["input_ids"]) == 2


@pytest.mark.usefixtures("smollm2")  # loaded once already
def test_smollm2_loads_in_under_a_second_once_it_is_prepared():
    """Seconds of processor time, on one thread: a busy machine changes nothing."""
    started = time.process_time()
    load(MODELS["llama_chat"])
    assert time.process_time() - started < 1


OFFLINE = """
import socket
def refuse(*arguments, **options):
    raise AssertionError(f"asked the network: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
from helpers.models import config, load, load_profile
for ref in load_profile("laptop").models.values():
    config(ref)
    print(load(ref).report.parameters)
print(load(ref, "bf16").tokenizer.eos_token)
"""


@pytest.mark.slow
def test_every_model_loads_without_a_network_and_without_noise():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [*[str(FALCON_LINEAR + FALCON_REST)] * 2, "134515008", "<|im_end|>"]
    assert done.stderr == ""
