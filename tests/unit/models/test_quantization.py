"""Quantization against bitsandbytes and bytes counted by hand; the proof against every way to fail it."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import models
from helpers.models import (
    LoadOptions,
    QuantizationError,
    bnb_config,
    layer_errors,
    load_profile,
    nf4_code,
    quantizable_layers,
    stored_bytes,
    verify_quantized,
)
from helpers.models.layers import _quantized_layers
from helpers.models.quantization import _dequantized_weight, _verify_against_checkpoint
from helpers.models.workarounds.falcon_linear import falcon_repair
from helpers.models.workarounds.nf4_repacking import _keep_unpacked, _was_repacked

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


def broken_by_one_layer_left_in_bf16(model):
    model.set_submodule(FIRST, falcon().to(torch.bfloat16).get_submodule(FIRST))


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
        for how in (broken_by_one_plain_layer, broken_by_one_layer_left_in_bf16, broken_by_transposition)
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
    assert 0.5 < _verify_against_checkpoint(model, checkpoint, layer) <= 1


def test_the_nf4_bound_is_half_the_codes_widest_gap(checkpoint):
    """-1 and -0.6961928 are the code's first two values (QLoRA, arXiv 2305.14314, appendix E)."""
    model = repaired_load(checkpoint, "nf4")
    source = load_file(checkpoint / "model.safetensors")[f"{FIRST}.weight"].float()
    packed, state = bnb.functional.quantize_4bit(source, blocksize=64, quant_type="nf4")
    error = (bnb.functional.dequantize_4bit(packed, state) - source).abs().view(-1, 64).amax(1)
    expected = (error / (source.abs().view(-1, 64).amax(1) * (1 - 0.6961928) / 2)).max().item()
    assert _verify_against_checkpoint(model, checkpoint, FIRST) == pytest.approx(expected, rel=2e-3)


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
        _verify_against_checkpoint(model, checkpoint, FIRST)


def test_another_checkpoint_is_found_out(checkpoint, tmp_path):
    weights = {name: tensor.flip(0) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError):
        _verify_against_checkpoint(repaired_load(checkpoint, "nf4"), tmp_path)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_proofs_run_no_forward_pass_and_change_nothing(checkpoint, precision):
    model, calls = repaired_load(checkpoint, precision), []
    for module in model.modules():
        module.register_forward_hook(lambda *arguments: calls.append(arguments))
    before = copy.deepcopy(dict(model.state_dict()))
    verify_quantized(model, precision)
    for layer in LAYERS:
        _verify_against_checkpoint(model, checkpoint, layer)
    after = model.state_dict()
    assert not calls
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_checkpoint_quantized_before_must_hold_the_same_bytes(checkpoint, precision, tmp_path):
    repaired_load(checkpoint, precision).save_pretrained(tmp_path)
    model = repaired_load(tmp_path, precision)
    verify_quantized(model, precision)
    assert _verify_against_checkpoint(model, tmp_path, FIRST) == 0
    tampered_byte(model.get_submodule(FIRST).weight)
    with pytest.raises(QuantizationError):
        _verify_against_checkpoint(model, tmp_path, FIRST)


# Repacking on CPUs with AVX512_BF16


packs = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU does not repack 4-bit weights")


def test_kept_unpacked_weights_survive_a_forward_pass(checkpoint):
    model = repaired_load(checkpoint, "nf4")
    _keep_unpacked(model)
    before = model.get_submodule(FIRST).weight.data.clone()
    logits(model)
    assert torch.equal(model.get_submodule(FIRST).weight.data, before)
    assert _verify_against_checkpoint(model, checkpoint, FIRST) <= 1


@packs
def test_repacked_weights_are_not_judged(checkpoint):
    model = repaired_load(checkpoint, "nf4")
    logits(model)
    with pytest.raises(QuantizationError, match="repacked by a forward pass"):
        _verify_against_checkpoint(model, checkpoint, FIRST)


# Configurations


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


@pytest.fixture(scope="module")
def mini():
    """falcon-mini in bf16."""
    return models.load(load_profile().falcon, "bf16")


# The codebook, and errors layer by layer


def test_the_codebook_is_the_published_one():
    """QLoRA, arXiv 2305.14314, appendix E."""
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1.0]
    assert nf4_code() == pytest.approx(published, abs=2e-7)
    assert bnb.functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(published, abs=0)


@pytest.mark.parametrize("options", [{"precision": "nf4"}, {"precision": "nf4", "double_quant": True}])
def test_dequantized_nf4_is_bitsandbytes(checkpoint, options):
    weight = repaired_load(checkpoint, **options).get_submodule(FIRST).weight
    module = repaired_load(checkpoint, **options).get_submodule(FIRST)
    ours, theirs = _dequantized_weight(module), bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.to(torch.bfloat16), theirs)


def test_dequantized_int8_is_the_same_before_and_after_a_forward_pass(checkpoint):
    model = repaired_load(checkpoint, "int8")
    before = _dequantized_weight(model.get_submodule(FIRST))
    source = load_file(checkpoint / "model.safetensors")[f"{FIRST}.weight"].float()
    assert ((before - source).abs() <= source.abs().amax(1, keepdim=True) * 0.51 / 127).all()
    logits(model)
    assert torch.equal(_dequantized_weight(model.get_submodule(FIRST)), before)
    assert torch.equal(_dequantized_weight(plain_load(checkpoint).get_submodule(FIRST)), source)


@packs
def test_a_repacked_weight_is_not_dequantized(checkpoint):
    model = repaired_load(checkpoint, "nf4")
    assert not _was_repacked(model)
    logits(model)
    assert _was_repacked(model)
    with pytest.raises(QuantizationError, match="unpacked=True"):
        _dequantized_weight(model.get_submodule(FIRST))


def test_layer_errors_are_those_of_each_layer_alone(checkpoint):
    """Against a product of bitsandbytes' dequantized weight with inputs seen by a hook of the test's own."""
    reference, model, seen = plain_load(checkpoint), repaired_load(checkpoint, "nf4"), {}
    name = LAYERS[-1]
    layer = reference.get_submodule(name)
    layer.register_forward_hook(lambda module, given, output: seen.update(x=given[0].clone()))
    rows = layer_errors(reference, model, IDS)
    assert [row.layer for row in rows] == LAYERS
    source = layer.weight.float()
    restored = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(source, quant_type="nf4"))
    assert rows[-1].weight == pytest.approx(((restored - source).norm() / source.norm()).item(), rel=1e-4)
    exact, wrong = seen["x"].float() @ source.T, seen["x"].float() @ restored.T
    assert rows[-1].output == pytest.approx(((wrong - exact).norm() / exact.norm()).item(), rel=0.05)
    assert rows[-1].outliers == int((seen["x"].abs() >= 6).any(1).sum())
    assert rows[-1].columns == 256


def test_layer_errors_of_a_model_against_itself_are_those_of_rounding(checkpoint):
    exact, rounded = (plain_load(checkpoint, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for row in layer_errors(exact, exact, IDS):
        assert row.weight == 0
        assert row.output < 1e-6
    for row in layer_errors(rounded, rounded, IDS):
        assert row.weight == 0
        assert 1e-4 < row.output < 2**-8  # half a step of bfloat16 is 2^-9 at most


def test_layer_errors_leave_no_hook_behind_after_a_failure(checkpoint):
    model = plain_load(checkpoint)
    with pytest.raises(IndexError):
        layer_errors(model, model, IDS + 1000)
    assert not any(module._forward_pre_hooks for module in model.modules())


# Saving and loading again


@pytest.mark.parametrize(
    ("precision", "options"),
    [("int8", LoadOptions()), ("nf4", LoadOptions()), ("nf4", LoadOptions(double_quant=True))],
)
def test_a_saved_model_is_loaded_with_the_same_logits(mini, tmp_path, precision, options, recwarn):
    small = models.load(mini.ref, precision, options=options)
    ref = models.save(small, tmp_path / "small")
    again = models.load(ref, precision)
    verify_quantized(again.model, precision)
    assert again.report.quantized_layers == again.report.linear_layers == 32
    assert again.report.stored_bytes == small.report.stored_bytes
    assert torch.equal(logits(again.model), logits(small.model))
    assert again.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert not [one for one in recwarn if "quantization_config" in str(one.message)]


def test_an_unquantized_model_is_saved_too(mini, tmp_path):
    ref = models.save(mini, tmp_path / "copy")
    assert ref.stand_in_for == mini.ref.stand_in_for
    assert torch.equal(logits(models.load(ref, "bf16").model), logits(mini.model))
    assert models.load(ref, "nf4").report.quantized_layers == 32


def test_a_saved_model_is_loaded_in_its_precision_only(mini, tmp_path):
    ref = models.save(models.load(mini.ref, "int8"), tmp_path)
    for precision in ("bf16", "nf4"):
        with pytest.raises(models.LoadError, match="already quantized, and not to"):
            models.load(ref, precision)


@packs
def test_nf4_weights_that_have_run_are_not_saved(mini, tmp_path):
    small = models.load(mini.ref, "nf4")
    logits(small.model)
    with pytest.raises(QuantizationError, match=r"Save it before its first forward pass"):
        models.save(small, tmp_path)
    kept = models.load(mini.ref, "nf4", unpacked=True)
    before = logits(kept.model)
    again = models.load(models.save(kept, tmp_path), "nf4", unpacked=True)
    assert torch.equal(logits(again.model), before)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_plain_reloading_still_falls_into_the_hole(mini, tmp_path, precision):
    """Notebook 02 says that an int8 checkpoint loads without an error and fails at its first use, and nf4 raises."""
    models.save(models.load(mini.ref, precision), tmp_path)
    if precision == "nf4":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        return
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    assert _quantized_layers(model) == []
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(model)
