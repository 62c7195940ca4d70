"""bitsandbytes repacks nf4 weights at the first inference on some CPUs, unless it is kept from it."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import bnb_config, may_repack
from helpers.models.workarounds.falcon_linear import falcon_repair
from helpers.models.workarounds.nf4_repacking import _keep_unpacked, _was_repacked

FIRST = "transformer.h.0.self_attention.query_key_value"


@pytest.fixture
def nf4(checkpoint):
    with falcon_repair():
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=bnb_config("nf4"), device_map="cpu"
        )


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU does not repack 4-bit weights")
def test_bitsandbytes_still_repacks(nf4, logits):
    before = nf4.get_submodule(FIRST).weight.data.clone()
    assert may_repack(nf4)
    assert not _was_repacked(nf4)
    logits(nf4)
    after = nf4.get_submodule(FIRST).weight.data
    assert after.shape != before.shape or not torch.equal(after, before), (
        "bitsandbytes leaves nf4 weights alone at inference. Delete helpers/models/workarounds/nf4_repacking.py, the "
        "parameter `unpacked` of load, and the checks of repacked weights."
    )
    assert _was_repacked(nf4)
    assert may_repack(nf4)


def test_the_switch_is_still_there(nf4):
    assert hasattr(nf4.get_submodule(FIRST), "support_avx512bf16_for_cpu"), "bitsandbytes has renamed the switch"


def test_weights_that_are_kept_unpacked_stay_as_they_are(nf4, logits):
    _keep_unpacked(nf4)
    before = nf4.get_submodule(FIRST).weight.data.clone()
    assert not may_repack(nf4)
    logits(nf4)
    assert torch.equal(nf4.get_submodule(FIRST).weight.data, before)
    assert not _was_repacked(nf4)
