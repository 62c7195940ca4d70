"""The two messages of bitsandbytes that are dropped, and all others that are not."""

import inspect
import logging

import pytest
import torch
from bitsandbytes.backends.cpu import ops
from transformers import AutoModelForCausalLM

from helpers.models import bnb_config
from helpers.models.workarounds.bitsandbytes_messages import KNOWN_NOISE, quiet_bitsandbytes
from helpers.models.workarounds.falcon_linear import falcon_repair


@pytest.fixture
def unfiltered(monkeypatch):
    """The two loggers as if nothing had been filtered yet."""
    for name in KNOWN_NOISE:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])


@pytest.fixture
def int8(checkpoint):
    with falcon_repair():
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=bnb_config("int8"), device_map="cpu"
        )


def test_bitsandbytes_still_logs_both_messages(int8, logits, unfiltered, caplog):
    logits(int8)
    assert KNOWN_NOISE["bitsandbytes.autograd._functions"] in caplog.text, "remove it from KNOWN_NOISE"
    # The other is logged at import, and only by CPUs without the kernel: it is looked up in the source.
    assert KNOWN_NOISE["bitsandbytes.backends.cpu.ops"] in inspect.getsource(ops), "remove it from KNOWN_NOISE"


def test_known_noise_is_dropped_and_the_rest_is_not(int8, logits, unfiltered, caplog):
    quiet_bitsandbytes()
    quiet_bitsandbytes()
    logits(int8)
    assert "MatMul8bitLt" not in caplog.text
    for name in KNOWN_NOISE:
        assert len(logging.getLogger(name).filters) == 1
        logging.getLogger(name).warning("something new")
    assert caplog.text.count("something new") == 2
