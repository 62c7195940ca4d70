"""Quantization against bitsandbytes and bytes counted by hand; the proof against every way to fail it."""

import copy
import logging
import threading

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.falcon import modeling_falcon

from helpers import quantization
from helpers.quantization import (
    QuantizationError,
    bnb_config,
    falcon_repair,
    keep_unpacked,
    needs_repair,
    quantizable_layers,
    quantized_layers,
    quiet_bitsandbytes,
    stored_bytes,
    verify_against_checkpoint,
    verify_quantized,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = [
    f"transformer.h.{block}.{name}"
    for block in range(2)
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
IDS = torch.tensor([[5, 9, 2, 77, 3]])
FIRST = LAYERS[0]


def falcon(**changes) -> FalconForCausalLM:
    """A random Falcon of 180B's flags: hidden 64, 2 layers, 4 query and 2 key-value heads of 16, vocabulary 256."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    config = FalconConfig(
        new_decoder_architecture=True, num_ln_in_parallel_attn=2, alibi=False, bias=False, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3, **{**sizes, **changes},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FalconForCausalLM(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("falcon")
    falcon().to(torch.bfloat16).save_pretrained(folder)
    return folder


def plain_load(folder, precision="bf16", dtype=torch.bfloat16, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=bnb_config(precision, **options), device_map="cpu"
    )


def repaired_load(folder, precision, **options):
    with falcon_repair():
        return plain_load(folder, precision, **options)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


# The repair


def test_upstream_needs_the_repair():
    assert needs_repair(), (
        "transformers quantizes Falcon's layers by itself again. Delete falcon_repair, needs_repair and their tests, "
        "LoadReport.repaired, and notebook 02's section on the silent failure."
    )


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_plain_load_quantizes_nothing_and_is_found_out(checkpoint, precision):
    model = plain_load(checkpoint, precision)
    assert model.is_quantized
    assert torch.equal(logits(model), logits(plain_load(checkpoint)))
    with pytest.raises(QuantizationError, match=f"8 of 8 linear layers are not stored as {precision}") as error:
        verify_quantized(model, precision)
    assert all(name in str(error.value) for name in LAYERS[:3])
    assert "FalconLinear" in str(error.value)
    assert "5 more" in str(error.value)


@pytest.mark.parametrize(("precision", "kind"), [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_repaired_load_quantizes_every_linear_layer(checkpoint, precision, kind):
    model = repaired_load(checkpoint, precision)
    assert [name for name, module in model.named_modules() if isinstance(module, kind)] == LAYERS
    assert quantized_layers(model) == quantizable_layers(model) == LAYERS
    verify_quantized(model, precision)
    assert not torch.equal(logits(model), logits(plain_load(checkpoint)))
    verify_quantized(model, precision)  # also after a forward pass, which may repack 4-bit weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repair_leaves_logits_identical(checkpoint, dtype):
    with falcon_repair() as needed:
        repaired = plain_load(checkpoint, dtype=dtype)
    plain = plain_load(checkpoint, dtype=dtype)
    assert needed
    assert type(plain.get_submodule(FIRST)) is not type(repaired.get_submodule(FIRST)) is torch.nn.Linear
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


# Which layers, how many bytes


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_stays_unquantized(tied):
    assert quantizable_layers(falcon(tie_word_embeddings=tied)) == LAYERS


def test_quantizable_layers_of_llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert quantizable_layers(LlamaForCausalLM(config)) == [f"model.layers.0.{name}" for name in names]


# By hand, of falcon(): each layer has 8192 + 4096 + 16384 + 16384 linear weights in 128 + 64 + 256 + 64 rows.
LINEAR, ROWS, REST = 2 * 45056, 2 * 512, 256 * 64 + 2 * 4 * 64 + 2 * 64
HAND_COUNTED = {
    "bf16": 2 * (LINEAR + REST),
    "int8": LINEAR + 4 * ROWS + 2 * REST,
    # half a byte a weight, a 4-byte scale for 64 weights, 16 code values a layer
    "nf4": LINEAR // 2 + LINEAR // 64 * 4 + 8 * 16 * 4 + 2 * REST,
    # scales of 1 byte, and for each layer one 4-byte scale of theirs, 256 code values, one offset
    "nf4, double": LINEAR // 2 + LINEAR // 64 + 8 * (16 * 4 + 4 + 256 * 4 + 4) + 2 * REST,
}


@pytest.mark.parametrize("name", HAND_COUNTED)
def test_stored_bytes_are_those_counted_by_hand(checkpoint, name):
    model = repaired_load(checkpoint, name.split(",")[0], **({"double_quant": True} if "double" in name else {}))
    assert stored_bytes(model) == HAND_COUNTED[name]
    if name != "bf16":
        verify_quantized(model, name.split(",")[0])


def test_stored_bytes_count_tied_weights_once():
    tied, untied = falcon(), falcon(tie_word_embeddings=False)
    assert stored_bytes(untied) - stored_bytes(tied) == 256 * 64 * 4


def test_stored_bytes_of_int8_are_the_same_after_a_forward_pass(checkpoint):
    model = repaired_load(checkpoint, "int8")
    logits(model)
    assert stored_bytes(model) == HAND_COUNTED["int8"]


# The structural proof


def broken_by_one_plain_layer(model):
    model.set_submodule(FIRST, torch.nn.Linear(64, 128, bias=False))


def broken_by_fp4(model):
    model.get_submodule(FIRST).weight.quant_state.quant_type = "fp4"


def broken_by_missing_state(model):
    model.get_submodule(FIRST).weight.quant_state = None


def broken_by_half_the_bytes(model):
    weight = model.get_submodule(FIRST).weight
    weight.data = weight.data[: len(weight.data) // 2]


def broken_by_transposition(model):
    weight = model.get_submodule(FIRST).weight
    if weight.dtype == torch.uint8:
        weight.quant_state.shape = torch.Size([64, 128])
    else:
        weight.data = weight.data.T


def broken_by_missing_scales(model):
    state = model.get_submodule(FIRST).weight.quant_state
    state.absmax = state.absmax[1:]


def broken_by_other_storage(model):
    weight = model.get_submodule(FIRST).weight
    weight.data = weight.data.to(torch.int32 if weight.dtype == torch.uint8 else torch.float16)


def broken_by_meta(model):
    layer = type(model.get_submodule(FIRST))
    model.set_submodule(FIRST, layer(64, 128, bias=False, device="meta"))


def broken_by_missing_row_scales(model):
    model.get_submodule(FIRST).weight.SCB = None


def broken_by_fewer_row_scales(model):
    weight = model.get_submodule(FIRST).weight
    weight.SCB = weight.SCB[1:]


BROKEN = [
    *[("nf4", how) for how in (broken_by_fp4, broken_by_missing_state, broken_by_half_the_bytes)],
    *[("nf4", how) for how in (broken_by_missing_scales, broken_by_other_storage, broken_by_meta)],
    *[
        (precision, how)
        for precision in ("nf4", "int8")
        for how in (broken_by_one_plain_layer, broken_by_transposition)
    ],
    *[("int8", how) for how in (broken_by_half_the_bytes, broken_by_other_storage)],
    *[("int8", how) for how in (broken_by_meta, broken_by_missing_row_scales, broken_by_fewer_row_scales)],
]


@pytest.mark.parametrize(("precision", "breaks"), BROKEN)
def test_one_wrong_layer_is_found_and_named(checkpoint, precision, breaks):
    model = repaired_load(checkpoint, precision)
    breaks(model)
    with pytest.raises(QuantizationError, match=f"1 of 8 .*\n  {FIRST}: "):
        verify_quantized(model, precision)


@pytest.mark.parametrize(("stored", "asked"), [("nf4", "int8"), ("int8", "nf4")])
def test_one_format_is_not_taken_for_the_other(checkpoint, stored, asked):
    with pytest.raises(QuantizationError, match="8 of 8"):
        verify_quantized(repaired_load(checkpoint, stored), asked)


def test_a_model_without_linear_layers_proves_nothing():
    with pytest.raises(QuantizationError, match="0 of 0"):
        verify_quantized(falcon(num_hidden_layers=0), "nf4")


def test_precisions_that_do_not_quantize_are_refused():
    with pytest.raises(ValueError, match="int8, nf4"):
        verify_quantized(falcon(), "bf16")


# The proof against the checkpoint


@pytest.mark.parametrize(
    "options", [{"precision": "nf4"}, {"precision": "nf4", "double_quant": True}, {"precision": "int8"}]
)
@pytest.mark.parametrize("layer", [None, *LAYERS[:4]])
def test_weights_are_the_checkpoints_within_the_formats_error(checkpoint, options, layer):
    model = repaired_load(checkpoint, **options)
    assert 0.5 < verify_against_checkpoint(model, checkpoint, layer) <= 1


def test_the_nf4_bound_is_half_the_codes_widest_gap(checkpoint):
    """-1 and -0.6961928 are the code's first two values (QLoRA, arXiv 2305.14314, appendix E)."""
    model = repaired_load(checkpoint, "nf4")
    source = load_file(checkpoint / "model.safetensors")[f"{FIRST}.weight"].float()
    packed, state = bnb.functional.quantize_4bit(source, blocksize=64, quant_type="nf4")
    error = (bnb.functional.dequantize_4bit(packed, state) - source).abs().view(-1, 64).amax(1)
    expected = (error / (source.abs().view(-1, 64).amax(1) * (1 - 0.6961928) / 2)).max().item()
    assert verify_against_checkpoint(model, checkpoint, FIRST) == pytest.approx(expected, rel=2e-3)


def tampered_byte(weight):
    weight.data[3] ^= 0x80 if weight.dtype == torch.uint8 else 0x40


def tampered_scale(weight):
    scales = weight.quant_state.absmax if weight.dtype == torch.uint8 else weight.SCB
    scales[0] *= 2


def tampered_with_nan(weight):
    scales = weight.quant_state.absmax if weight.dtype == torch.uint8 else weight.SCB
    scales[0] = float("nan")


def tampered_by_swapped_rows(weight):
    weight.data = weight.data.roll(64, 0)


@pytest.mark.parametrize("tamper", [tampered_byte, tampered_scale, tampered_with_nan, tampered_by_swapped_rows])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_tampered_weight_is_found(checkpoint, precision, tamper):
    model = repaired_load(checkpoint, precision)
    tamper(model.get_submodule(FIRST).weight)
    verify_quantized(model, precision)
    with pytest.raises(QuantizationError, match=rf"{FIRST}.weight is not .* times what quantization allows"):
        verify_against_checkpoint(model, checkpoint, FIRST)


def test_another_checkpoint_is_found_out(checkpoint, tmp_path):
    weights = {name: tensor.flip(0) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError):
        verify_against_checkpoint(repaired_load(checkpoint, "nf4"), tmp_path)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_proofs_run_no_forward_pass_and_change_nothing(checkpoint, precision):
    model, calls = repaired_load(checkpoint, precision), []
    for module in model.modules():
        module.register_forward_hook(lambda *arguments: calls.append(arguments))
    before = copy.deepcopy(dict(model.state_dict()))
    verify_quantized(model, precision)
    for layer in LAYERS:
        verify_against_checkpoint(model, checkpoint, layer)
    after = model.state_dict()
    assert not calls
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_checkpoint_quantized_before_must_hold_the_same_bytes(checkpoint, precision, tmp_path):
    repaired_load(checkpoint, precision).save_pretrained(tmp_path)
    model = repaired_load(tmp_path, precision)
    verify_quantized(model, precision)
    assert verify_against_checkpoint(model, tmp_path, FIRST) == 0
    tampered_byte(model.get_submodule(FIRST).weight)
    with pytest.raises(QuantizationError):
        verify_against_checkpoint(model, tmp_path, FIRST)


# Repacking on CPUs with AVX512_BF16


packs = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU does not repack 4-bit weights")


def test_kept_unpacked_weights_survive_a_forward_pass(checkpoint):
    model = repaired_load(checkpoint, "nf4")
    keep_unpacked(model)
    before = model.get_submodule(FIRST).weight.data.clone()
    logits(model)
    assert torch.equal(model.get_submodule(FIRST).weight.data, before)
    assert verify_against_checkpoint(model, checkpoint, FIRST) <= 1


@packs
def test_repacked_weights_are_not_judged(checkpoint):
    model = repaired_load(checkpoint, "nf4")
    logits(model)
    with pytest.raises(QuantizationError, match="repacked by a forward pass"):
        verify_against_checkpoint(model, checkpoint, FIRST)


# Configurations and noise


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_configuration_where_nothing_is_quantized(precision):
    assert bnb_config(precision) is None


def test_configurations_are_the_documented_ones():
    nf4, int8 = bnb_config("nf4"), bnb_config("int8")
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", False)
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16
    assert (int8.load_in_8bit, int8.llm_int8_threshold) == (True, 6.0)
    other = bnb_config("nf4", torch.float32, double_quant=True)
    assert (other.bnb_4bit_compute_dtype, other.bnb_4bit_use_double_quant) == (torch.float32, True)


def test_known_noise_is_dropped_and_the_rest_is_not(checkpoint, caplog):
    quiet_bitsandbytes()
    quiet_bitsandbytes()
    logits(repaired_load(checkpoint, "int8"))
    assert "MatMul8bitLt" not in caplog.text
    for name in quantization._KNOWN_NOISE:
        assert logging.getLogger(name).filters.count(quantization._not_known_noise) == 1
        logging.getLogger(name).warning("something new")
    assert caplog.text.count("something new") == 2
