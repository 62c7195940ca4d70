"""The rules that notebook 02 shows, against bitsandbytes bit for bit."""

import bitsandbytes as bnb
import pytest
import torch

from helpers import models
from helpers.models import load_profile, quantizable_layers, quantization_by_hand
from helpers.models import quantization_by_hand as by_hand

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weight():
    return torch.randn(192, 384, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) / 10


@pytest.fixture(scope="module")
def mini():
    """falcon-mini in bf16."""
    return models.load(load_profile().falcon, "bf16")


def drawn(*shape, spread=0.02, seed=0, tails=False):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return ((values**3 if tails else values) * spread).to(torch.bfloat16)


MATRICES = {
    "normal": drawn(96, 128),
    "heavy tails": drawn(64, 256, tails=True),
    "large values": drawn(32, 64, spread=40.0),
    "one row": drawn(1, 64),
}
matrices = pytest.mark.parametrize("weight", MATRICES.values(), ids=MATRICES.keys())


@matrices
def test_nf4_by_hand_is_bitsandbytes(weight):
    packed, scales = models.nf4(weight, bnb.functional.get_4bit_type("nf4", device="cpu"))
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs)
    assert torch.equal(scales, state.absmax)


def test_all_of_falcon_mini_by_hand_is_bitsandbytes(mini):
    """nf4 codes and scales, both levels of double quantization, int8 codes and scales: 32 matrices, bit for bit."""
    for name in quantizable_layers(mini.model):
        weight = mini.model.get_submodule(name).weight.detach()
        theirs, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed, scales = models.nf4(weight, state.code)
        codes, largest, mean = models.double_quantized(scales, state.state2.code)
        assert torch.equal(packed, theirs), name
        assert torch.equal(codes, state.absmax), name
        assert torch.equal(largest, state.state2.absmax), name
        assert torch.equal(mean, state.offset), name
        ours = models.absmax_int8(weight.half().float())
        for mine, other in zip(ours, bnb.functional.int8_vectorwise_quant(weight.half())[:2], strict=True):
            assert torch.equal(mine, other), name


def test_without_the_table_of_places_some_scales_of_scales_differ(mini):
    differing = total = 0
    for name in quantizable_layers(mini.model):
        weight = mini.model.get_submodule(name).weight.detach()
        _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        scales = weight.float().view(-1, 64).abs().amax(1)
        plain, _, _ = models.double_quantized(scales, state.state2.code, table=0)
        differing, total = differing + (plain != state.absmax).sum().item(), total + len(plain)
    assert 0 < differing < total / 100


@matrices
@pytest.mark.parametrize("outliers", [0, 3])
def test_the_int8_product_by_hand_is_bitsandbytes(weight, outliers):
    x = drawn(9, weight.shape[1], spread=1.0, seed=1)
    x[2:5, 7 : 7 + outliers] = torch.tensor([6.0, -50.0, 7.5], dtype=x.dtype)[:outliers]
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=6.0).eval()
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    with torch.inference_mode():
        theirs = layer(x.clone())
    product = models.int8_product
    assert torch.equal(product(x, weight), theirs)
    if outliers:
        exact = x.float() @ weight.float().T
        errors = [(product(x, weight, threshold).float() - exact).norm() for threshold in (6.0, 1e9)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("broken", [None, "absmax_int8", "int8_product"])
def test_int8_is_compared_with_bitsandbytes(weight, monkeypatch, broken):
    x = torch.randn(20, 384, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if broken:
        rule = getattr(by_hand, broken)
        wrong = (
            (lambda *given: rule(*given) * 2) if broken == "int8_product" else (lambda m: (rule(m)[0] + 1, rule(m)[1]))
        )
        monkeypatch.setattr(by_hand, broken, wrong)
    assert models.int8_equals_bitsandbytes(weight, x) == (broken is None)


def test_nf4_and_its_scales_are_compared_with_bitsandbytes(weight, monkeypatch):
    assert models.nf4_equals_bitsandbytes(weight)
    assert quantization_by_hand._double_quantization_equals_bitsandbytes(weight)
    rule = models.nf4
    monkeypatch.setattr(quantization_by_hand, "nf4", lambda *given: (rule(*given)[0], rule(*given)[1] * 1.01))
    assert not models.nf4_equals_bitsandbytes(weight)
    assert not quantization_by_hand._double_quantization_equals_bitsandbytes(weight)


def test_blocks_are_scaled_to_their_largest(weight):
    scaled = models.scaled_blocks(weight)
    assert scaled.shape == (192 * 6, 64)
    assert torch.equal(
        scaled[7] * weight.float().view(-1, 64)[7].abs().max(), scaled[7] * weight[1, 64:128].abs().max()
    )
    assert scaled.abs().amax(1).eq(1).all()


def test_the_inputs_of_a_layer_are_those_of_a_forward_pass(tiny_loaded):
    model = tiny_loaded.model
    ids = torch.tensor([[5, 6, 7]])
    seen = models.layer_inputs(model, model.lm_head, ids)
    with torch.no_grad():
        assert torch.equal(seen @ model.lm_head.weight.T, model(ids).logits[0])
    assert not model.lm_head._forward_pre_hooks


def test_the_relative_error_by_hand():
    assert models.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
