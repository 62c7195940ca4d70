"""Falcon's linear layers: transformers leaves them unquantized, the repair changes nothing else."""

import threading

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.falcon import modeling_falcon

from helpers.models import QuantizationError, bnb_config, quantizable_layers, verify_quantized
from helpers.models.layers import _quantized_layers
from helpers.models.workarounds.falcon_linear import falcon_repair, needs_repair

LAYERS = [
    f"transformer.h.{block}.{name}"
    for block in range(2)
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]


def plain_load(folder, precision="bf16", dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=bnb_config(precision), device_map="cpu"
    )


def repaired_load(folder, precision):
    with falcon_repair():
        return plain_load(folder, precision)


def test_transformers_still_needs_the_repair():
    assert needs_repair(), (
        "transformers quantizes Falcon's layers by itself again. Delete helpers/models/workarounds/falcon_linear.py "
        "and this file, LoadReport.repaired, and notebook 02's section on the silent failure."
    )


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_plain_load_quantizes_nothing_and_is_found_out(checkpoint, logits, precision):
    model = plain_load(checkpoint, precision)
    assert model.is_quantized
    assert torch.equal(logits(model), logits(plain_load(checkpoint)))
    with pytest.raises(QuantizationError, match=f"8 of 8 linear layers are not stored as {precision}") as error:
        verify_quantized(model, precision)
    assert all(name in str(error.value) for name in LAYERS[:3])
    assert "FalconLinear" in str(error.value)
    assert "5 more" in str(error.value)


@pytest.mark.parametrize(("precision", "kind"), [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_repaired_load_quantizes_every_linear_layer(checkpoint, logits, precision, kind):
    model = repaired_load(checkpoint, precision)
    assert [name for name, module in model.named_modules() if isinstance(module, kind)] == LAYERS
    assert _quantized_layers(model) == quantizable_layers(model) == LAYERS
    verify_quantized(model, precision)
    assert not torch.equal(logits(model), logits(plain_load(checkpoint)))
    verify_quantized(model, precision)  # also after a forward pass, which may repack 4-bit weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repair_leaves_logits_identical(checkpoint, logits, dtype):
    with falcon_repair() as needed:
        repaired = plain_load(checkpoint, dtype=dtype)
    plain = plain_load(checkpoint, dtype=dtype)
    assert needed
    assert type(plain.get_submodule(LAYERS[0])) is not type(repaired.get_submodule(LAYERS[0])) is torch.nn.Linear
    assert torch.equal(logits(repaired), logits(plain))


def test_repair_ends_with_the_block_also_after_an_exception():
    original = modeling_falcon.FalconLinear
    with falcon_repair():
        assert modeling_falcon.FalconLinear is torch.nn.Linear
        with falcon_repair() as needed_within:
            assert not needed_within
        assert modeling_falcon.FalconLinear is torch.nn.Linear
    assert modeling_falcon.FalconLinear is original
    with pytest.raises(KeyboardInterrupt), falcon_repair():
        raise KeyboardInterrupt
    assert modeling_falcon.FalconLinear is original


def test_repair_is_not_applied_where_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)
    assert not needs_repair()
    with falcon_repair() as needed:
        assert not needed


def test_repair_admits_one_thread_at_a_time():
    order = []

    def other():
        with falcon_repair() as needed:
            order.append(("other", needed))

    with falcon_repair():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", ("other", True)]
